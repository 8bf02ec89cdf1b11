"""softmax(Q Kᵀ · scaling) V over segments of one row, in plain matrix products, as one step of autograd.

Shapes: query: (heads, tokens, size), key and value: (groups, tokens, size), where `each` = heads / groups heads share a
key; segments as in segments.py: queries: (segments, rows), keys: (segments, columns), seen: (segments, 1, rows,
columns).

It goes tile by tile: some segments of like length, some rows of each, and the columns that those see. So there is
little padding, nothing behind a token is multiplied, and memory grows with the tokens, not with their square. Kept for
the backward pass is what came in, and of short segments the weights; those of long ones are computed again. It is an
operator of its own: a compiler would gather and mask element by element.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .drawn_masks import SHARES, kept

__all__ = ["apart", "attend_in_tiles", "kept_of", "tiles_of", "together"]

LARGEST = 2**18  # weights of a tile, of one head
SPARE = 2**14  # weights of a head that a tile may have in vain: another tile would take as long
KEPT = 128  # weights of a head and token that are kept at most: twice what a query takes


Tile = tuple[int, int, int, int, int]
"""(segment, end of segments, row, end of rows, end of columns)."""


def tiles_of(lengths: Sequence[int], first: Sequence[int]) -> list[Tile]:
    """Tiles of segments.

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


def kept_of(tiles: Sequence[Tile], tokens: int) -> int:
    """How many weights of a head are kept for the backward pass: all of them, or none."""
    weights = sum((stop - start) * (end - row) * columns for start, stop, row, end, columns in tiles)
    return weights if weights <= KEPT * tokens else 0


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
    room: Tensor,  # (kept,)
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor]:  # (tokens, heads, size); (heads · kept,)
    """The softmax is computed in float32 and rounded once. `dropped` of 65,536 weights are dropped, as `seed` says.

    The second result are the weights, tile by tile, for the backward pass.
    """
    layout = _Layout.of(query, key, value, queries, keys, places, seen)
    out = query.new_empty(*layout.token.shape, query.shape[2])
    kept_weights, at = _kept(query, room), 0
    for number, tile in enumerate(tiles.tolist()):
        q, k, v = layout.gathered(tile)
        weights = layout.weights(tile, q, k, scaling)
        if len(room):
            kept_weights[at : (at := at + weights.numel())] = weights.view(-1)
        layout.put(out, tile, _dropped(weights, seed, number, dropped) @ v)
    return layout.tokens_of(out), kept_weights


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
    heads, tokens, size = query.shape
    return query.new_empty(tokens, heads, size), _kept(query, room)


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
    seen: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    layout = _Layout.of(query, key, value, queries, keys, places, seen)
    g_out = F.pad(grad.transpose(0, 1).reshape(-1, grad.shape[-1]), (0, 0, 0, 1))  # none of what is padding
    gq = query.new_empty(*layout.token.shape, query.shape[2])
    exact = torch.promote_types(key.dtype, torch.float32)  # tiles add up in it
    gk, gv = (torch.empty(len(t), *keys.shape, t.shape[2], dtype=exact, device=t.device) for t in (key, value))
    written, at = len(queries), len(kept_weights)
    for number, tile in reversed(list(enumerate(tiles.tolist()))):
        q, k, v = layout.gathered(tile)
        if at:
            shape = (len(q), q.shape[1], k.shape[1])
            weights = kept_weights[(at := at - math.prod(shape)) :][: math.prod(shape)].view(shape)
        else:
            weights = layout.weights(tile, q, k, scaling)
        g = g_out.index_select(0, layout.rows(tile)).view(*q.shape[:2], -1)
        g_weights = _dropped(g @ v.mT, seed, number, dropped)
        g_scores = torch._softmax_backward_data(g_weights, weights, -1, weights.dtype)
        layout.put(gq, tile, _scaled(g_scores, k, scaling))
        # Of the tiles of some segments the one of the last rows sees all columns, and what the others find is added.
        put = Tensor.copy_ if tile[0] < written else Tensor.add_
        written = tile[0]
        some = (slice(None), slice(tile[0], tile[1]), slice(tile[4]))
        put(gk[some], _scaled(g_scores.mT, q, scaling).unflatten(0, (len(key), -1)))
        put(gv[some], (_dropped(weights, seed, number, dropped).mT @ g).unflatten(0, (len(key), -1)))
    own = (keys, key_places, shared, readers)
    row = layout.tokens_of(gq).transpose(0, 1).contiguous()
    return row, together(gk.to(key.dtype), *own), together(gv.to(key.dtype), *own)


