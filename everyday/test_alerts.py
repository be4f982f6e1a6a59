"""Every alert fires once on what it is for, and not on what looks like it: judged by promtool, Prometheus' own."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.kustomize import MANIFESTS
from e2e.processes import MissingProgramError, find_program

RULES = MANIFESTS / "monitoring" / "rules.yaml"
GPU = 'node="n1",gpu="0",uuid="GPU-1"'
WELL = {"cotenant_cache_synced": "1x60"}
GIB = 1 << 30

# What fires each alert, as promtool writes series, a sample a minute; and a like series on which it stays silent.
Series = dict[str, str]
CASES: dict[str, tuple[Series, Series]] = {
    "CotenantExtenderDown": ({}, {}),
    "CotenantNobodyBinds": (
        {'cotenant_writer{pod="a"}': "1 0x59", 'cotenant_writer{pod="b"}': "0x60"},
        # one has ended, and the other is about to take over
        {'cotenant_writer{pod="a"}': "1x57 0x2", 'cotenant_writer{pod="b"}': "0x60"},
    ),
    "CotenantCacheStale": (
        {'cotenant_watch_last_event_timestamp_seconds{resource="pods"}': "0x60"},
        # heard every minute
        {'cotenant_watch_last_event_timestamp_seconds{resource="pods"}': "0+60x60"},
    ),
    "CotenantExtenderSlow": (
        {
            'cotenant_extender_request_duration_seconds_bucket{verb="filter",outcome="ok",le="1.0"}': "0+0x60",
            'cotenant_extender_request_duration_seconds_bucket{verb="filter",outcome="ok",le="2.5"}': "0+60x60",
            'cotenant_extender_request_duration_seconds_bucket{verb="filter",outcome="ok",le="+Inf"}': "0+60x60",
        },
        {
            'cotenant_extender_request_duration_seconds_bucket{verb="filter",outcome="ok",le="1.0"}': "0+60x60",
            'cotenant_extender_request_duration_seconds_bucket{verb="filter",outcome="ok",le="+Inf"}': "0+60x60",
        },
    ),
    "CotenantExtenderErrors": (
        {'cotenant_extender_request_duration_seconds_count{verb="bind",outcome="error"}': "0+1x60"},
        {'cotenant_extender_request_duration_seconds_count{verb="bind",outcome="rejected"}': "0+1x60"},
    ),
    "CotenantExtenderThreadFails": (
        {'cotenant_thread_failures_total{thread="settle bindings"}': "0x10 1+1x50"},
        {'cotenant_thread_failures_total{thread="settle bindings"}': "0x10 1x50"},
    ),
    "CotenantBindsRefused": (
        {'cotenant_bind_total{outcome="APIError"}': "0+1x60"},
        {'cotenant_bind_total{outcome="NoGPUFits"}': "0+1x60"},
    ),
    "CotenantBindingsUnsettled": ({"cotenant_bindings_unsettled": "1x60"}, {"cotenant_bindings_unsettled": "1 1 0x58"}),
    "CotenantGPUOvercommitted": (
        {
            f"cotenant_gpu_memory_allocated_bytes{{{GPU}}}": f"{11 * GIB}x60",
            f'cotenant_gpu_memory_capacity_bytes{{{GPU},model="T4",mode="time-slicing"}}': f"{10 * GIB}x60",
        },
        {
            f"cotenant_gpu_memory_allocated_bytes{{{GPU}}}": f"{10 * GIB}x60",
            f'cotenant_gpu_memory_capacity_bytes{{{GPU},model="T4",mode="time-slicing"}}': f"{10 * GIB}x60",
        },
    ),
    "CotenantGPUUnhealthyWithPods": (
        {f"cotenant_gpu_health{{{GPU}}}": "0x60", f"cotenant_gpu_pods{{{GPU}}}": "2x60"},
        {f"cotenant_gpu_health{{{GPU}}}": "0x60", f"cotenant_gpu_pods{{{GPU}}}": "0x60"},
    ),
    "CotenantNodesWithoutPlugin": (
        {'cotenant_nodes{problem="PluginGone"}': "2x60"},
        {'cotenant_nodes{problem="none"}': "2x60", 'cotenant_nodes{problem="NotAdvertised"}': "0x60"},
    ),
    "CotenantNodesMisconfigured": (
        {'cotenant_nodes{problem="UnitMismatch"}': "1x60"},
        {'cotenant_nodes{problem="none"}': "1x60"},
    ),
    "CotenantGPUMemoryOverused": (
        {
            f"cotenant_gpu_memory_used_bytes{{{GPU}}}": f"{10 * GIB}x60",
            f"cotenant_gpu_memory_allocated_bytes{{{GPU}}}": f"{8 * GIB}x60",
            f"cotenant_gpu_pods{{{GPU}}}": "1x60",
        },
        # a context of CUDA's own is not worth waking anybody
        {
            f"cotenant_gpu_memory_used_bytes{{{GPU}}}": f"{8 * GIB + GIB // 2}x60",
            f"cotenant_gpu_memory_allocated_bytes{{{GPU}}}": f"{8 * GIB}x60",
            f"cotenant_gpu_pods{{{GPU}}}": "1x60",
        },
    ),
    "CotenantGPUErrors": (
        # there is no such series before the first of them
        {
            f'cotenant_gpu_xids_total{{{GPU},xid="79",class="fatal"}}': "_x50 1x10",
            f'cotenant_gpu_xids_total{{{GPU},xid="48",class="reset"}}': "1x60",
        },
        {f'cotenant_gpu_xids_total{{{GPU},xid="79",class="fatal"}}': "1x60"},
    ),
    "CotenantDevicePluginNotRegistered": (
        {'cotenant_device_plugin_registered{node="n1",resource="cotenant.io/gpu-mem"}': "0x60"},
        {'cotenant_device_plugin_registered{node="n1",resource="cotenant.io/gpu-mem"}': "1x60"},
    ),
    "CotenantDevicePluginThreadFails": (
        {'cotenant_device_plugin_thread_failures_total{node="n1",thread="inventory"}': "0x10 1+1x50"},
        {'cotenant_device_plugin_thread_failures_total{node="n1",thread="inventory"}': "0x10 1x50"},
    ),
    "CotenantGrantsUnreadable": ({"cotenant_grants_unreadable": "1x60"}, {"cotenant_grants_unreadable": "0x60"}),
    "CotenantPodsUngranted": ({"cotenant_pods_ungranted": "1x60"}, {"cotenant_pods_ungranted": "0x60"}),
    "CotenantPodsWaiting": (
        {"cotenant_pods_waiting_longest_seconds": "0+60x60"},
        {"cotenant_pods_waiting_longest_seconds": "600x60"},
    ),
}


# What is not told by two extenders alike: what plugins tell, whether each hears the API server, and which one binds.
OF_EACH = (
    "cotenant_gpu_memory_used",
    "cotenant_gpu_xids",
    "cotenant_device_plugin",
    "cotenant_cache",
    "cotenant_watch",
    "cotenant_writer",
)


def by_both(series: Series) -> Series:
    """Have a second extender tell what the first does."""
    given: Series = {}
    for key, values in series.items():
        name, _, labels = key.removesuffix("}").partition("{")
        pods = ("",) if name.startswith(OF_EACH) else ('pod="a"', 'pod="b"')
        given |= {f"{name}{{{','.join(filter(None, (labels, pod)))}}}": values for pod in pods}
    return given


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["spec"]["groups"][0]["rules"]
    return found


def promtool(folder: Path, *words: str) -> str:
    try:
        program = find_program("promtool")
    except MissingProgramError as missing:
        pytest.skip(str(missing))
    (folder / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text())["spec"]))
    done = subprocess.run([str(program), *words], cwd=folder, check=False, capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_ones_that_prometheus_takes(tmp_path: Path) -> None:
    assert f"{len(rules())} rules found" in promtool(tmp_path, "check", "rules", "rules.yaml")


def test_every_expression_of_the_dashboard_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    board = json.loads((MANIFESTS / "monitoring" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    # as Grafana fills them in
    filled = [one.replace("$__rate_interval", "5m").replace("$node", "n1|n2") for one in asked]
    recorded = [{"record": f"panel:{n}", "expr": one} for n, one in enumerate(filled)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool(tmp_path, "check", "rules", "panels.yaml")


def test_every_alert_has_its_case() -> None:
    assert [rule["alert"] for rule in rules()] == [*CASES]


def test_every_alert_fires_on_what_it_is_for_and_on_nothing_like_it(tmp_path: Path) -> None:
    groups = []
    for name, (firing, silent) in CASES.items():
        for series, fires in ((firing, True), (silent, False)):
            given = by_both(series if name == "CotenantExtenderDown" and fires else WELL | series)
            alerts = [] if not fires else ["fires"]
            groups.append(
                {
                    "name": f"{name} {'fires' if fires else 'is silent'}",
                    "interval": "1m",
                    "input_series": [{"series": key, "values": value} for key, value in given.items()],
                    # by name alone: how many labels an alert carries is the rule's matter
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                            "eval_time": "59m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if alerts else [],
                        }
                    ],
                }
            )
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": groups})
    )
    promtool(tmp_path, "test", "rules", "tests.yaml")


def test_what_two_extenders_both_tell_the_dashboard_shows_once(tmp_path: Path) -> None:
    pod = 'namespace="team",pod="train",node="n1"'
    series = {
        'cotenant_cluster_memory_capacity_bytes{mode="mps",model="T4"}': f"{10 * GIB}x5",
        'cotenant_cluster_memory_allocated_bytes{mode="mps",model="T4"}': f"{5 * GIB}x5",
        "cotenant_pods": "1x5",
        f"cotenant_gpu_memory_allocated_bytes{{{GPU}}}": f"{5 * GIB}x5",
        f'cotenant_gpu_memory_capacity_bytes{{{GPU},model="T4",mode="mps"}}': f"{10 * GIB}x5",
        f"cotenant_gpu_mps_clients{{{GPU}}}": "12x5",
        f"cotenant_gpu_mps_clients_limit{{{GPU}}}": "48x5",
        'cotenant_nodes{problem="none"}': "3x5",
    }
    # the second extender's own name is another label where Prometheus keeps the pods' names
    held = {f'cotenant_pod_gpu_memory_bytes{{{pod},uuid="GPU-1",instance="{one}"}}': f"{5 * GIB}x5" for one in "ab"}
    used = {'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-1"}': "40x5"}
    shown = {
        "Capacity": ("{}", 10 * GIB),
        "Allocated": ("{}", 0.5),
        "Pods": ("{}", 1),
        "Allocated per GPU": (f"{{{GPU}}}", 0.5),
        "GPUs by share allocated": ('{share="0.5"}', 1),
        "MPS clients": (f"{{{GPU}}}", 0.25),
        "Pods that hold most": (f"{{{pod}}}", 5 * GIB),
        "GPU use of the pods' GPUs": (f'{{{pod},uuid="GPU-1"}}', 40),
        "Nodes, by problem": ('{problem="none"}', 3),
    }
    board = json.loads((MANIFESTS / "monitoring" / "dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = {panel["title"]: panel["targets"][0]["expr"] for panel in panels if panel["title"] in shown}
    group = {
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in (by_both(series) | held | used).items()],
        "promql_expr_test": [
            {
                "expr": asked[title].replace("$node", "n1|n2"),
                "eval_time": "3m",
                "exp_samples": [{"labels": labels, "value": value}],
            }
            for title, (labels, value) in shown.items()
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [group]}))
    promtool(tmp_path, "test", "rules", "tests.yaml")
