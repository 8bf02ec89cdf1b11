"""What a compiled layer keeps for its backward pass: what it cannot find again without a product.

A compiler keeps whatever a product of the backward pass reads, as it would have to be written out again for that: the
output of each norm, and what goes into the last linear. But only element-wise kernels lie between these and what is
kept in any case. With LoRA on all linears, finding them again takes a third of the memory away, and no time.
"""

from collections.abc import Sequence
from typing import Any

from torch._functorch import config  # has no public name; the options of `torch.compile` are asked for such a function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import GraphModule

__all__ = ["Partitioner"]


class Partitioner(CustomPartitionerFn):
    """Torch's own division of a graph into a forward and a backward one, without its rule about products."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        with config.patch(ban_recompute_materialized_backward=False):
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """What the compiler's cache knows it by."""
        return get_hash_for_files((__file__,))
