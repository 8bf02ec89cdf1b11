"""`int8`, `nf4`, `fp4`: the base's linears packed by bitsandbytes while weights are read.

bitsandbytes only packs here. What it packed is then adopted by `FrozenLinear`, which dequantises and multiplies.
Heads and output embeddings stay as they are, and so does every tensor that is not the weight of a linear.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from .contract import Adapter, Capabilities, LoadOptions
from .errors import DeviceError, RecipeError
from .frozen_linear import FrozenLinear, PackedWeight, later
from .structure import swap

__all__ = ["FP4", "NF4", "Int8"]


class _Quantiser(Adapter):
    """What the three have in common: load options, and adopting the packed layers afterwards."""

    capabilities: ClassVar[Capabilities] = Capabilities(trains=False, identity_at_start=False, quantises=True)
    kind: ClassVar[str]  # of the packed weights

    @abstractmethod
    def _config(self, keep: list[str]) -> BitsAndBytesConfig:
        """How transformers is told to pack."""

    @abstractmethod
    def _adopt(self, layer: nn.Module) -> PackedWeight | None:
        """What bitsandbytes packed in this layer; None for a layer that is not packed."""

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        if options.device.type not in bnb.supported_torch_devices:
            raise DeviceError(f"bitsandbytes {bnb.__version__} cannot pack weights on {options.device.type!r}")
        adopt: Callable[[nn.Module], None] = self._adopt_all
        return replace(options, quantization_config=self._config(list(keep)), after_load=(*options.after_load, adopt))

    def _adopt_all(self, model: nn.Module) -> None:
        """Put our frozen linear in the place of every layer that bitsandbytes packed."""
        adopted = {layer: packed for layer in model.modules() if (packed := self._adopt(layer)) is not None}
        kinds = {packed.kind for packed in adopted.values()}
        if kinds != {self.kind}:
            found = f"is packed as {', '.join(kinds)} already" if kinds else "has no linear that was packed so"
            raise RecipeError(f"{self.kind} cannot be had: the base {found}")
        biases = {layer: dict(layer.named_parameters()).get("bias") for layer in adopted}
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        ours = {layer: FrozenLinear(packed, biases[layer], dtype) for layer, packed in adopted.items()}
        swap(model, {layer: linear.train(layer.training) for layer, linear in ours.items()})


class Int8(_Quantiser):
    """8-bit base: each row of a weight is rounded to 127 steps of its largest magnitude (vector-wise absmax).

    Weight-only: activations are never rounded and no outlier column is treated apart, so that the result for a row
    does not depend on the other rows of its batch.
    Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 3.1.
    """

    api = 1
    kind = "int8"

    def _config(self, keep: list[str]) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)

    def _adopt(self, layer: nn.Module) -> PackedWeight | None:
        return RowsInt8(layer) if isinstance(layer, Linear8bitLt) else None


class _FourBit(_Quantiser):
    """What the two code books have in common."""

    double_quantisation: bool = True
    """Round the scale of each block of 64 weights to 8 bits too; saves 0.37 bits a weight."""

    def _config(self, keep: list[str]) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double_quantisation,
            llm_int8_skip_modules=keep,
        )

    def _adopt(self, layer: nn.Module) -> PackedWeight | None:
        return Blocks4Bit(layer.weight) if isinstance(layer, Linear4bit) else None


class NF4(_FourBit):
    """4-bit base in NormalFloat: sixteen levels at the quantiles of a normal distribution, one scale per 64 weights.

    Source: Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314, section 3.
    """

    api = 1
    kind = "nf4"


class FP4(_FourBit):
    """4-bit base in floating point (sign, two exponent bits, one mantissa bit), one scale per 64 weights.

    Source: Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314, table 2.
    """

    api = 1
    kind = "fp4"


class _Values(PackedWeight):
    """What bitsandbytes packs: values, and scales beside them."""

    values: Tensor

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self._floats(self.values, dtype)

    def dequantise_again(self, dtype: torch.dtype, gradient: Tensor) -> Tensor:
        return self._floats(later(self.values, gradient), dtype)

    @abstractmethod
    def _floats(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) of these values."""


class RowsInt8(_Values):
    """int8 values (out, in) and one float32 scale a row (out,)."""

    kind = "int8"
    scales: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_buffer("values", layer.weight.data)
        self.register_buffer("scales", layer.weight.SCB / 127)
        self.shape = (self.values.shape[0], self.values.shape[1])

    def _floats(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        # Widened first: torch multiplies int8 by float32 element by element, fifteen times slower on a CPU.
        return values.float().mul_(self.scales[:, None]).to(dtype)


class Blocks4Bit(_Values):
    """Two 4-bit codes a byte, one scale a block of 64; with double quantisation the scales are 8-bit codes too."""

    # values: (out * in / 2, 1) uint8
    scales: Tensor  # (blocks,) float32, or uint8 codes into `scale_levels`
    levels: Tensor  # (16,) float32
    scale_scales: Tensor
    scale_levels: Tensor
    scale_offset: Tensor

    def __init__(self, packed: Any) -> None:
        super().__init__()
        state = packed.quant_state
        self.kind = state.quant_type  # type: ignore[misc]  # one class, two code books
        self.shape = (state.shape[0], state.shape[1])
        self.block_size = state.blocksize
        self.register_buffer("values", packed.data)
        self.register_buffer("scales", state.absmax)
        self.register_buffer("levels", state.code)
        self.nested_block_size = state.state2.blocksize if state.nested else None
        if state.nested:
            self.register_buffer("scale_scales", state.state2.absmax)
            self.register_buffer("scale_levels", state.state2.code)
            self.register_buffer("scale_offset", state.offset)

    def _floats(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        # Blocks run on from row to row. Where a row ends within one, the CPU kernel of 0.50 takes wrong scales, some
        # from beyond the tensor, unless it is given the weight as one row.
        outputs, inputs = self.shape
        state = QuantState(
            absmax=self.scales,
            shape=torch.Size(self.shape if inputs % self.block_size == 0 else (1, outputs * inputs)),
            code=self.levels,
            blocksize=self.block_size,
            quant_type=self.kind,
            dtype=dtype,
        )
        if self.nested_block_size is not None:
            state.nested, state.offset = True, self.scale_offset
            state.state2 = QuantState(
                absmax=self.scale_scales, code=self.scale_levels, blocksize=self.nested_block_size, dtype=torch.float32
            )
        weight: Tensor = bnb.functional.dequantize_4bit(values, state)
        return weight.view(self.shape)
