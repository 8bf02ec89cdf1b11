"""`dora`: a low-rank update of the direction of each weight row, and its length beside it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .low_rank import LowRank, LowRankLinear, product, random_start
from .structure import inside, unwrap

__all__ = ["DoRA"]


class DoRA(LowRank):
    """y = m / ||W + s B A|| (W + s B A) x, with m: (out,), A and B trained and W frozen; s = alpha / rank.

    The norm is that of each row of the weight (out, in), and counts as a constant in the backward pass (section 4.3).
    m starts at ||W|| and B at zero, so a fresh adapter changes nothing. A bias stays outside of the scaling.

    Every forward pass takes the norm of a matrix as large as W, so this is slower than `lora`. With dropout, W x is
    taken of the dropped inputs too, as PEFT does.

    Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5.
    """

    api = 1
    peft_flags: ClassVar[frozenset[str]] = frozenset({"use_dora"})

    def layer(self, linear: nn.Module, generator: torch.Generator, *, fresh: bool) -> LowRankLinear:
        return DoRALinear(linear, *random_start(linear, self.rank, generator), self)

    def as_peft(self) -> dict[str, Any]:
        return super().as_peft() | {"use_dora": True}


class DoRALinear(LowRankLinear):
    """W x + (m / norm - 1) W x + (m / norm) s B A x, so that a ratio of one adds exactly nothing to W x."""

    reads_weight: ClassVar[bool] = True

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, config: LowRank) -> None:
        super().__init__(linear, a, b, config)
        self.lora_magnitude_vector = nn.Parameter(self.norm())  # (out,)

    @torch.no_grad()
    def norm(self) -> Tensor:  # (out,)
        """||W + s B A||, of each row; in float32, whatever is computed in."""
        norm: Tensor = torch.linalg.vector_norm(super().merged(), dim=1)
        return norm

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        ratio = self.lora_magnitude_vector / self.norm()  # (out,)
        return (ratio - 1) * self._of_base(x, y) + ratio * self.scale * product(x, self.lora_A, self.lora_B)

    def _of_base(self, x: Tensor, y: Tensor) -> Tensor:
        """W x without the bias: taken from y, unless that holds more or was computed of other inputs."""
        base = unwrap(self)
        assert isinstance(base, (nn.Linear, Conv1D)), type(base)
        dropped = self.training and self.dropout > 0
        y = base(x) if dropped or inside(self.base) is not None else y
        return y if base.bias is None else y - base.bias.to(y.dtype)

    def merged(self) -> Tensor:
        ratio = self.lora_magnitude_vector.detach() / self.norm()
        return ratio[:, None] * super().merged()

    def saved(self) -> dict[str, Tensor]:
        return super().saved() | {"lora_magnitude_vector": self.lora_magnitude_vector.detach()}
