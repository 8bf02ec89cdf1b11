import time
from collections import Counter

import numpy as np
import pytest
import torch

from onegpu.recipes.data.order import epoch_length, epoch_order


def _sources(*sizes: int) -> list[int]:
    return [source for source, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 3)])
def test_with_equal_weights_it_is_the_permutation_that_torch_draws(seed: int, epoch: int) -> None:
    expected = torch.randperm(60, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    assert epoch_order([0] * 60, [1.0], seed=seed, epoch=epoch) == expected
    assert epoch_order(_sources(10, 30, 20), [1.0, 1.0, 1.0], seed=seed, epoch=epoch) == expected


@pytest.mark.parametrize("epoch", range(3))
def test_a_whole_weight_sees_each_row_that_often(epoch: int) -> None:
    seen = Counter(epoch_order(_sources(4, 5), [2.0, 3.0], seed=0, epoch=epoch))
    assert seen == {**dict.fromkeys(range(4), 2), **dict.fromkeys(range(4, 9), 3)}


def test_half_a_weight_sees_one_half_and_then_the_other() -> None:
    epochs = [epoch_order(_sources(10, 8), [0.5, 1.0], seed=3, epoch=epoch) for epoch in range(4)]
    halves = [{n for n in order if n < 10} for order in epochs]
    assert [len(order) for order in epochs] == [5 + 8] * 4
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(10))
    assert halves[0] not in (halves[2], halves[3])  # the next two are drawn anew


def test_the_rest_of_a_weight_is_drawn_beside_its_whole_part() -> None:
    for epoch in range(3):
        seen = Counter(epoch_order(_sources(8), [2.25], seed=0, epoch=epoch))
        assert sorted(seen.values()) == [2] * 6 + [3] * 2


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 0.7, 0.99])
def test_no_row_is_seen_twice_by_a_weight_below_one_and_all_are_seen_in_the_end(weight: float) -> None:
    epochs = [epoch_order(_sources(11), [weight], seed=1, epoch=epoch) for epoch in range(200)]
    assert all(len(set(order)) == len(order) for order in epochs)
    counts = Counter(n for order in epochs for n in order)
    assert min(counts.values()) > 0.5 * 200 * weight


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (0.001, 1.5), (1.2, 3.7)])
@pytest.mark.parametrize("sizes", [(5, 7), (1, 1), (0, 3), (100, 1)])
def test_every_epoch_is_as_long_as_announced(weights: tuple[float, float], sizes: tuple[int, int]) -> None:
    length = epoch_length(_sources(*sizes), weights)
    assert {len(epoch_order(_sources(*sizes), weights, seed=0, epoch=e)) for e in range(6)} == {length}
    for source, size in enumerate(sizes):
        seen = [n for n in epoch_order(_sources(*sizes), weights, seed=0, epoch=0) if _sources(*sizes)[n] == source]
        assert bool(seen) == bool(size)  # a small weight of a small source is not rounded away


def test_rows_of_a_source_need_not_stand_together() -> None:
    assert sorted(epoch_order([1, 0, 1, 0], [1.0, 2.0], seed=0, epoch=0)) == [0, 0, 1, 2, 2, 3]


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    orders = [epoch_order(_sources(6, 6), [0.5, 1.5], seed=s, epoch=e) for s, e in ((5, 2), (5, 2), (5, 3), (6, 2))]
    assert orders[0] == orders[1] == [7, 9, 10, 11, 6, 8, 1, 10, 2, 11, 5, 7]
    assert orders[0] not in orders[2:]


def test_a_million_rows_are_quick() -> None:
    sources = np.repeat([0, 1], 500_000)
    start = time.perf_counter()
    assert len(epoch_order(sources, [0.5, 2.0], seed=0, epoch=1)) == 1_250_000
    assert time.perf_counter() - start < 3
