import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes.data.rows import Rows, read_rows
from onegpu.recipes.data.splits import Split, split

pytestmark = pytest.mark.usefixtures("cache")

Of = Callable[[Sequence[Any]], Rows]


@pytest.fixture
def of(tmp_path: Path) -> Of:
    """`of([1, 2, 2])`: rows that are equal where these are."""
    made: list[Rows] = []

    def write(values: Sequence[Any]) -> Rows:
        path = tmp_path / f"rows-{len(made)}.jsonl"
        path.write_text("".join(json.dumps({"text": str(value)}) + "\n" for value in values))
        made.append(read_rows(path.name, folder=tmp_path, needs=("text",)))
        return made[-1]

    return write


def _texts(rows: Rows, numbers: Sequence[int]) -> set[str]:
    return {rows[number]["text"] for number in numbers}


def _as_before(values: Sequence[Any], share: float, seed: int) -> list[int]:
    """The numbers that were held out for a seed before there was a test side, written down as plainly as can be."""
    unique = list(dict.fromkeys(values))
    shuffled = list(unique)
    random.Random(seed).shuffle(shuffled)
    return sorted(values.index(value) for value in shuffled[: max(1, round(share * len(unique)))])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("values", [list(range(50)), [i * 7 % 20 for i in range(50)]], ids=["different", "copies"])
def test_a_share_holds_out_what_it_always_did(of: Of, values: list[int], share: float, seed: int) -> None:
    rows = of(values)
    found = split(rows, evaluation=share, seed=seed)
    assert found.evaluation == _as_before(values, share, seed)
    held = _texts(rows, found.evaluation)
    assert found.train == [n for n, value in enumerate(values) if str(value) not in held]
    assert found.test == []


def test_pinned(of: Of) -> None:
    assert split(of(range(20)), evaluation=0.25, seed=0).evaluation == [0, 10, 14, 16, 18]
    assert split(of([i * 7 % 20 for i in range(50)]), evaluation=0.25, seed=1).evaluation == [5, 9, 11, 17, 19]


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("sides", [(0.2, 0.2), (0.5, 0.3), (0.1, None), (None, 0.1)])
def test_no_row_is_on_two_sides_even_where_rows_repeat(of: Of, sides: tuple[Any, Any], stratified: bool) -> None:
    values = [i % 40 for i in range(100)]
    rows = of(values)
    strata = ["ab"[v % 2] for v in values] if stratified else None
    found = split(rows, evaluation=sides[0], test=sides[1], seed=2, stratify=strata)
    texts = [_texts(rows, numbers) for numbers in (found.train, found.evaluation, found.test)]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 40
    assert [len(side) for side in texts[1:]] == [round((share or 0) * 40) for share in sides]


def test_neither_held_out_side_moves_the_other(of: Of) -> None:
    rows = of([i % 60 for i in range(80)])
    strata = [str(i % 60 % 3) for i in range(80)]
    for stratify in (None, strata):
        alone = split(rows, evaluation=0.2, seed=0, stratify=stratify)
        found = [split(rows, evaluation=0.2, test=test, seed=0, stratify=stratify) for test in (0.1, 0.4)]
        assert [s.evaluation for s in found] == [alone.evaluation] * 2
        assert set(found[0].test) < set(found[1].test)
        other = split(rows, evaluation=0.4, test=0.1, seed=0, stratify=stratify)
        assert other.test == found[0].test


def test_rows_of_their_own_are_held_out_whole_and_not_trained_on(of: Of) -> None:
    rows, evaluation, test = of([0, 1, 2, 3, 4, 3, 0]), of([3, 99, 3]), of([4, 98])
    found = split(rows, evaluation=evaluation, test=test, seed=0)
    assert found == Split(
        [0, 1, 2, 6],
        [0, 1, 2],
        [0, 1],
        {
            "within train": 1,  # 0 twice
            "train rows also held out, removed": 3,  # 3 twice, and 4
            "evaluation rows also in test, removed": 0,
        },
    )


def test_what_is_tested_on_is_not_evaluated_on(of: Of) -> None:
    found = split(of(range(10)), evaluation=of([1, 50, 51, 50]), test=of([50, 2]), seed=0)
    assert found.evaluation == [0, 2]
    assert found.duplicates["evaluation rows also in test, removed"] == 2
    assert found.train == [0, *range(3, 10)]


