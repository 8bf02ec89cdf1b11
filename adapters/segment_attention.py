"""softmax(Q Kᵀ · scaling) V over segments of one row, in plain matrix products, as one step of autograd.

Shapes: query: (heads, tokens, size), key and value: (groups, tokens, size), where heads / groups heads share a key;
segments as in segments.py: queries: (segments, rows), keys: (segments, columns), seen: (segments, 1, rows, columns).
Laid out, n = groups · segments, and `each` heads share a key: q: (n, each, rows, size), k and v: (n, columns, size).

Kept for the backward pass is what came in: segments are laid out, and weights are computed, again. A block of rows has
its weights at a time, so that memory grows with the tokens and not with their square. It is an operator of its own: a
compiler would gather and mask element by element.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .drawn_masks import SHARES, kept

__all__ = ["apart", "segment_attention", "together"]

BLOCK = 2**23  # weights of a block
FEWEST = 32  # rows of a block


@torch.library.custom_op("onegpu::segment_attention", mutates_args=())
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,  # (tokens,)
    key_places: Tensor,  # (tokens,)
    shared: Tensor,  # (shared,)
    readers: Tensor,  # (shared, others)
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> Tensor:  # (tokens, heads, size)
    """The softmax is computed in float32 and rounded once. `dropped` of 65,536 weights are dropped, as `seed` says."""
    q, k, v = _laid_out(query, key, value, queries, keys)
    out = torch.empty_like(q)
    for rows, columns in _blocks(q, k, seen):
        weights = _weights(q[:, :, rows], k[:, :columns], _visible(seen, rows, columns, q), scaling)
        weights = _dropped(weights, seed, rows, dropped)
        out[:, :, rows] = (weights @ v[:, :columns]).unflatten(1, (q.shape[1], -1))
    return _in_row(out, queries, places)


@segment_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    heads, tokens, size = query.shape
    return query.new_empty(tokens, heads, size)


@torch.library.custom_op("onegpu::segment_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,  # (tokens, heads, size)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,
    key_places: Tensor,
    shared: Tensor,
    readers: Tensor,
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    q, k, v = _laid_out(query, key, value, queries, keys)
    g = grad.new_zeros(queries.numel(), *grad.shape[1:]).index_copy_(0, places, grad)
    g = _by_group(g.unflatten(0, queries.shape).permute(2, 0, 1, 3), len(key))  # as q
    gq, gk, gv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for rows, columns in _blocks(q, k, seen):
        here = q[:, :, rows].flatten(1, 2), k[:, :columns], g[:, :, rows].flatten(1, 2)
        weights = _weights(q[:, :, rows], here[1], _visible(seen, rows, columns, q), scaling)
        used = _dropped(weights, seed, rows, dropped)
        gv[:, :columns] += used.mT @ here[2]
        g_weights = _dropped(here[2] @ v[:, :columns].mT, seed, rows, dropped)
        g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype)
        gq[:, :, rows] = _scaled(g_scores, here[1], scaling).unflatten(1, (q.shape[1], -1))
        gk[:, :columns] += _scaled(g_scores.mT, here[0], scaling)
    row = _in_row(gq, queries, places).transpose(0, 1).contiguous()
    own = (keys, key_places, shared, readers)
    return row, *(together(t.to(key.dtype).unflatten(0, (len(key), -1)), *own) for t in (gk, gv))


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.dropped = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.dropped), *[None] * 10)


segment_attention.register_autograd(_gradients, setup_context=_keep)


def _laid_out(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    return _by_group(apart(query, queries), len(key)), *(apart(t, keys).flatten(0, 1) for t in (key, value))


def _by_group(laid_out: Tensor, groups: int) -> Tensor:
    """(heads, segments, rows, size) -> (n, each, rows, size)."""
    return laid_out.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _in_row(laid_out: Tensor, queries: Tensor, places: Tensor) -> Tensor:
    """(n, each, rows, size) -> (tokens, heads, size)."""
    by_group = laid_out.unflatten(0, (-1, len(queries)))  # (groups, segments, each, rows, size)
    return by_group.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1).index_select(0, places)


def _blocks(q: Tensor, k: Tensor, seen: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Rows whose weights are there at once, and how many columns those see."""
    n, each, rows, _ = q.shape
    step = max(FEWEST, BLOCK // (n * each * k.shape[1]))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), stop if seen is None else k.shape[1]


def _visible(seen: Tensor | None, rows: slice, columns: int, q: Tensor) -> Tensor:
    """What a block sees: (segments or 1, 1, rows, columns)."""
    if seen is not None:
        return seen[:, :, rows, :columns]
    place = torch.arange(columns, device=q.device)
    return (place <= place[rows, None])[None, None]


def _weights(q: Tensor, k: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """softmax(q kᵀ · scaling): (n, each · rows, columns)."""
    scores = _scaled(q.flatten(1, 2), k.mT, scaling)
    by_head = scores.view(-1, len(visible), *q.shape[1:3], k.shape[1])  # (groups, segments, each, rows, columns)
    by_head.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _scaled(one: Tensor, other: Tensor, scaling: float) -> Tensor:
    """one @ other · scaling, rounded once."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scaling)


def _dropped(weights: Tensor, seed: Tensor | None, rows: slice, dropped: int) -> Tensor:
    """With dropout: the mask of a block follows from the seed and its first row."""
    if seed is None:
        return weights
    return weights * kept(weights, seed + rows.start, dropped) / (1 - dropped / SHARES)


def apart(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of a row, (heads, tokens, size), as segments: (heads, segments, places, size)."""
    return x.index_select(1, index.flatten()).unflatten(1, index.shape)


def together(grad: Tensor, index: Tensor, own: Tensor, shared: Tensor, readers: Tensor) -> Tensor:
    """Gradients of segments, (heads, segments, places, size) or flatter, as those of tokens: (heads, tokens, size)."""
    flat = grad.reshape(len(grad), index.numel(), grad.shape[-1])
    found = flat.index_select(1, own)
    if len(shared):
        behind = F.pad(flat, (0, 0, 0, 1))  # a place that holds zeros, for those with fewer readers
        found[:, shared] += behind.index_select(1, readers.flatten()).unflatten(1, readers.shape).sum(2)
    return found
