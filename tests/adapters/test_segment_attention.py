"""Attention over segments: each as if it stood alone, in values and gradients, whatever its tiles are."""

import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from onegpu.adapters import segment_layout as module
from onegpu.adapters.drawn_masks import kept
from onegpu.adapters.segment_attention import attend_in_tiles
from onegpu.adapters.segment_layout import Layout, tiles_of
from onegpu.adapters.segments import segments_of

HEADS, GROUPS, SIZE = 4, 2, 8
ROWS: list[tuple[list[int], list[int | None]]] = [
    ([5], [None]),
    ([3, 2, 4], [None, None, None]),
    ([3, 3, 2, 1], [None, 0, 0, None]),
    ([9, 2, 1, 7, 3, 40], [None, 0, 0, None, 3, None]),
]


@pytest.fixture(params=[1, 2**6, 2**18], ids=["tiny tiles", "small tiles", "usual tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", request.param)
    monkeypatch.setattr(module, "SPARE", request.param // 4)


def _inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, tokens, SIZE, dtype=dtype, requires_grad=True) for n in (HEADS, GROUPS, GROUPS)]


def _ours(lengths: list[int], before: list[int | None], scaling: float = 0.3) -> Callable[..., Tensor]:
    segments = segments_of(lengths, before)

    def attend(*given: Tensor) -> Tensor:
        found: Tensor = attend_in_tiles(*given, *segments[:-1], None, scaling, 0)[0]
        return found

    return attend