@_backward.register_fake
def _(grad: Tensor, kept_weights: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, seen, seed, ctx.scaling, ctx.dropped = inputs
    ctx.save_for_backward(output[1], *tensors, seen, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # nor zeros as large as the weights made for them


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    return (*_backward(grad, *ctx.saved_tensors, ctx.scaling, ctx.dropped), *[None] * 12)


attend_in_tiles.register_autograd(_gradients, setup_context=_keep)


class _Layout(NamedTuple):
    """Where the rows of heads and tokens stand in the batched products of a tile."""

    query: Tensor  # (heads · tokens, size)
    key: Tensor  # (groups · tokens, size)
    value: Tensor
    token: Tensor  # (groups, segments, each, rows): the row of `query` there, one behind the last where padding is
    behind: Tensor  # (groups, segments, columns): the row of `key` and `value` there
    place: Tensor  # (tokens, heads): where in `token`, flattened, each is
    seen: Tensor  # (segments or 1, 1, rows, columns)

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, places: Tensor, seen: Any
    ) -> "_Layout":
        (heads, tokens, _), groups, (segments, rows) = query.shape, len(key), queries.shape
        each, numbers = heads // groups, torch.arange(max(tokens, heads, keys.shape[1]), device=keys.device)
        head = numbers[:heads].view(groups, 1, each, 1)
        place = (head // each * segments * each + head % each) * rows  # of a head, at the first token of a segment
        place = place.view(heads) + (places // rows * each * rows + places % rows)[:, None]
        token = torch.full((groups, segments, each, rows), heads * tokens, device=keys.device)
        token.view(-1)[place.T] = numbers[:heads, None] * tokens + numbers[:tokens]
        behind = keys + numbers[:groups, None, None] * tokens
        if seen is None:  # what stands before it in its segment
            seen = (numbers[: keys.shape[1]] <= numbers[:rows, None])[None, None]
        q, k, v = (t.reshape(-1, t.shape[-1]) for t in (query, key, value))
        return cls(q, k, v, token, behind, place, seen)

    def gathered(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Query (n, each · rows, size), key and value (n, columns, size); n is groups · segments."""
        start, stop, row, end, columns = tile
        groups, _, each, _ = self.token.shape
        n = groups * (stop - start)
        q = self.query.index_select(0, self.rows(tile).clamp(max=len(self.query) - 1)).view(n, each * (end - row), -1)
        behind = self.behind[:, start:stop, :columns].flatten()
        k, v = (t.index_select(0, behind).view(n, columns, -1) for t in (self.key, self.value))
        return q, k, v

    def weights(self, tile: Tile, q: Tensor, k: Tensor, scaling: float) -> Tensor:  # (n, each · rows, columns)
        """Those of a tile, each row adding up to 1."""
        start, stop, row, end, columns = tile
        groups, _, each, _ = self.token.shape
        scores = _scaled(q, k.mT, scaling)
        seen = self.seen[slice(start, stop) if len(self.seen) > 1 else slice(None), :, row:end, :columns]
        # Of all heads at once: a mask of one is filled, and its sum with the scores takes less than a fill of them all.
        hidden = scores.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(scores.dtype).min)
        scores.view(groups, stop - start, each, end - row, columns).add_(hidden)
        return scores.softmax(-1)

    def rows(self, tile: Tile) -> Tensor:  # (n · each · rows,)
        """The rows of `query` in a tile, one behind the last where there is padding."""
        start, stop, row, end, _ = tile
        return self.token[:, start:stop, :, row:end].flatten()

    def put(self, out: Tensor, tile: Tile, found: Tensor) -> None:
        """Put what was found for a tile, (n, each · rows, size), into (groups, segments, each, rows, size)."""
        start, stop, row, end, _ = tile
        part = out[:, start:stop, :, row:end]
        part.copy_(found.view(part.shape))

    def tokens_of(self, out: Tensor) -> Tensor:  # (tokens, heads, size)
        """What was put into (groups, segments, each, rows, size), by token."""
        size = out.shape[-1]
        return out.view(-1, size).index_select(0, self.place.flatten()).view(*self.place.shape, size)


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
