"""W x + scale B A x as one step of autograd, which costs what its products cost.

Shapes: x: (..., in), W: (out, in), A: (rank, in), B: (out, rank), y: (..., out). With several pairs on one linear, what
they add to W x adds up.

The low-rank product is added into the output of W x while it is multiplied, and likewise in the gradient of x: nothing
as wide as x or y is scaled, added or cast on its own. Kept for the backward pass are x, the rank-sized A x and a seed
for dropout: its mask is drawn again, and a packed weight is dequantised again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .drawn_masks import SHARES, kept, seed, share
from .frozen_linear import FrozenLinear, PackedWeight, floats, floats_again, in_autocast

__all__ = ["LowRankProduct", "adapted", "is_plain", "is_undisturbed"]


class LowRankProduct(NamedTuple):
    """scale B A dropout(x), what one adapter adds to a linear."""

    a: Tensor  # (rank, in), float32
    b: Tensor  # (out, rank), float32
    scale: float
    dropout: float  # 0 outside of training


def is_plain(linear: nn.Module) -> bool:
    """Whether calling a module does nothing but multiply by its weight and add its bias."""
    return type(linear) in (nn.Linear, Conv1D, FrozenLinear) and is_undisturbed(linear)


def is_undisturbed(module: nn.Module) -> bool:
    """Whether calling a module runs the forward pass of its class and nothing else: nobody hooks or replaces it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and not _has_any_global_hook()


def adapted(linear: nn.Module, x: Tensor, products: Sequence[LowRankProduct]) -> Tensor:
    """y = W x + b + sum of scale B A dropout(x), for a plain linear; float or packed."""
    weight, bias = _parts(linear)
    x, weight, bias = in_autocast(x), weight if isinstance(weight, PackedWeight) else in_autocast(weight), bias
    bias = None if bias is None else bias.to(x.dtype) if isinstance(linear, FrozenLinear) else in_autocast(bias)
    settings = tuple((product.scale, share(product.dropout)) for product in products)
    tensors = [t for product in products for t in (product.a, product.b, seed(product.dropout))]
    y: Tensor = _Adapted.apply(x, weight, bias, settings, *tensors)  # type: ignore[no-untyped-call]
    return y


def _parts(linear: nn.Module) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """The weight (out, in) of a plain linear, and its bias (out,)."""
    if isinstance(linear, FrozenLinear):
        return linear.packed, linear.bias
    assert isinstance(linear, (nn.Linear, Conv1D)), type(linear)
    return (linear.weight.T if isinstance(linear, Conv1D) else linear.weight), linear.bias


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor | PackedWeight,  # (out, in)
        bias: Tensor | None,  # (out,)
        settings: tuple[tuple[float, int], ...],  # scale and share of dropped inputs of each product
        *tensors: Tensor | None,  # A, B and seed of each product
    ) -> Tensor:  # (..., out)
        y = F.linear(x, floats(weight, x.dtype), bias).contiguous()
        rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        lows = []
        for product in _products(settings, tensors):
            lows.append(product.inner(rows))
            _add_product(sums, lows[-1], product.b.to(y.dtype).T, product.factor)
        _keep(ctx, x, weight, settings, tensors, lows)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # (..., out)
        x, weight, *rest = ctx.saved_tensors
        lows, tensors = rest[: len(ctx.settings)], rest[len(ctx.settings) :]
        x_needs, weight_needs, bias_needs, _, *needs = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        gx = g @ floats_again(weight if ctx.packed is None else ctx.packed, g) if x_needs else None
        found: list[Tensor | None] = []
        for i, product in enumerate(_products(ctx.settings, tensors)):
            found += product.gradients(g, rows, lows[i], gx, needs[3 * i : 3 * i + 2])
        return (
            None if gx is None else gx.view(*grad.shape[:-1], gx.shape[-1]),
            g.T @ rows if weight_needs and rows is not None else None,
            g.sum(0) if bias_needs else None,
            None,
            *found,
        )


def _keep(
    ctx: Any, x: Tensor, weight: Any, settings: Any, tensors: Sequence[Tensor | None], lows: list[Tensor]
) -> None:
    """What the backward pass will need, and nothing else."""
    x_needs, weight_needs, _, _, *needs = ctx.needs_input_grad
    ctx.settings, ctx.packed = settings, weight if isinstance(weight, PackedWeight) else None
    ctx.save_for_backward(
        x if weight_needs or any(needs[::3]) else None,
        weight if x_needs and isinstance(weight, Tensor) else None,
        *(low if of_b else None for low, of_b in zip(lows, needs[1::3], strict=True)),
        *tensors,
    )


class _Product(NamedTuple):
    """One product inside of the step."""

    a: Tensor
    b: Tensor
    seed: Tensor | None
    scale: float
    dropped: int

    @property
    def factor(self) -> float:
        """The scale, and what makes up for what is dropped."""
        return self.scale / (1 - self.dropped / SHARES)

    def mask(self, like: Tensor) -> Tensor | None:
        return None if self.seed is None else kept(like, self.seed, self.dropped)

    def inner(self, rows: Tensor) -> Tensor:  # (tokens, in) -> (tokens, rank)
        mask = self.mask(rows)
        return F.linear(rows if mask is None else mask.mul_(rows), self.a.to(rows.dtype))

    def gradients(
        self, g: Tensor, rows: Tensor | None, low: Tensor | None, gx: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Those of A, B and the seed; what x has of it is added to gx."""
        g_low = g @ (self.b * self.factor).to(g.dtype)  # (tokens, rank)
        # Not of `rows`: a compiler would see that it is the forward pass's mask, and keep that.
        mask = self.mask(g.new_empty(g.shape[0], self.a.shape[1]))
        if gx is not None:
            _add_to(gx, g_low, self.a.to(gx.dtype), mask)
        gb = (g.T @ low).to(self.b.dtype).mul_(self.factor) if low is not None else None
        if rows is None or not needs[0]:
            return None, gb, None
        return (g_low.T @ (rows if mask is None else mask.mul_(rows))).to(self.a.dtype), gb, None


def _add_to(gx: Tensor, g_low: Tensor, a: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        _add_product(gx, g_low, a, 1.0)
    else:
        gx.addcmul_(g_low @ a, mask)


def _add_product(sums: Tensor, one: Tensor, other: Tensor, factor: float) -> None:
    """sums += factor · one @ other, in place."""
    if torch.compiler.is_compiling():
        torch.ops.onegpu.added_in_place(sums, one, other, factor)
    else:
        sums.addmm_(one, other, alpha=factor)


# Of torch's own method, a compiler makes a sum that is written into a copy. Of an operator defined by its schema
# it does not, and calling one costs less than a `custom_op`.
torch.library.define("onegpu::added_in_place", "(Tensor(a!) sums, Tensor one, Tensor other, float factor) -> ()")


@torch.library.impl("onegpu::added_in_place", "CompositeExplicitAutograd")
def _(sums: Tensor, one: Tensor, other: Tensor, factor: float) -> None:
    sums.addmm_(one, other, alpha=factor)


def _products(settings: Sequence[tuple[float, int]], tensors: Sequence[Any]) -> Iterator[_Product]:
    for i, (scale, dropped) in enumerate(settings):
        a, b, seed = tensors[3 * i : 3 * i + 3]
        yield _Product(a, b, seed, scale, dropped)
