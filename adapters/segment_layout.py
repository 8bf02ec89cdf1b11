"""Where the queries, keys and weights of segments stand in batched matrix products.

Shapes: query: (heads, tokens, size), key and value: (groups, tokens, size), where `each` = heads / groups heads share a
key; flattened: (tokens · heads, size) and (tokens · groups, size).

Products go tile by tile: some segments of like length, some rows of each, and the columns that those see. So there is
little padding, nothing behind a token is multiplied, and memory grows with the tokens, not with their square.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["NONE", "Layout", "Segments", "Tile", "kept_of", "tiles_of"]

LARGEST = 2**18  # weights of a tile, of one head
SPARE = 2**14  # weights of a head that take as long as the calls for another tile
KEPT = 160  # weights of a head and token that are kept at most: 2.5 times what a query takes, if it has 64 numbers
NONE = 31  # weights of a head, where none are kept: fewer than a tile has, and a length that nothing else is likely to
# have, since a compiler makes code of its own for lengths of 0 and 1, and for lengths that are the same by chance
ALIGNED = 32  # columns of a tile are a multiple: torch's softmax of others in bf16 can take three times as long


class Segments(NamedTuple):
    """Where the tokens of a row stand in the segments that attention looks at."""

    queries: Tensor  # (segments, longest): the token of each query; any token where there is padding
    keys: Tensor  # (segments, longest with what is before it): the token of each key
    places: Tensor  # (tokens,): where in `queries`, flattened, each token is
    key_places: Tensor  # (tokens,): where in `keys`, flattened, the token is in its own segment
    shared: Tensor  # (shared,): tokens that other segments see, too
    readers: Tensor  # (shared, others): where in `keys` those see it; one behind the last place where there are fewer
    tiles: Tensor  # (5 · tiles,): `Corners`, behind one another
    room: Tensor  # (weights of a head that are kept for the backward pass,): its length is all that it says
    seen: Tensor | None  # (segments, 1, queries, keys): what each sees; None where the order of tokens says all


Corners = tuple[int, int, int, int, int]
"""(segment, end of segments, row, end of rows, end of columns) of a tile."""


def tiles_of(lengths: Sequence[int], first: Sequence[int]) -> list[Corners]:
    """Tiles of segments, those of the same segments behind one another.

    Args:
        lengths: tokens of each segment.
        first: how many keys stand before those of each.
    """
    tiles = []
    for start, stop in _alike(lengths, first):
        rows, before = max(lengths[start:stop]), max(first[start:stop])
        columns = _aligned(max(n + m for n, m in zip(lengths[start:stop], first[start:stop], strict=True)))
        step = max(1, LARGEST // ((stop - start) * columns))
        for row in range(0, rows, step):
            end = min(row + step, rows)
            tiles.append((start, stop, row, end, min(_aligned(before + end), columns)))
    return tiles


def kept_of(tiles: Sequence[Corners], tokens: int) -> int:
    """How many weights of a head are kept for the backward pass: all of them, or none, which is `NONE`."""
    weights = sum(_weights(corners) for corners in tiles)
    return weights if weights <= KEPT * tokens else NONE


def _weights(corners: Sequence[int]) -> int:
    start, stop, row, end, columns = corners
    return (stop - start) * (end - row) * columns


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


def _alike(lengths: Sequence[int], first: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours of like size, as (start, stop): those with which all takes the fewest weights.

    None are looked at that hold more than a tile may, nor those of which more is padding than two tiles would cost.
    """
    best = [(0, 0)]  # weights up to the end of each segment, and the start of those that end with it
    for stop in range(1, len(lengths) + 1):
        best.append(min((best[start][0] + weights, start) for start, weights in _ending(stop, lengths, first)))
    groups, stop = [], len(lengths)
    while stop:
        groups.append((best[stop][1], stop))
        stop = best[stop][1]
    return reversed(groups)