@pytest.mark.parametrize("own", ["evaluation", "test"])
def test_a_share_is_cut_from_what_the_other_side_does_not_have(of: Of, own: str) -> None:
    rows, other = of(range(40)), of(range(0, 40, 2))
    share = "test" if own == "evaluation" else "evaluation"
    found = split(rows, seed=0, **{own: other, share: 0.25})  # type: ignore[arg-type]
    cut = getattr(found, share)
    assert len(cut) == 5
    assert all(number % 2 for number in (*cut, *found.train))


def test_a_test_file_moves_no_more_evaluation_rows_than_it_must(of: Of) -> None:
    rows = of(range(100))
    alone = split(rows, evaluation=0.2, seed=0).evaluation
    test = alone[:2] + [n for n in range(100) if n not in alone][:3]
    found = split(rows, evaluation=0.2, test=of(test), seed=0).evaluation
    assert set(alone[2:]) < set(found)


def test_copies_of_a_held_out_share_are_counted(of: Of) -> None:
    found = split(of([0, 0, 0, 1, 1, 1]), evaluation=0.5, seed=0)
    assert (len(found.train), len(found.evaluation)) == (3, 1)
    assert found.duplicates == {"within train": 2, "train rows also held out, removed": 2}


def test_none_holds_out_nothing(of: Of) -> None:
    assert split(of([0, 1, 0]), evaluation=None, seed=0) == Split(
        [0, 1, 2], [], [], {"within train": 1, "train rows also held out, removed": 0}
    )


CLASSES = {"many": 200, "some": 30, "few": 7, "three": 3, "two": 2, "one": 1}


@pytest.mark.parametrize("sides", [(0.1, None), (0.1, 0.1), (0.3, 0.3), (0.01, 0.9), (None, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_on_every_side_in_proportion(of: Of, sides: tuple[Any, Any], seed: int) -> None:
    names = [name for name, count in CLASSES.items() for _ in range(count)]
    random.Random(1).shuffle(names)
    rows = of([f"{name} {number}" for number, name in enumerate(names)])
    found = split(rows, evaluation=sides[0], test=sides[1], seed=seed, stratify=names)
    counts = {side: Counter(names[n] for n in getattr(found, side)) for side in ("train", "evaluation", "test")}
    wanted = {"evaluation": sides[0], "test": sides[1]}
    asked = [side for side, share in wanted.items() if share]
    for name, size in CLASSES.items():
        assert sum(counts[side][name] for side in counts) == size
        if size > len(asked):
            assert all(counts[side][name] for side in ("train", *asked))
        else:
            assert counts["train"][name] == 1
        for side in asked:
            assert abs(counts[side][name] - wanted[side] * size) < 1 or counts["train"][name] == 1


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("side", ["evaluation", "test"])
def test_a_share_outside_of_zero_and_one_is_refused(of: Of, share: float, side: str) -> None:
    with pytest.raises(RecipeError, match=f"{side}: a share lies between 0 and 1"):
        split(of(range(9)), seed=0, **({"evaluation": None} | {side: share}))  # type: ignore[arg-type]


def test_shares_that_leave_nothing_are_refused(of: Of) -> None:
    with pytest.raises(RecipeError, match=r"evaluation and test: shares of 1 leave nothing to train on"):
        split(of(range(9)), evaluation=0.5, test=0.5, seed=0)
    with pytest.raises(DataError, match="of 1 different rows, no row is left to train on"):
        split(of([0, 0]), evaluation=0.5, seed=0)
    with pytest.raises(DataError, match=r"evaluation: 0\.1, test: 0\.1: of 2 different rows, no row is left"):
        split(of([0, 1]), evaluation=0.1, test=0.1, seed=0)


def test_a_side_that_stays_empty_is_refused(of: Of) -> None:
    with pytest.raises(DataError, match="no row is left to train on: all are held out"):
        split(of([0, 1]), evaluation=of([0, 1, 2]), seed=0)
    with pytest.raises(DataError, match="evaluation: no row is left for it"):
        split(of([0, 1]), evaluation=of([5]), test=of([5]), seed=0)
    with pytest.raises(DataError, match="evaluation: no row is left for it: too few of each class"):
        split(of([0, 1]), evaluation=0.5, seed=0, stratify=["a", "b"])
