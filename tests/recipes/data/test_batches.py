import numpy as np
import pytest

from onegpu.recipes.data.batches import Cut, Plan, micro_batches, resolve_cut
from onegpu.recipes.tasks import Example


def _plan(examples: int, batch: int, seed: int) -> Plan:
    return Plan(np.zeros(examples, np.int32), (1.0,), batch, seed)


def _examples(*lengths: int) -> list[Example]:
    return [Example(row, [0] * length, [0] * length) for row, length in enumerate(lengths)]


@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (10, 5), (10, 10), (10, 16), (1, 1), (7, 1)])
def test_an_epoch_shows_every_example_once_in_windows_with_a_short_tail(examples: int, batch: int) -> None:
    plan = _plan(examples, batch, 0)
    windows = [plan.window(step) for step in range(plan.windows_per_epoch)]
    assert sorted(index for window in windows for index in window) == list(range(examples))
    assert [len(window) for window in windows[:-1]] == [batch] * (plan.windows_per_epoch - 1)
    assert len(windows[-1]) == (examples % batch or min(batch, examples))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = _plan(50, 50, seed)
        return plan.window(epoch)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_window_follows_from_the_number_of_its_step_alone() -> None:
    straight = [_plan(10, 4, 0).window(step) for step in range(9)]
    assert [_plan(10, 4, 0).window(step) for step in reversed(range(9))] == straight[::-1]


def test_the_epoch_counts_examples_not_windows() -> None:
    plan = _plan(10, 4, 0)
    assert [plan.epoch(step) for step in range(5)] == [0, 0.4, 0.8, 1.0, 1.4]


def test_a_source_of_weight_two_is_seen_twice_an_epoch() -> None:
    plan = Plan(np.array([0, 0, 0, 1, 1]), (2.0, 0.5), effective_batch=3, seed=0)
    assert (plan.examples, plan.windows_per_epoch) == (7, 3)
    seen = [index for step in range(3) for index in plan.window(step)]
    assert sorted(seen)[:6] == [0, 0, 1, 1, 2, 2]
    again = [index for step in range(3, 6) for index in plan.window(step)]
    assert {max(seen), max(again)} == {3, 4}


def test_every_step_has_a_seed_of_its_own() -> None:
    assert len({_plan(10, 4, seed).window_seed(step) for seed in (0, 1) for step in range(100)}) == 200


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_window_is_cut_longest_first_without_losing_any(size: int) -> None:
    examples = _examples(3, 9, 1, 9, 5)
    chunks = micro_batches(examples, size)
    lengths = [len(example.ids) for chunk in chunks for example in chunk]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(example.row for chunk in chunks for example in chunk) == [0, 1, 2, 3, 4]
    assert all(len(chunk) <= size for chunk in chunks)


def test_the_cut_does_not_depend_on_the_order_within_a_window() -> None:
    examples = _examples(3, 9, 1, 9, 5)
    assert micro_batches(examples, 2) == micro_batches(examples[::-1], 2)


@pytest.mark.parametrize(
    ("micro", "effective", "longest", "expected"),
    [
        ("auto", 16, 256, 16),
        ("auto", 16, 1024, 4),
        ("auto", 16, 5000, 1),  # one example always goes through at once
        ("auto", 2, 16, 2),
        (3, 16, 5000, 3),
        (32, 16, 10, 16),
    ],
)
def test_a_pass_takes_what_was_asked_for_or_what_fits(
    micro: int | str, effective: int, longest: int, expected: int
) -> None:
    assert resolve_cut(micro, None, effective_batch=effective, longest=longest, packed=False) == Cut(expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 10, 17, 1000])
def test_a_pass_has_no_more_tokens_than_allowed_but_for_one_example(packed: bool, tokens: int) -> None:
    examples = _examples(3, 9, 1, 9, 5, 2, 2, 7)
    cut = resolve_cut("auto", tokens, effective_batch=8, longest=9, packed=packed)
    chunks = cut(examples)
    assert sorted(example.row for chunk in chunks for example in chunk) == list(range(8))
    for chunk in chunks:
        lengths = [example.size for example in chunk]
        assert len(chunk) == 1 or (sum(lengths) if packed else max(lengths) * len(lengths)) <= tokens


def test_packs_are_as_few_as_best_fit_finds() -> None:
    cut = Cut(8, tokens=10, packed=True)
    assert [[e.size for e in pack] for pack in cut(_examples(3, 7, 6, 4, 8, 2))] == [[8, 2], [7, 3], [6, 4]]
    assert cut(_examples(3, 7, 6, 4, 8, 2)) == cut(_examples(3, 7, 6, 4, 8, 2)[::-1])


def test_packs_have_no_more_examples_than_asked_for() -> None:
    cut = resolve_cut(2, None, effective_batch=8, longest=9, packed=True)
    assert [len(pack) for pack in cut(_examples(3, 9, 1, 9, 5))] == [2, 2, 1]