def _alone(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], before: Sequence[int | None]) -> Tensor:
    """One segment after the other, by the formula."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    found = []
    for start, length, other in zip(starts, lengths, before, strict=True):
        own = list(range(start, start + length))
        first = [] if other is None else list(range(starts[other], starts[other] + lengths[other]))
        k, v = (t[:, first + own].repeat_interleave(HEADS // GROUPS, 0) for t in (key, value))
        scores = query[:, own] @ k.mT * 0.3
        hidden = torch.ones(length, len(first) + length, dtype=torch.bool).triu(len(first) + 1)
        found.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(found, 1).transpose(0, 1)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(("lengths", "before"), ROWS)
def test_each_segment_has_what_it_has_alone(lengths: list[int], before: list[int | None]) -> None:
    given = query, key, value = _inputs(sum(lengths))
    weights = torch.randn(sum(lengths), HEADS, SIZE, dtype=torch.float64)
    ours, theirs = _ours(lengths, before)(*given), _alone(query, key, value, lengths, before)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(
        torch.autograd.grad((ours * weights).sum(), given),
        torch.autograd.grad((theirs * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected)


def test_its_gradients_are_right_to_finite_differences() -> None:
    lengths, before = ROWS[2]
    assert gradcheck(_ours(lengths, before), _inputs(sum(lengths)))


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize(("lengths", "before"), ROWS)
def test_in_bf16_it_rounds_like_products_in_bf16(lengths: list[int], before: list[int | None]) -> None:
    given = _inputs(sum(lengths), torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in given]
    ours, theirs = _ours(lengths, before)(*given), _alone(exact[0], exact[1], exact[2], lengths, before)
    along = torch.randn_like(ours)
    mine = (ours, *torch.autograd.grad(ours, given, along))
    for rounded, expected in zip(mine, (theirs, *torch.autograd.grad(theirs, exact, along.double())), strict=True):
        assert (rounded.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize(("lengths", "before"), ROWS)
def test_a_compiler_is_told_what_comes_out(lengths: list[int], before: list[int | None]) -> None:
    given = (*_inputs(sum(lengths)), *segments_of(lengths, before)[:-1], None, 0.3, 0)
    torch.library.opcheck(
        attend_in_tiles, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square() -> None:
    def kept_bytes(tokens: int) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            _ours([tokens], [None])(*_inputs(tokens))
        return sum(sizes)

    assert kept_bytes(2048) <= 8.5 * kept_bytes(256)


@pytest.mark.usefixtures("tiled")
def test_with_dropout_the_mask_follows_from_the_seed() -> None:
    lengths: list[int] = [5, 3]
    segments, given, seed = segments_of(lengths, [None, None]), _inputs(8), torch.tensor(3)

    def attend(*tensors: Tensor) -> Tensor:
        found: Tensor = attend_in_tiles(*tensors, *segments[:-1], seed, 0.3, 2**14)[0]
        return found

    assert torch.equal(attend(*given), attend(*given))
    assert gradcheck(attend, given)
    weights = torch.ones(2 * GROUPS, 10, module.ALIGNED, dtype=torch.float64)
    assert 0 < 1 - kept(weights, seed, 2**14).mean() < 0.5
    ones = [given[0], given[1], torch.ones_like(given[2])]
    assert not torch.allclose(attend(*ones), torch.ones(8, HEADS, SIZE, dtype=torch.float64))


def test_values_may_have_another_size_than_keys() -> None:
    lengths, before = ROWS[2]
    query, key, value = _inputs(sum(lengths))
    given = query, key, value[..., :3].detach().requires_grad_()
    torch.testing.assert_close(_ours(lengths, before)(*given), _alone(*given, lengths, before))
    assert gradcheck(_ours(lengths, before), given)


# --- layout


def test_it_is_made_once_for_a_row_of_tokens_and_forgotten_with_it() -> None:
    query, key, _ = _inputs(5)
    segments = segments_of([3, 2], [None, None])

    first = Layout.of(query, key, segments)
    assert Layout.of(query, key, segments) is first
    assert Layout.of(query.half(), key, segments) is not first
    before = len(module._LAYOUTS)
    del segments
    assert len(module._LAYOUTS) == before - 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_all_layers_and_their_backward_passes_share_it(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def laid_out(*args: Any) -> Any:
        made.append(args)
        return plainly(*args)

    plainly = module._laid_out
    monkeypatch.setattr(module, "_laid_out", laid_out)
    lengths, before = ROWS[2]
    layer, given = _ours(lengths, before), _inputs(sum(lengths))
    found = given
    for _ in range(2):
        y = checkpoint(layer, *found, use_reentrant=False) if checkpointed else layer(*found)
        found = [y.transpose(0, 1), *given[1:]]
    found[0].sum().backward()
    assert len(made) == 1


def test_a_tile_is_no_larger_than_the_bound_and_sees_hardly_a_column_in_vain() -> None:
    tiles = tiles_of([2000], [0])
    assert len(tiles) > 1
    assert [tile[2] for tile in tiles[1:]] == [tile[3] for tile in tiles[:-1]]
    assert tiles[-1][3] == 2000
    assert all(0 <= columns - end < module.ALIGNED for _, _, _, end, columns in tiles)
    for found in (tiles, tiles_of([295] * 3, [0] * 3)):
        assert all((stop - start) * (end - row) * columns <= module.LARGEST for start, stop, row, end, columns in found)


def test_the_columns_of_tiles_are_aligned() -> None:
    lengths, before = ROWS[3]
    first = [0 if other is None else lengths[other] for other in before]
    assert all(tile[4] % module.ALIGNED == 0 for tile in tiles_of(lengths, first))


def test_segments_of_unlike_length_are_in_different_tiles() -> None:
    assert tiles_of([10, 9, 8], [0, 0, 0]) == [(0, 3, 0, 10, 32)]
    assert [tile[:2] for tile in tiles_of([300, 290, 20, 10], [0, 0, 0, 0])] == [(0, 2), (2, 4)]


def test_segments_share_tiles_where_that_takes_the_fewest_weights() -> None:
    """Counting a tile as so many weights as take its time; against all ways to divide the segments."""
    chance = random.Random(0)
    divided = set()
    for _ in range(60):
        lengths = [chance.randrange(1, 400) for _ in range(7)]
        first = [chance.choice([0, 30, 200]) for _ in lengths]
        chosen = sorted({tile[:2] for tile in tiles_of(lengths, first)})
        divided.add(len(chosen))
        costs = {}
        for cuts in itertools.product([False, True], repeat=6):
            ends = [0, *(i for i, cut in enumerate(cuts, 1) if cut), 7]
            groups = list(itertools.pairwise(ends))
            weights = [_weights(lengths[a:b], first[a:b]) for a, b in groups]
            if all(b - a == 1 or n <= module.LARGEST for (a, b), n in zip(groups, weights, strict=True)):
                costs[tuple(groups)] = sum(weights) + module.SPARE * len(groups)
        assert costs[tuple(chosen)] == min(costs.values())
    assert len(divided) > 1


def _weights(lengths: list[int], first: list[int]) -> int:
    columns: int = max(map(operator.add, lengths, first))
    return len(lengths) * max(lengths) * -(-columns // module.ALIGNED) * module.ALIGNED


def test_many_short_segments_are_laid_out_in_time_that_grows_with_them() -> None:
    looked_at = sum(1 for stop in range(1, 2001) for _ in module._ending(stop, [40] * 2000, [10] * 2000))
    assert looked_at <= 2000 * module.LARGEST // (40 * 64)  # so many are in a tile; all that are before are 2,000,000


def test_a_tile_has_no_more_columns_than_there_are_keys() -> None:
    assert tiles_of([40, 4, 20], [0, 40, 40]) == [(0, 3, 0, 40, 64)]
