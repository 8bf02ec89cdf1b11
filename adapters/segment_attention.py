"""softmax(Q Kᵀ · scaling) V over segments of one row, in plain matrix products, as one step of autograd.

Shapes: query: (heads, tokens, size), key and value: (groups, tokens, size); segments and tiles: segment_layout.py.

Kept for the backward pass is what came in, and of short segments the weights; those of long ones are computed again. It
is an operator of its own: a compiler would gather and mask element by element.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .drawn_masks import SHARES, kept
from .segment_layout import NONE, Layout, Segments, Tile

__all__ = ["apart", "attend_in_tiles", "together"]


@torch.library.custom_op("onegpu::segment_attention", mutates_args=())
def attend_in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,  # (tokens,)
    key_places: Tensor,  # (tokens,)
    shared: Tensor,  # (shared,)
    readers: Tensor,  # (shared, others)
    tiles: Tensor,  # (5 · tiles,)
    room: Tensor,  # (kept,)
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor]:  # (tokens, heads, size); (heads · kept,)
    """The softmax is computed in float32 and rounded once. `dropped` of 65,536 weights are dropped, as `seed` says.

    The second result are the weights, tile by tile, for the backward pass; nothing that counts, if none are kept.
    """
    segments = Segments(queries, keys, places, key_places, shared, readers, tiles, room, None)
    layout = Layout.of(query, key, segments)
    flat_query, flat_key, flat_value = map(_flat, (query, key, value))
    out = query.new_empty(*layout.shape, value.shape[2])
    kept_weights, (scores, spare, _) = _kept(query, room), layout.rooms
    for group in layout.groups:
        k, v = group.gathered(flat_key), group.gathered(flat_value)
        for tile in group.tiles:
            weights = tile.of(kept_weights, tile.at) if len(room) > NONE else tile.of(spare)
            _attend(tile, tile.gathered(flat_query, tile.queries), k, scaling, tile.of(scores), weights)
            torch.bmm(_dropped(weights, seed, tile, dropped), v[:, : tile.columns], out=tile.part(out))
    return layout.by_token(out), kept_weights


def _kept(query: Tensor, room: Tensor) -> Tensor:
    return query.new_empty(query.shape[0] * room.shape[0])  # not `len`, which a compiler would take for a constant


@attend_in_tiles.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,
    key_places: Tensor,
    shared: Tensor,
    readers: Tensor,
    tiles: Tensor,
    room: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2]), _kept(query, room)


@torch.library.custom_op("onegpu::segment_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,  # (tokens, heads, size)
    kept_weights: Tensor,  # (heads · kept,)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,
    key_places: Tensor,
    shared: Tensor,
    readers: Tensor,
    tiles: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (tokens, heads, size), (tokens, groups, size), (tokens, groups, size)
    """Gradients of query, key and value."""
    segments = Segments(queries, keys, places, key_places, shared, readers, tiles, kept_weights, None)
    layout = Layout.of(query, key, segments)
    flat_query, flat_key, flat_value = map(_flat, (query, key, value))
    flat_grad = F.pad(grad.reshape(-1, grad.shape[-1]), (0, 0, 0, 1))  # none of what is padding
    gq = query.new_empty(*layout.shape, query.shape[2])
    exact = torch.promote_types(key.dtype, torch.float32) if layout.several else key.dtype  # tiles add up in it
    gk, gv = (t.new_empty(*layout.key_shape, t.shape[2], dtype=exact) for t in (key, value))
    for group in layout.groups:
        k, v = group.gathered(flat_key), group.gathered(flat_value)
        for tile in reversed(group.tiles):
            first = tile is group.tiles[-1]
            q, g = tile.gathered(flat_query, tile.queries), tile.gathered(flat_grad, tile.queries_or_none)
            weights, g_weights, g_scores = map(tile.of, layout.rooms)
            if len(kept_weights) > NONE * len(query):
                weights = tile.of(kept_weights, tile.at)
            else:
                _attend(tile, q, k, scaling, g_weights, weights)  # where scores are, too, before their gradients
            torch.bmm(g, v[:, : tile.columns].mT, out=g_weights)
            g_weights = _dropped(g_weights, seed, tile, dropped)
            torch.ops.aten._softmax_backward_data.out(g_weights, weights, -1, weights.dtype, grad_input=g_scores)
            _scaled(g_scores, k[:, : tile.columns], scaling, out=tile.part(gq))
            _add(group.part(gk), g_scores.mT, q, scaling, first=first)
            _add(group.part(gv), _dropped(weights, seed, tile, dropped).mT, g, 1.0, first=first)
    gk, gv = (layout.keys_by_token(g.to(key.dtype)) for g in (gk, gv))
    return layout.by_token(gq), gk, gv


@_backward.register_fake
def _(grad: Tensor, kept_weights: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, seed, ctx.scaling, ctx.dropped = inputs
    ctx.save_for_backward(output[1], *tensors, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nor zeros as large as the weights made for them


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    found = _backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.dropped)
    return (*(g.transpose(0, 1) for g in found), *[None] * 11)


attend_in_tiles.register_autograd(_gradients, setup_context=_keep)


def _flat(x: Tensor) -> Tensor:
    """(heads, tokens, size) as (tokens · heads, size), which is how a projection has put it into memory."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _attend(tile: Tile, q: Tensor, k: Tensor, scaling: float, scores: Tensor, weights: Tensor) -> None:
    """Fill in the weights of a tile, each row adding up to 1."""
    _scaled(q, k[:, : tile.columns].mT, scaling, out=scores)
    tile.hide(scores)
    torch.softmax(scores, -1, out=weights)


def _scaled(one: Tensor, other: Tensor, scaling: float, out: Tensor) -> None:
    """one @ other · scaling, rounded once."""
    torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scaling, out=out)


def _dropped(weights: Tensor, seed: Tensor | None, tile: Tile, dropped: int) -> Tensor:
    """With dropout: the mask of a tile follows from the seed and its number."""
    return weights if seed is None else weights * kept(weights, seed + tile.number, dropped) / (1 - dropped / SHARES)


def _add(sums: Tensor, one: Tensor, other: Tensor, scaling: float, *, first: bool) -> None:
    """sums += one @ other · scaling, (n, columns, size), of as many columns as there are; the first sets them all."""
    if first and sums.dtype == one.dtype:
        _scaled(one, other, scaling, out=sums)
        return
    found = one.new_empty(*one.shape[:2], other.shape[2])
    _scaled(one, other, scaling, out=found)
    if first:
        sums.copy_(found)
    else:
        sums[:, : found.shape[1]] += found


def apart(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of a row, (heads, tokens, size), as segments: (heads, segments, places, size)."""
    found: Tensor = x.index_select(1, index.flatten()).unflatten(1, index.shape)
    return found


def together(grad: Tensor, index: Tensor, own: Tensor, shared: Tensor, readers: Tensor) -> Tensor:
    """Gradients of segments, (heads, segments, places, size), as those of tokens: (heads, tokens, size)."""
    flat = grad.reshape(len(grad), index.numel(), grad.shape[-1])
    found = flat.index_select(1, own)
    if len(shared):
        behind = F.pad(flat, (0, 0, 0, 1))  # a place that holds zeros, for those with fewer readers
        found[:, shared] += behind.index_select(1, readers.flatten()).unflatten(1, readers.shape).sum(2)
    return found
