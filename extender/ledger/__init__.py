"""Who holds what of every GPU of the cluster."""

from extender.ledger.ledger import Ledger
from extender.ledger.values import (
    GPUState,
    Hold,
    MIGState,
    Node,
    NodeView,
    Stage,
    Use,
    Waiting,
    all_closed_by,
    closed_by,
)

__all__ = [
    "GPUState",
    "Hold",
    "Ledger",
    "MIGState",
    "Node",
    "NodeView",
    "Stage",
    "Use",
    "Waiting",
    "all_closed_by",
    "closed_by",
]
