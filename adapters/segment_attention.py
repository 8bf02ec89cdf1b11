"""softmax(Q Kᵀ · scaling) V over segments of one row, in plain matrix products, as one step of autograd.

Shapes: query: (heads, tokens, size), key and value: (groups, tokens, size), where `each` = heads / groups heads share a
key; segments as in segments.py: queries: (segments, rows), keys: (segments, columns), seen: (segments, 1, rows,
columns).

It goes tile by tile: some segments of like length, some rows of each, and the columns that those see. So there is
little padding, nothing behind a token is multiplied, and memory grows with the tokens, not with their square. Kept for
the backward pass is what came in; the weights of a tile are computed again. It is an operator of its own: a compiler
would gather and mask element by element.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .drawn_masks import SHARES, kept

__all__ = ["apart", "attend_in_tiles", "tiles_of", "together"]

LARGEST = 2**18  # weights of a tile, of one head
SPARE = 2**14  # weights of a head that a tile may have in vain: another tile would take as long


def tiles_of(lengths: Sequence[int], first: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """Tiles of segments: (segment, end of segments, row, end of rows, end of columns).

    Args:
        lengths: tokens of each segment.
        first: how many keys stand before those of each.
    """
    tiles = []
    for start, stop in _alike(lengths, first):
        rows, before = max(lengths[start:stop]), max(first[start:stop])
        columns = max(n + m for n, m in zip(lengths[start:stop], first[start:stop], strict=True))
        step = max(1, LARGEST // ((stop - start) * columns))
        for row in range(0, rows, step):
            end = min(row + step, rows)
            tiles.append((start, stop, row, end, min(before + end, columns)))
    return tiles


def _alike(lengths: Sequence[int], first: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours of like size, as (start, stop)."""
    start, needed = 0, 0
    for stop in range(1, len(lengths) + 1):
        needed += lengths[stop - 1] * (lengths[stop - 1] + first[stop - 1])
        padded = max(lengths[start:stop]) * (max(lengths[start:stop]) + max(first[start:stop])) * (stop - start)
        if stop - start > 1 and padded - needed > SPARE:
            yield start, stop - 1
            start, needed = stop - 1, lengths[stop - 1] * (lengths[stop - 1] + first[stop - 1])
    yield start, len(lengths)


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
    tiles: Tensor,  # (tiles, 5)
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> Tensor:  # (tokens, heads, size)
    """The softmax is computed in float32 and rounded once. `dropped` of 65,536 weights are dropped, as `seed` says."""
    layout = _Layout.of(query, key, value, queries, keys, places, seen)
    out = query.new_empty(query.shape[1] * len(query) + 1, query.shape[2])  # the last for what is padding
    for number, tile in enumerate(tiles.tolist()):
        weights, _, _, v = layout.weights(tile, scaling)
        found = _dropped(weights, seed, number, dropped) @ v
        out.index_copy_(0, layout.outputs(tile), found.flatten(0, 1))
    return out[:-1].view(query.shape[1], len(query), -1).clone()


@attend_in_tiles.register_fake
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
    tiles: Tensor,
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    layout = _Layout.of(query, key, value, queries, keys, places, seen)
    g_out = F.pad(grad.reshape(-1, grad.shape[-1]), (0, 0, 0, 1))  # none of what is padding
    gq = query.new_empty(query.shape[1] * len(query) + 1, query.shape[2])
    exact = torch.promote_types(key.dtype, torch.float32)  # tiles add up in it
    gk, gv = (torch.zeros(len(t), *keys.shape, t.shape[2], dtype=exact, device=t.device) for t in (key, value))
    for number, tile in enumerate(tiles.tolist()):
        weights, q, k, v = layout.weights(tile, scaling)
        outputs = layout.outputs(tile)
        g = g_out.index_select(0, outputs).view(*q.shape[:2], -1)
        g_weights = _dropped(g @ v.mT, seed, number, dropped)
        g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype)
        gq.index_copy_(0, outputs, _scaled(g_scores, k, scaling).flatten(0, 1))
        some = (slice(None), slice(tile[0], tile[1]), slice(tile[4]))
        gk[some] += _scaled(g_scores.mT, q, scaling).unflatten(0, (len(key), -1))
        gv[some] += (_dropped(weights, seed, number, dropped).mT @ g).unflatten(0, (len(key), -1))
    own = (keys, key_places, shared, readers)
    row = gq[:-1].view(query.shape[1], len(query), -1).transpose(0, 1).contiguous()
    return row, together(gk.to(key.dtype), *own), together(gv.to(key.dtype), *own)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling, ctx.dropped = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.dropped), *[None] * 11)


