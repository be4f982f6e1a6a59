"""docs/metrics.md, the dashboard and the alerts name metrics that there are."""

import json
import re
import runpy
from functools import cache

import yaml

from e2e.kustomize import MANIFESTS
from tests.device_plugin.node import Node, container_grant
from tests.docs.markdown import DOCS, section, tables
from tests.extender.running import call, eventually
from tests.extender.scrape import Families, a_ledger, a_metrics, families, text

MONITORING = MANIFESTS / "monitoring"


SERVING = "serve: 127.0.0.1:0\nhealth: {cleanProbes: 1}"


def of_the_extender() -> Families:
    return families(text(a_metrics(a_ledger())))


@cache
def of_a_plugin() -> Families:
    """Scrape a device plugin that has seen an error, with a pod running."""
    with Node(config=SERVING) as node:
        assert node.plugin is not None
        address = node.plugin.serves_at
        node.write_gpus([{"xids": [31], "uncorrectedEcc": 2}, {}])
        node.running(node.add_pod("p", container_grant(gpus=[0], units=8)))

        def scraped() -> str:
            return call(address, "GET", "/metrics").body.decode()

        assert eventually(lambda: "cotenant_gpu_xids_total{" in scraped() and "uncorrected_ecc_errors{" in scraped())
        return families(scraped())


def known() -> Families:
    return of_the_extender() | of_a_plugin()


def named(expression: str) -> set[str]:
    """List the metrics of ours in an expression, without what a histogram adds."""
    found = set(re.findall(r"\bcotenant_[a-z_]+", expression))
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in found}


def test_every_metric_stands_in_the_table_with_its_labels_and_meaning() -> None:
    (rows,) = tables(section("metrics.md", "Metrics of the extender"))
    found = of_the_extender()
    assert [[name, ", ".join(sorted(labels)), about] for name, (_, about, labels) in sorted(found.items())] == rows


def test_the_dashboard_is_the_one_that_is_made_and_asks_for_metrics_that_there_are() -> None:
    written = (MONITORING / "dashboard.json").read_text()
    made = runpy.run_path(str(MANIFESTS.parent / "scripts" / "dashboard.py"))["text"]()
    assert made == written, "run `make generated`"
    board = json.loads(written)
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 15
    assert set() == {name for expression in targets for name in named(expression)} - known().keys()
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(x + w <= 24 for _, w, x, _ in places)


def expressions() -> list[str]:
    """List what alerts and dashboard ask Prometheus for."""
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    board = json.loads((MONITORING / "dashboard.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [rule["expr"] for rule in rules] + panels


def test_what_two_extenders_both_tell_is_taken_once() -> None:
    # of each of the two it is asked whether it hears the API server
    own = {"cotenant_cache_synced", "cotenant_watch_last_event_timestamp_seconds"}
    both = {name for name, (kind, _, _) in of_the_extender().items() if kind == "gauge"} - own
    bare = [
        (name, expression)
        for expression in expressions()
        for name in named(expression) & both
        for before in re.split(rf"{name}(?![a-z_])", expression)[:-1]
        if not re.search(r"(max|min|sum)( by \([a-z, ]+\) )?\($", before)
    ]
    assert [] == bare


def test_prometheus_leaves_the_names_of_pods_that_share_gpus_as_they_are() -> None:
    monitors = {one["kind"]: one["spec"] for one in yaml.safe_load_all((MONITORING / "scrape.yaml").read_text())}
    endpoints = [*monitors["ServiceMonitor"]["endpoints"], *monitors["PodMonitor"]["podMetricsEndpoints"]]
    assert [True, True] == [one["honorLabels"] for one in endpoints]


def test_every_alert_asks_for_metrics_that_there_are_and_has_a_runbook() -> None:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
    assert set() == {name for rule in rules for name in named(rule["expr"])} - known().keys()
    page = (DOCS / "runbooks.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert [rule["alert"] for rule in rules] == headings
    for rule in rules:
        assert rule["annotations"]["runbook_url"].endswith(f"#{rule['alert'].lower()}")
        assert {"severity"} == rule["labels"].keys()
        assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
    for body in re.split(r"^## .+$", page, flags=re.MULTILINE)[1:]:
        assert ["Means", "Look", "Do"] == re.findall(r"^\*\*(\w+)\.\*\*", body, re.MULTILINE)
