"""Write manifests/monitoring/dashboard.json, Cotenant's dashboard for Grafana, from the rows below.

`make generated` runs it. Every expression uses metrics of the extender, of the device plugins, or of dcgm-exporter.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "manifests" / "monitoring" / "dashboard.json"
Panel = dict[str, Any]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_NODE = 'node=~"$node"'


def _panel(kind: str, title: str, unit: str, about: str, *targets: tuple[str, str], **more: Any) -> Panel:
    """Describe a panel: its targets are expressions, each with what its lines are called."""
    queries = [
        {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for n, (expression, legend) in enumerate(targets)
    ]
    if kind in {"table", "stat"}:
        queries = [query | {"instant": True} for query in queries]
    if kind == "table":
        queries = [query | {"format": "table"} for query in queries]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": _SOURCE,
        "targets": queries,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, **more}, "overrides": []},
        "options": {},
    }


def _stat(title: str, unit: str, about: str, expression: str) -> Panel:
    return _panel("stat", title, unit, about, (expression, ""))


def _once(metric: str, *labels: str, of: str = "") -> str:
    """Take what two extenders both tell once, by its labels."""
    by = f" by ({', '.join(labels)}) " if labels else ""
    return f"max{by}({metric}{of and '{' + of + '}'})"


_GPU = ("node", "gpu", "uuid")
_CAPACITY, _ALLOCATED = (
    _once(f"cotenant_cluster_memory_{what}_bytes", "model", "mode") for what in ("capacity", "allocated")
)
_GPU_ALLOCATED = " / ".join(
    _once(f"cotenant_gpu_memory_{what}_bytes", *_GPU, of=_NODE) for what in ("allocated", "capacity")
)
_GPU_CLIENTS = " / ".join(_once(f"cotenant_gpu_mps_{what}", *_GPU, of=_NODE) for what in ("clients", "clients_limit"))
_OF_PODS = _once("cotenant_pod_gpu_memory_bytes", "namespace", "pod", "node", "uuid", of=_NODE)
_VERB_P = (
    "histogram_quantile({}, sum by (le, verb)"
    " (rate(cotenant_extender_request_duration_seconds_bucket[$__rate_interval])))"
)

ROWS: list[tuple[str, int, list[Panel]]] = [
    (
        "Cluster",
        4,
        [
            _stat("Capacity", "bytes", "What pods may be given of all GPUs.", f"sum({_CAPACITY})"),
            _stat("Allocated", "percentunit", "Share that pods hold.", f"sum({_ALLOCATED}) / sum({_CAPACITY})"),
            _stat(
                "Largest free block",
                "bytes",
                "The largest pod of one GPU that could start now.",
                f"max(cotenant_node_largest_free_block_bytes{{{_NODE}}})",
            ),
            _stat(
                "Fragmentation",
                "percentunit",
                "Share of the free memory in pieces too small for pods of the sizes that run.",
                _once("cotenant_fragmentation_ratio"),
            ),
            _stat("Pods", "short", "Pods that hold GPU memory.", _once("cotenant_pods")),
            _stat("Waiting", "short", "Pods that ask for GPU memory and wait.", _once("cotenant_pods_waiting")),
        ],
    ),
    (
        "Memory",
        9,
        [
            _panel(
                "timeseries",
                "Allocated by model",
                "bytes",
                "What pods hold, and what they could be given.",
                (f"sum by (model) ({_ALLOCATED})", "{{model}} allocated"),
                (f"sum by (model) ({_CAPACITY})", "{{model}} capacity"),
            ),
            _panel(
                "heatmap",
                "GPUs by share allocated",
                "percentunit",
                "How many GPUs are how full; needs gpuMetrics.",
                (f"count_values('share', round({_GPU_ALLOCATED}, 0.1))", "{{share}}"),
            ),
            _panel(
                "timeseries",
                "Allocated per GPU",
                "percentunit",
                "Choose nodes above; needs gpuMetrics.",
                (_GPU_ALLOCATED, "{{node}} GPU {{gpu}}"),
                max=1,
            ),
        ],
    ),
    (
        "Scheduling",
        9,
        [
            _panel(
                "timeseries",
                "Time of the verbs",
                "s",
                "kube-scheduler waits for each; it gives up after httpTimeout.",
                (_VERB_P.format("0.5"), "{{verb}} p50"),
                (_VERB_P.format("0.99"), "{{verb}} p99"),
            ),
            _panel(
                "timeseries",
                "Answers",
                "reqps",
                "By verb and outcome.",
                (
                    "sum by (verb, outcome) (rate(cotenant_extender_request_duration_seconds_count[$__rate_interval]))",
                    "{{verb}} {{outcome}}",
                ),
            ),
            _panel(
                "timeseries",
                "Nodes refused, by reason",
                "short",
                "Each filter call counts every node that it refuses.",
                ("sum by (reason) (rate(cotenant_filter_rejections_total[$__rate_interval]))", "{{reason}}"),
            ),
            _panel(
                "timeseries",
                "Binds",
                "reqps",
                "ok, or the reason for a no.",
                ("sum by (outcome) (rate(cotenant_bind_total[$__rate_interval]))", "{{outcome}}"),
            ),
        ],
    ),
    (
        "MPS and MIG",
        8,
        [
            _panel(
                "timeseries",
                "MPS clients",
                "percentunit",
                "Containers of each GPU under MPS, of those that its daemon may serve; needs gpuMetrics.",
                (_GPU_CLIENTS, "{{node}} GPU {{gpu}}"),
                max=1,
            ),
            _panel(
                "timeseries",
                "MIG instances",
                "short",
                "By profile: held by pods, or there for nobody; needs gpuMetrics.",
                (
                    f"sum by (profile, state) ({_once('cotenant_mig_instances', *_GPU, 'profile', 'state', of=_NODE)})",
                    "{{profile}} {{state}}",
                ),
            ),
            _panel(
                "timeseries",
                "Free MIG slices",
                "short",
                "Memory slices that pods could be given, of 8 of most boards, of 4 of the A30; needs gpuMetrics.",
                (_once("cotenant_mig_slices_free", *_GPU, of=_NODE), "{{node}} GPU {{gpu}}"),
            ),
        ],
    ),
    (
        "Pods",
        9,
        [
            _panel(
                "table",
                "Pods that hold most",
                "bytes",
                "Needs gpuMetrics.",
                (f"topk(20, sum by (namespace, pod, node) ({_OF_PODS}))", ""),
            ),
            _panel(
                "timeseries",
                "GPU use of the pods' GPUs",
                "percent",
                "dcgm-exporter's utilisation of each GPU, by the pods that share it.",
                (
                    (
                        "max by (uuid) (label_replace(DCGM_FI_DEV_GPU_UTIL, 'uuid', '$1', 'UUID', '(.*)'))"
                        f" * on (uuid) group_right () ({_OF_PODS} > bool 0)"
                    ),
                    "{{namespace}}/{{pod}}",
                ),
                max=100,
            ),
        ],
    ),
    (
        "Health",
        8,
        [
            _panel(
                "timeseries",
                "Nodes, by problem",
                "short",
                "none is no problem.",
                (_once("cotenant_nodes", "problem"), "{{problem}}"),
            ),
            _panel(
                "timeseries",
                "Since the API server was heard",
                "s",
                "A watch that is quiet gets bookmarks about once a minute.",
                ("max by (resource) (time() - cotenant_watch_last_event_timestamp_seconds)", "{{resource}}"),
            ),
            _panel(
                "timeseries",
                "In doubt",
                "short",
                "Bindings without a known outcome, grants that cannot be read, pods without a grant.",
                ("sum(cotenant_bindings_unsettled)", "bindings"),
                (_once("cotenant_grants_unreadable"), "grants"),
                (_once("cotenant_pods_ungranted"), "ungranted"),
            ),
        ],
    ),
]


def dashboard() -> Panel:
    """Lay the panels out, row by row, each row as wide as the page."""
    panels: list[Panel] = []
    top = 0
    for title, height, row in ROWS:
        where = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": where, "panels": []})
        width = 24 // len(row)
        for n, panel in enumerate(row):
            panels.append(panel | {"gridPos": {"h": height, "w": width, "x": n * width, "y": top + 1}})
        top += height + 1
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "node",
            "type": "query",
            "datasource": _SOURCE,
            "query": "label_values(cotenant_node_largest_free_block_bytes, node)",
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "refresh": 2,
        },
    ]
    return {
        "uid": "cotenant",
        "title": "Cotenant",
        "tags": ["gpu", "kubernetes"],
        "schemaVersion": 41,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


def text() -> str:
    """Give the dashboard as the file has it."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv and TARGET.read_text() != text():
        sys.exit(f"{TARGET.relative_to(ROOT)} is not what the code makes any more: run `make generated`")
    TARGET.write_text(text())
