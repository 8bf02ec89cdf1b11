"""`lora`: a low-rank update beside frozen linears."""

import torch
from torch import nn

from .low_rank import LowRank, LowRankLinear, random_start

__all__ = ["LoRA"]


class LoRA(LowRank):
    """y = W x + (alpha / rank) B A x, with A: (rank, in) and B: (out, rank) trained and W frozen.

    B starts at zero, so a fresh adapter changes nothing. Rank-stabilised scaling divides by the square root of the
    rank instead. Works over any linear of the base, float or packed.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3;
    rank-stabilised: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732, theorem 3.2.
    """

    api = 1

    def layer(self, linear: nn.Module, generator: torch.Generator, *, fresh: bool) -> LowRankLinear:
        return LowRankLinear(linear, *random_start(linear, self.rank, generator), self)
