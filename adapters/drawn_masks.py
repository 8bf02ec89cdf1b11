"""Dropout masks that are drawn again from a seed, so that nobody keeps them."""

import torch
from torch import Tensor

__all__ = ["SHARES", "kept", "seed", "share"]

SHARES = 2**16  # of values that are dropped


def share(dropout: float) -> int:
    """How many of 65,536 values are dropped; some and not all, unless there is no dropout."""
    return min(max(round(dropout * SHARES), 1), SHARES - 1) if dropout else 0


def seed(dropout: float) -> Tensor | None:
    """Of the mask: drawn from torch's own stream, so that a resumed or recomputed pass draws the same."""
    return torch.randint(2**62, ()) if dropout else None


@torch.library.custom_op("onegpu::kept", mutates_args=())
def kept(like: Tensor, seed: Tensor, dropped: int) -> Tensor:
    """1 where a value is kept, 0 where it is dropped, in the shape and dtype of `like`; the same for the same seed.

    An operator of its own, since a compiler can look into no generator. `dropped` of 65,536 are dropped, so that four
    numbers are drawn at once: on a CPU, a third of the time of torch's Bernoulli numbers.
    """
    generator = torch.Generator(like.device).manual_seed(int(seed))
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    numbers = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()].view(like.shape)
    return (numbers >= dropped - SHARES // 2).to(like.dtype)


@kept.register_fake
def _(like: Tensor, seed: Tensor, dropped: int) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
