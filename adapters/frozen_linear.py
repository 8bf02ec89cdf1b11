"""Our one frozen linear over packed weights: dequantise, multiply in the compute dtype.

Quantised bases are storage. Whatever packed the weights, every packed linear of a model, adapted or not, runs through
this module: the same arithmetic in training and in evaluation, on CPU and CUDA. The packer's own forward is never
called, because bitsandbytes' 4-bit one repacks weights in place on some CPUs during evaluation (gradients after that
are wrong), and its int8 one picks outlier columns by batch (so splitting a batch changes the gradient).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FrozenLinear", "PackedWeight", "floats", "floats_again", "in_autocast", "later", "packed_as"]


class PackedWeight(nn.Module, ABC):
    """A weight (out, in) in a packed form, held in buffers. Subclass per storage format."""

    kind: ClassVar[str]  # what manifests and reports call this storage
    shape: tuple[int, int]  # (out, in)

    @abstractmethod
    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`; made anew at each call, never kept."""

    def dequantise_again(self, dtype: torch.dtype, gradient: Tensor) -> Tensor:
        """The same for a backward pass, made of what is packed and, by `later`, not before the gradient is there.

        A compiler sees that both passes dequantise the same, and would keep the whole base in floats for the second.
        """
        return self.dequantise(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """Move, but never cast: `model.bfloat16()` would otherwise round the scales and change the base."""
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self


class FrozenLinear(nn.Linear):
    """y = x Wᵀ + b with W packed and frozen.

    Autograd keeps the packed weight, not the dequantised one: the backward pass dequantises again, so that a whole
    model never exists in floats. It is a linear like any other to whoever reads its `weight`, which is made anew at
    each look: what is written into that is lost, so adapters that would change it declare so.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.bias = bias  # type: ignore[assignment]  # torch's own stubs forget that there may be none
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # (out, in)
        """The weight in floats, as a tensor of its own."""
        return self.packed.dequantise(self.dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x = in_autocast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _FrozenProduct.apply(x, self.packed, bias)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.packed.kind}"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:  # (..., in) -> (..., out)
        ctx.packed = packed
        return F.linear(x, floats(packed, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # (..., out) -> (..., in)
        x_needs, _, bias_needs = ctx.needs_input_grad
        gx = grad @ floats_again(ctx.packed, grad) if x_needs else None
        return gx, None, grad.reshape(-1, grad.shape[-1]).sum(0) if bias_needs else None


def floats(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:  # (out, in)
    """A weight to multiply by; a packed one is dequantised for this one product."""
    return weight if isinstance(weight, Tensor) else weight.dequantise(dtype)


def floats_again(weight: Tensor | PackedWeight, gradient: Tensor) -> Tensor:  # (out, in)
    """The same in a backward pass, in the dtype of the gradient that comes in."""
    return weight if isinstance(weight, Tensor) else weight.dequantise_again(gradient.dtype, gradient)


def later(packed: Tensor, gradient: Tensor) -> Tensor:
    """What is packed, as a compiler has it only when there is a gradient."""
    copied: Tensor = torch.ops.onegpu.later(packed, gradient) if torch.compiler.is_compiling() else packed
    return copied


torch.library.define("onegpu::later", "(Tensor packed, Tensor gradient) -> Tensor")


@torch.library.impl("onegpu::later", "CompositeExplicitAutograd")
def _(packed: Tensor, gradient: Tensor) -> Tensor:
    return packed.clone()


@torch.library.register_fake("onegpu::later")  # type: ignore[untyped-decorator]
def _(packed: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(packed)


def in_autocast(tensor: Tensor) -> Tensor:
    """In the dtype that autocast multiplies in, where it is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


def packed_as(model: nn.Module) -> str | None:
    """How the base's linears are packed (`nf4`, ...), or None for a float base."""
    return next((m.packed.kind for m in model.modules() if isinstance(m, FrozenLinear)), None)
