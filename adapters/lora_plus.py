"""`lora-plus`: B learns faster than A."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from .contract import Adapter, Capabilities, Rate
from .errors import TargetError
from .structure import Layers

__all__ = ["LoRAPlus"]


class LoRAPlus(Adapter):
    """rate(B) = ratio * rate(A), for every adapter of the stack that declares which of its tensors are B.

    In wide networks one rate for both trains A and B at different speeds, and features hardly at all. It multiplies
    with whatever else changes rates (`layerwise-lr`), in either order.

    Source: Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4; the ratio: section 5.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    ratio: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """Learning rate of B as a multiple of that of A."""

    def rates(self, rates: Mapping[str, Rate], layers: Layers) -> dict[str, Rate]:
        if not any(rate.role == "B" for rate in rates.values()):
            raise TargetError(
                "lora-plus: nothing in this stack has a B to speed up; add an adapter that has one, such as lora"
            )
        return {
            name: replace(rate, multiplier=rate.multiplier * self.ratio) if rate.role == "B" else rate
            for name, rate in rates.items()
        }
