"""Best fit: leave the least behind, so that large pieces stay large."""

from collections.abc import Sequence

from extender.ledger import GPUState


class BestFit:
    """Take the GPU that is left with the fewest free bytes, and the node where that is least."""

    name = "best-fit"

    def gpu_cost(self, state: GPUState, share_bytes: int) -> float:
        """Count the bytes left free on the GPU."""
        return state.free_bytes - share_bytes

    def node_cost(self, taken: Sequence[tuple[GPUState, int]]) -> float:
        """Count the bytes left free on the GPUs taken."""
        return sum(state.free_bytes - share_bytes for state, share_bytes in taken)
