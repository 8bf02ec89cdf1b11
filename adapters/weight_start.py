"""What adapters share that start from factors of the weight itself: the start is subtracted, never taken out of W."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StackError
from .low_rank import LowRank, LowRankLinear, matrix, product
from .structure import linear_shape
from .targets import resolve

__all__ = ["AnchoredLinear", "WeightStart"]


class WeightStart(LowRank):
    """A low-rank adapter whose A and B start as factors of W. Saved as the plain LoRA of twice the rank that it is."""

    def check(self, skeleton: nn.Module) -> None:
        for path, linear in resolve(skeleton, self.targets).items():
            shape = linear_shape(linear)
            if shape and self.rank > min(shape):
                raise StackError(
                    f"rank {self.rank} is more than the {min(shape)} that {path} has: choose a smaller one"
                )

    @abstractmethod
    def factors(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(A, B) to start from, made of w: (out, in), float32."""

    def layer(self, linear: nn.Module, generator: torch.Generator, *, fresh: bool) -> LowRankLinear:
        if fresh:
            return AnchoredLinear(linear, *self.factors(matrix(linear), generator), self)
        shape = linear_shape(linear)
        assert shape is not None, type(linear)
        return AnchoredLinear(linear, torch.zeros(self.rank, shape[0]), torch.zeros(shape[1], self.rank), self)

    def as_peft(self) -> dict[str, Any]:
        """Twice the rank, and the alpha that gives the same scale with it."""
        widened = math.sqrt(2) if self.rank_stabilised else 2
        return super().as_peft() | {"r": 2 * self.rank, "lora_alpha": widened * self.effective_alpha}


class AnchoredLinear(LowRankLinear):
    """y = W x + scale (B A x - B0 A0 x), where A0 and B0 stay what A and B started as.

    Both products are computed alike, so their difference is exactly zero at the start, whatever the precision.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, config: LowRank) -> None:
        super().__init__(linear, a, b, config)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * (product(x, self.lora_A, self.lora_B) - product(x, self.start_A, self.start_B))

    def delta(self) -> Tensor:
        return super().delta() - self.scale * (self.start_B @ self.start_A)

    def saved(self) -> dict[str, Tensor]:
        """[B, -B0] [A; A0] = B A - B0 A0."""
        return {
            "lora_A.weight": torch.cat([self.lora_A.detach(), self.start_A]),
            "lora_B.weight": torch.cat([self.lora_B.detach(), -self.start_B], dim=1),
        }

    def load(self, values: Mapping[str, Tensor]) -> None:
        a, start_a = values["lora_A.weight"].chunk(2)
        b, minus_start_b = values["lora_B.weight"].chunk(2, dim=1)
        for own, value in ((self.lora_A, a), (self.start_A, start_a), (self.lora_B, b), (self.start_B, -minus_start_b)):
            own.copy_(value)