attend_in_tiles.register_autograd(_gradients, setup_context=_keep)

Tile = tuple[int, int, int, int, int]


class _Layout(NamedTuple):
    """Where the rows of heads and tokens stand in the batched products of a tile."""

    query: Tensor  # (heads · tokens, size)
    key: Tensor  # (groups · tokens, size)
    value: Tensor
    token: Tensor  # (segments, rows): the token of each query, `tokens` where there is padding
    keys: Tensor  # (segments, columns)
    seen: Tensor | None
    groups: int
    each: int

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, places: Tensor, seen: Any
    ) -> "_Layout":
        tokens = query.shape[1]
        token = torch.full_like(queries, tokens)
        token.view(-1)[places] = torch.arange(tokens, device=token.device)
        q, k, v = (t.reshape(-1, t.shape[-1]) for t in (query, key, value))
        return cls(q, k, v, token, keys, seen, len(key), len(query) // len(key))

    def weights(self, tile: Tile, scaling: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights (n, each · rows, columns), query (n, each · rows, size), key and value (n, columns, size).

        n is groups · segments.
        """
        start, stop, row, end, columns = tile
        tokens = len(self.key) // self.groups
        here = self.token[start:stop, row:end].clamp(max=tokens - 1)
        q = self.query.index_select(0, self._heads(here, tokens).flatten())
        q = q.view(self.groups * (stop - start), self.each * (end - row), -1)
        behind = self.keys[start:stop, :columns] + self._numbers(self.groups, tokens)[:, None, None]
        k, v = (t.index_select(0, behind.flatten()).view(len(q), columns, -1) for t in (self.key, self.value))
        scores = _scaled(q, k.mT, scaling)
        by_head = scores.view(self.groups, stop - start, self.each, end - row, columns)
        by_head.masked_fill_(~self._visible(tile), torch.finfo(scores.dtype).min)
        return scores.softmax(-1), q, k, v

    def outputs(self, tile: Tile) -> Tensor:  # (n · each · rows,)
        """Numbers of rows in (tokens · heads, size); the one behind the last where there is padding."""
        start, stop, row, end, _ = tile
        heads = self.groups * self.each
        found = self._heads(self.token[start:stop, row:end] * heads, 1)
        return found.clamp_(max=len(self.query)).flatten()

    def _heads(self, index: Tensor, stride: int) -> Tensor:  # (groups, segments, each, rows)
        """An index of one head, (segments, rows), as that of all of them, which are `stride` apart."""
        heads = self._numbers(self.groups * self.each, stride).view(self.groups, 1, self.each, 1)
        return heads + index[:, None]

    def _numbers(self, count: int, stride: int) -> Tensor:
        return torch.arange(count, device=self.keys.device) * stride

    def _visible(self, tile: Tile) -> Tensor:  # (segments or 1, 1, rows, columns)
        start, stop, row, end, columns = tile
        if self.seen is not None:
            return self.seen[start:stop, :, row:end, :columns]
        place = self._numbers(columns, 1)
        return (place <= place[row:end, None])[None, None]


def _scaled(one: Tensor, other: Tensor, scaling: float) -> Tensor:
    """one @ other · scaling, rounded once."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scaling)


def _dropped(weights: Tensor, seed: Tensor | None, number: int, dropped: int) -> Tensor:
    """With dropout: the mask of a tile follows from the seed and its number."""
    return weights if seed is None else weights * kept(weights, seed + number, dropped) / (1 - dropped / SHARES)


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
