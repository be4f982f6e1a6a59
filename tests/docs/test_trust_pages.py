"""docs/security.md, crash-safety.md and peers.md: tests that they name exist, and rights that are granted are told."""

from collections import defaultdict

import pytest

from e2e.kustomize import MANIFESTS, build
from tests.docs.markdown import DOCS, section, tables

ROOT = DOCS.parent


def granted(layout: str, kind: str, name: str) -> dict[str, set[str]]:
    """Give the verbs of each resource that a role of a layout grants."""
    found: dict[str, set[str]] = defaultdict(set)
    for one in build(MANIFESTS / layout):
        if (one["kind"], one["metadata"]["name"]) == (kind, name):
            for rule in one["rules"]:
                for resource in rule["resources"]:
                    found[resource].update(rule["verbs"])
    return dict(found)


def explained(rows: list[list[str]]) -> dict[str, set[str]]:
    return {row[0]: set(row[1].split(", ")) for row in rows}


def test_every_right_of_the_extender_is_explained() -> None:
    cluster, second, attached = tables(section("security.md", "Rights of the extender"))
    assert granted("attached", "ClusterRole", "cotenant-extender") == explained(cluster)
    assert granted("second-scheduler", "Role", "cotenant-scheduler") == explained(second)
    assert granted("attached", "Role", "cotenant-extender") == explained(attached)


def test_every_right_of_the_device_plugin_is_explained() -> None:
    (rows,) = tables(section("security.md", "Rights of the device plugin"))
    assert granted("attached", "ClusterRole", "cotenant-device-plugin") == explained(rows)


def test_at_least_25_attacks_were_tried() -> None:
    (rows,) = tables(section("security.md", "Attacks tried"))
    assert len(rows) >= 25


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("security.md", "Attacks tried"),
        ("crash-safety.md", "The extender"),
        ("crash-safety.md", "The API server and etcd"),
        ("crash-safety.md", "Objects and clocks"),
        ("crash-safety.md", "The node"),
        ("peers.md", "gpushare"),
        ("peers.md", "HAMi, Volcano, KAI, Koordinator, NVIDIA's plugin"),
    ],
)
def test_every_test_that_is_named_exists(page: str, heading: str) -> None:
    (rows,) = tables(section(page, heading))
    missing = []
    for row in rows:
        path, _, name = row[-1].partition("::")
        if not (ROOT / path).is_file() or (name and f"def {name}(" not in (ROOT / path).read_text()):
            missing.append(row[-1])
    assert [] == missing
