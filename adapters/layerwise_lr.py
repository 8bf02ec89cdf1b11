"""`layerwise-lr`: the learning rate decays from the head down to the embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

from pydantic import Field

from .contract import Adapter, Capabilities, Rate
from .errors import TargetError, nearest
from .structure import Layers

__all__ = ["LayerwiseLR"]


class LayerwiseLR(Adapter):
    """rate(tensor) = rate * decay^(depth of the head - depth of the tensor), over whatever is trainable.

    The head (and the final norm) has the full rate, the last layer `decay` times it, the one below `decay` squared,
    and the embeddings come last. Works on LoRA tensors as on a fully trained model.

    Source: Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.2 (discriminative fine-tuning).
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    decay: float = Field(default=0.9, gt=0, le=1)
    """Rate of a layer as a share of the one above it."""

    overrides: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Multipliers for tensors by pattern over their names (`*.lora_B.*: 2.0`), in place of the layer's own."""

    def rates(self, rates: Mapping[str, Rate], layers: Layers) -> dict[str, Rate]:
        top = layers.count + 1
        scaled = {
            name: replace(rate, multiplier=rate.multiplier * self.decay ** (top - layers.depth(name)))
            for name, rate in rates.items()
        }
        for pattern, multiplier in self.overrides.items():
            hits = [name for name in rates if fnmatchcase(name, pattern)]
            if not hits:
                raise TargetError(
                    f"layerwise-lr: override {pattern!r} matches no trainable tensor{nearest(pattern, rates)}"
                )
            for name in hits:
                scaled[name] = replace(rates[name], multiplier=rates[name].multiplier * multiplier)
        return scaled