def _ending(stop: int, lengths: Sequence[int], first: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each segment from which on those up to `stop` may be beside one another, and the weights that this takes."""
    rows, columns, needed = 0, 0, 0
    for start in reversed(range(stop)):
        own = _aligned(lengths[start] + first[start])
        rows, columns, needed = max(rows, lengths[start]), max(columns, own), needed + lengths[start] * own
        weights = (stop - start) * rows * columns
        if weights - needed > 2 * SPARE or (weights > LARGEST and stop - start > 1):
            return
        yield start, weights + SPARE


class Tile(NamedTuple):
    """Some rows of the segments of a group, and the columns that those see. n: segments · groups of heads."""

    number: int
    at: int  # where its weights are among those that are kept
    shape: tuple[int, int, int]  # (n, rows · each, columns)
    segments: slice
    rows: slice
    queries: Tensor  # (n · rows · each,): rows of the flattened query; any where there is padding
    queries_or_none: Tensor  # the same, one behind the last where there is padding
    hidden: Tensor | None  # (segments, 1, rows, 1, last columns): what is added to scores of the last columns

    @property
    def columns(self) -> int:
        return self.shape[2]

    def of(self, room: Tensor, at: int = 0) -> Tensor:  # (n, rows · each, columns)
        """The part of a flat tensor that is for its weights."""
        n, rows, columns = self.shape
        return room[at : at + n * rows * columns].view(self.shape)

    def part(self, x: Tensor) -> Tensor:  # (n, rows · each, size)
        """Its part of (segments, groups, rows, each, size)."""
        return x[self.segments, :, self.rows].flatten(2, 3).flatten(0, 1)

    def gathered(self, flat: Tensor, index: Tensor) -> Tensor:  # (n, rows · each, size)
        return flat.index_select(0, index).view(*self.shape[:2], -1)

    def hide(self, scores: Tensor) -> None:
        """Make the weights of what a row does not see 0; scores: (n, rows · each, columns)."""
        if self.hidden is None:
            return
        segments, rows = self.segments.stop - self.segments.start, self.rows.stop - self.rows.start
        by_row = scores.view(segments, -1, rows, self.shape[1] // rows, self.columns)
        by_row[..., -self.hidden.shape[-1] :].add_(self.hidden)


class Group(NamedTuple):
    """Segments of like length, and their tiles."""

    segments: slice
    columns: int
    keys: Tensor  # (n · columns,): rows of the flattened key
    tiles: list[Tile]  # the last one sees all columns

    def gathered(self, flat: Tensor) -> Tensor:  # (n, columns, size)
        return flat.index_select(0, self.keys).view(-1, self.columns, flat.shape[-1])

    def part(self, x: Tensor) -> Tensor:  # (n, columns, size)
        """Their part of (segments, groups, columns, size)."""
        return x[self.segments, :, : self.columns].flatten(0, 1)


class Layout(NamedTuple):
    """Where all rows stand. It is the same for all layers that a row of tokens goes through."""

    shape: tuple[int, int, int, int]  # (segments, groups, rows, each)
    key_shape: tuple[int, int, int]  # (segments, groups, columns)
    groups: list[Group]
    rooms: tuple[Tensor, ...]  # for the weights of any tile, of all heads: three that tiles use one after the other
    places: Tensor  # (tokens · heads,): where in `shape`, flattened, each is
    key_places: Tensor  # (tokens · groups,): where in `key_shape`, flattened, each is in its own segment
    shared: Tensor  # (shared · groups,): rows of the flattened key that other segments see, too
    readers: Tensor  # (shared · groups, others): where in `key_shape` those see it; one behind where there are fewer

    @classmethod
    def of(cls, query: Tensor, key: Tensor, segments: Segments) -> "Layout":
        """Made once for a row of tokens, and kept as long as the tensor `queries` of its segments lives.

        It is found by that tensor: the others must always be those that were made with it.
        """
        made, kind = _LAYOUTS.setdefault(segments.queries, {}), (len(query), len(key), query.dtype)
        if kind not in made:
            made[kind] = _laid_out(*kind, segments)
        found: Layout = made[kind]
        return found

    @property
    def several(self) -> bool:
        """Whether some segments have more tiles than one, so that gradients of their keys add up."""
        return any(len(group.tiles) > 1 for group in self.groups)

    def by_token(self, found: Tensor) -> Tensor:  # (tokens, heads, size)
        """What stands in (segments, groups, rows, each, size)."""
        _, groups, _, each = self.shape
        return found.view(-1, found.shape[-1]).index_select(0, self.places).view(-1, groups * each, found.shape[-1])

    def keys_by_token(self, grad: Tensor) -> Tensor:  # (tokens, groups, size)
        """Gradients of what stands in (segments, groups, columns, size), added up in a fixed order."""
        flat = grad.view(-1, grad.shape[-1])
        found = flat.index_select(0, self.key_places)
        if len(self.shared):
            behind = F.pad(flat, (0, 0, 0, 1))  # a row of zeros, for those with fewer readers
            found[self.shared] += behind.index_select(0, self.readers.flatten()).unflatten(0, self.readers.shape).sum(1)
        return found.view(-1, self.key_shape[1], grad.shape[-1])


_LAYOUTS: Any = WeakIdKeyDictionary()


def _laid_out(heads: int, groups: int, dtype: torch.dtype, s: Segments) -> Layout:
    (segments, rows), own_columns, device = s.queries.shape, s.keys.shape[1], s.keys.device
    shape, key_shape = (segments, groups, rows, heads // groups), (segments, groups, _aligned(own_columns))
    group = torch.arange(groups, device=device)
    behind = F.pad(s.keys, (0, key_shape[2] - own_columns))[:, None] * groups + group[:, None]  # in `key_shape`
    corners = s.tiles.view(-1, 5).tolist()
    first = s.key_places[s.queries[:, 0]] % own_columns  # (segments,): keys before its own
    tiles = list(_tiles(corners, _tokens(shape, s.places), len(s.places) * heads, first, dtype))
    return Layout(
        shape,
        key_shape,
        [_group(list(alike), behind) for _, alike in groupby(tiles, key=lambda tile: tile.segments.start)],
        torch.empty(3, max(map(_weights, corners)) * heads, dtype=dtype, device=device).unbind(),
        _places(shape, s.places),
        _key_places(key_shape, own_columns, s.key_places).flatten(),
        (s.shared[:, None] * groups + group).flatten(),
        _key_places(key_shape, own_columns, s.readers).movedim(-1, 1).flatten(0, 1),
    )


def _tokens(shape: tuple[int, int, int, int], places: Tensor) -> Tensor:  # (segments, groups, rows, each)
    """The row of the flattened query that is at each place; one behind the last where there is padding."""
    (segments, groups, rows, each), tokens, device = shape, len(places), places.device
    token = torch.full((segments * rows,), tokens, device=device)
    token[places] = torch.arange(tokens, device=device)
    head = torch.arange(groups * each, device=device).view(groups, 1, each)
    return (token.view(segments, 1, rows, 1) * groups * each + head).clamp(max=tokens * groups * each)


def _places(shape: tuple[int, int, int, int], places: Tensor) -> Tensor:  # (tokens · heads,)
    """Where in (segments, groups, rows, each) the tokens are whose places are in (segments, rows); all flattened."""
    (_, groups, rows, each), device = shape, places.device
    first = places // rows * groups * rows * each + places % rows * each
    head = torch.arange(groups, device=device)[:, None] * rows * each + torch.arange(each, device=device)
    return (first[:, None, None] + head).flatten()


def _key_places(shape: tuple[int, int, int], own_columns: int, places: Tensor) -> Tensor:  # (..., groups)
    """Where in (segments, groups, columns) the keys are whose places are in (segments, own columns); all flattened.

    One behind the last stays one behind the last.
    """
    segments, groups, columns = shape
    segment, column = places // own_columns, places % own_columns
    found = (segment[..., None] * groups + torch.arange(groups, device=places.device)) * columns + column[..., None]
    return found.clamp(max=segments * groups * columns)


def _tiles(
    corners: Sequence[Sequence[int]], tokens: Tensor, count: int, first: Tensor, dtype: torch.dtype
) -> Iterator[Tile]:
    """Tiles.

    Args:
        tokens: the rows of the flattened query, (segments, groups, rows, each).
        count: how many rows that has.
        first: how many keys stand before those of each segment.
    """
    _, groups, _, each = tokens.shape
    at = 0
    for number, (start, stop, row, end, columns) in enumerate(corners):
        segments, rows = slice(start, stop), slice(row, end)
        index = tokens[segments, :, rows].flatten()
        shape = ((stop - start) * groups, (end - row) * each, columns)
        hidden = _hidden(first[segments], rows, columns, dtype)
        yield Tile(number, at, shape, segments, rows, index.clamp(max=count - 1), index, hidden)
        at += math.prod(shape)


def _hidden(first: Tensor, rows: slice, columns: int, dtype: torch.dtype) -> Tensor | None:
    """What hides from some rows what is behind them, and all that is no key: (segments, 1, rows, 1, last columns).

    Args:
        first: how many keys stand before those of each segment.
    """
    seen_by_all = int(first.min()) + rows.start + 1
    start, device = seen_by_all - seen_by_all % ALIGNED, first.device
    if start >= columns:
        return None
    last = first[:, None] + torch.arange(rows.start, rows.stop, device=device)  # that a row sees
    hidden = (torch.arange(start, columns, device=device) > last[..., None])[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)


def _group(tiles: list[Tile], behind: Tensor) -> Group:
    segments, columns = tiles[-1].segments, tiles[-1].columns
    return Group(segments, columns, behind[segments, :, :columns].flatten(), tiles)
