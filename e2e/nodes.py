"""Fake GPU nodes at scale: `python -m e2e.nodes --count 5000 --gpus 8 --memory 80GiB`, and `--delete`.

Each is a Node object as a device plugin and a kubelet would leave it: the inventory annotation, the resource in
capacity and allocatable, Ready. No kubelet is behind it, so a pod bound to it stays Pending with its node set.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

from cotenant.contract import units
from cotenant.contract.inventory import GPU, Inventory, encode
from cotenant.contract.names import Names
from e2e.rest import Api, ApiError, Object

THREADS = 16
LABEL = "cotenant.io/fake-node"
"""Its value is the prefix that the nodes were registered with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every fake node has."""

    gpus: int = 8
    gpu_bytes: int = 80 * units.GIB
    unit_bytes: int = units.GIB
    model: str = "NVIDIA A100-SXM4-80GB"
    domain: str = "cotenant.io"


def node(name: str, shape: Shape, *, prefix: str) -> Object:
    """Return the Node object; a GPU's UUID follows from the node's name and its index."""
    usable_bytes = units.usable_bytes(total=shape.gpu_bytes, reserved=0, reserve_per_gpu=0, unit_bytes=shape.unit_bytes)
    gpus = tuple(
        GPU(
            uuid=f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{index}.{name}')}",
            index=index,
            model=shape.model,
            total_bytes=shape.gpu_bytes,
            usable_bytes=usable_bytes,
        )
        for index in range(shape.gpus)
    )
    names = Names(domain=shape.domain)
    resources = {
        "cpu": "128",
        "memory": "1Ti",
        "ephemeral-storage": "1Ti",
        "pods": "250",
        names.gpu_mem: str(shape.gpus * usable_bytes // shape.unit_bytes),
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {LABEL: prefix, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"},
            "annotations": {names.inventory: encode(Inventory(generation=1, unit_bytes=shape.unit_bytes, gpus=gpus))},
        },
        "status": {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    }


def register(api: Api, count: int, shape: Shape, *, prefix: str) -> None:
    """Create `count` nodes named `<prefix>-<number>`, with a progress bar on a terminal."""

    def create(number: int) -> None:
        api.create(node(f"{prefix}-{number}", shape, prefix=prefix))

    with (
        ThreadPoolExecutor(THREADS) as pool,
        click.progressbar(pool.map(create, range(count)), length=count, label=f"{count} nodes") as created,
    ):
        for _ in created:
            pass


def delete(api: Api, *, prefix: str) -> None:
    """Delete every node that was registered with this prefix."""
    api.call("DELETE", api.resource("Node").path(), query={"labelSelector": f"{LABEL}={prefix}"})


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    del context, parameter
    try:
        return units.parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.option("--count", default=100, show_default=True, type=click.IntRange(min=0), help="How many nodes.")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(min=0), help="GPUs of each node.")
@click.option("--memory", default="80GiB", show_default=True, callback=_bytes, help="Memory of each GPU.")
@click.option("--unit", default="1GiB", show_default=True, callback=_bytes, help="Memory that one unit stands for.")
@click.option("--model", default=Shape().model, show_default=True, help="Model of every GPU.")
@click.option("--prefix", default="fake", show_default=True, help="What the nodes' names start with.")
@click.option("--delete", "remove", is_flag=True, help="Delete the nodes of this prefix instead.")
@click.option(
    "--kubeconfig",
    envvar="KUBECONFIG",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Which API server, and who asks; by default $KUBECONFIG.",
)
def main(
    *, count: int, gpus: int, memory: int, unit: int, model: str, prefix: str, remove: bool, kubeconfig: Path
) -> None:
    """Register fake GPU nodes, or delete them."""
    try:
        api = Api.from_kubeconfig(kubeconfig)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    shape = Shape(gpus=gpus, gpu_bytes=memory, unit_bytes=unit, model=model)
    try:
        if remove:
            delete(api, prefix=prefix)
        else:
            register(api, count, shape, prefix=prefix)
    except ApiError as refused:
        raise click.ClickException(str(refused)) from refused


if __name__ == "__main__":
    main()
