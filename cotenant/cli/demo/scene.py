"""What the demo shows: its nodes and its pods, from the two YAML files beside this module."""

import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import yaml

Json = dict[str, Any]
Outcome = Literal["runs", "waits", "refused"]

# Stands in for nvidia-cuda-mps-control.
MPS_CONTROL = "cotenant-fake-mps-control"

_SAYS = "kubernetes.io/description"


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold a node and its made-up GPUs, as `cotenant-device-plugin --fake-gpus` reads them."""

    name: str
    gpus: list[Json]
    # of the device plugin's configuration
    rules: list[Json] = []

    def fake_gpus(self) -> bytes:
        """Write the file for the node's device plugin; JSON is YAML."""
        return msgspec.json.encode({"node": self.name, "gpus": self.gpus})

    def configuration(self, folder: Path) -> bytes:
        """Write the configuration of the node's device plugin, which keeps what it makes in *folder*."""
        mps = {"control": str(Path(sysconfig.get_path("scripts")) / MPS_CONTROL), "root": f"{folder}/mps"}
        settings = {
            "gpus": self.rules,
            "deviceListStrategy": "cdi-cri",
            "cdiDirectory": f"{folder}/cdi",
            "mps": {**mps, "shm": "/dev/shm"},  # noqa: S108 - what is everybody's here
        }
        return msgspec.json.encode(settings if self.rules else {})


class Step(msgspec.Struct, frozen=True):
    """Hold pods that are submitted together, what to say to it, and what should become of them."""

    says: str
    pods: tuple[Json, ...]
    outcome: Outcome


def nodes() -> list[Node]:
    """Read the nodes."""
    return msgspec.yaml.decode(_text("nodes.yaml"), type=list[Node])


def steps() -> list[Step]:
    """Read the pods, each YAML document one step."""
    documents = yaml.safe_load_all(_text("pods.yaml"))
    return [_step(tuple(d["items"]) if d["kind"] == "List" else (d,)) for d in documents]


def _step(pods: tuple[Json, ...]) -> Step:
    first = pods[0]["metadata"]
    outcome = cast("Outcome", (first.get("labels") or {}).get("demo", "runs"))
    return Step(says=first["annotations"][_SAYS], pods=pods, outcome=outcome)


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
