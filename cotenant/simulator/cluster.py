"""A cluster as the extender sees one, made from a trace: its ledger holds nodes and pods as in production."""

from cotenant.contract import inventory as inventories
from cotenant.contract.compute import Compute
from cotenant.contract.grant import Role
from cotenant.contract.inventory import GPU, Inventory
from cotenant.contract.names import Names
from cotenant.contract.pods import Container, Metadata, Pod, Resources, Spec
from cotenant.contract.request import ContainerRequest, PodRequest, Wishes
from cotenant.contract.units import MIB
from cotenant.simulator.trace import MILLI, TraceNode, TracePod
from extender.ledger import Hold, Ledger, Node
from extender.placement.fit import Preference, choosing

NAMES = Names()
# A trace's GPU is 1000 milli; here a milli is a unit of 1 MiB.
UNIT_BYTES = MIB


def new_ledger(nodes: list[TraceNode]) -> Ledger:
    """Make a ledger of empty nodes."""
    ledger = Ledger(NAMES, UNIT_BYTES)
    for node in nodes:
        ledger.observe_node(_node(node))
    return ledger


def request(pod: TracePod) -> PodRequest:
    """Say what a trace's pod asks for; one without GPUs has no containers that ask for our resource."""
    compute = Compute(cpu_milli=pod.cpu_milli, memory_bytes=pod.memory_mib * MIB)
    if not pod.gpus:
        return PodRequest(containers=(), wishes=Wishes(), compute=compute)
    asking = ContainerRequest(name="main", role=Role.MAIN, units=pod.milli, share_bytes=pod.share_milli * UNIT_BYTES)
    return PodRequest(
        containers=(asking,), wishes=Wishes(gpu_count=pod.gpus, models=pod.wished_models), compute=compute
    )


def bind(ledger: Ledger, uid: str, asked: PodRequest, node: str, prefer: Preference) -> None:
    """Place a pod on a node, as the extender's bind does; raise ValueError where the fit says that it cannot be."""
    if not asked.containers:
        ledger.observe_pod(_plain_pod(uid, asked.compute, node))
        return
    outcome = ledger.assume(uid, uid, node, choosing(asked, prefer), asked.compute)
    if not isinstance(outcome, Hold):
        raise ValueError(f"pod {uid} does not fit on {node}: {outcome.sentence}")  # noqa: TRY004
    ledger.confirm(uid)


def bound(hold: Hold, uid: str, compute: Compute) -> Pod:
    """Make the pod of that UID that holds what *hold* says, and takes *compute* besides."""
    asked: dict[str, str | int] = {"cpu": f"{compute.cpu_milli}m", "memory": compute.memory_bytes}
    return Pod(
        metadata=Metadata(name=uid, uid=uid, annotations={NAMES.grant: hold.grant}),
        spec=Spec(containers=(Container(name="main"),), node_name=hold.node, resources=Resources(requests=asked)),
    )


def _plain_pod(uid: str, compute: Compute, node: str) -> Pod:
    asked: dict[str, str | int] = {"cpu": f"{compute.cpu_milli}m", "memory": compute.memory_bytes}
    return Pod(
        metadata=Metadata(name=uid, uid=uid),
        spec=Spec(containers=(Container(name="main", resources=Resources(requests=asked)),), node_name=node),
    )


def _node(node: TraceNode) -> Node:
    gpus = tuple(
        GPU(
            uuid=f"{node.name}/{index}",
            index=index,
            model=node.marked_model,
            total_bytes=MILLI * UNIT_BYTES,
            usable_bytes=MILLI * UNIT_BYTES,
        )
        for index in range(node.gpus)
    )
    inventory = Inventory(generation=0, unit_bytes=UNIT_BYTES, gpus=gpus)
    return Node(
        metadata=Node.Metadata(name=node.name, annotations={NAMES.inventory: inventories.encode(inventory)}),
        status=Node.Status(
            allocatable={
                "cpu": f"{node.cpu_milli}m",
                "memory": f"{node.memory_mib}Mi",
                NAMES.gpu_mem: MILLI * node.gpus,
            }
        ),
    )
