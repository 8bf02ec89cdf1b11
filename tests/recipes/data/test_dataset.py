import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import DataError, OnegpuError, RecipeError
from onegpu.recipes import Loaded, preflight
from onegpu.recipes.data.dataset import Dataset, Gathered, encode, gather
from onegpu.recipes.tasks import Reader

Row = dict[str, Any]


def _talk(number: int) -> Row:
    return {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}!"}]}


ALONE: Row = {"messages": [{"role": "user", "content": "alone"}]}


@pytest.fixture
def of(chat_recipe: Callable[..., Loaded], jsonl: Callable[..., Path]) -> Callable[..., Loaded]:
    """`of(rows, evaluation=0.2)`: a recipe over these rows."""

    def load(rows: Sequence[Row], *, train: Row | None = None, **task: Any) -> Loaded:
        return chat_recipe(task={"data": str(jsonl(rows, "these.jsonl"))} | task, train=train)

    return load


def _encoded(loaded: Loaded, reader: Reader) -> Dataset:
    return encode(loaded, gather(loaded), reader)


def _side(gathered: Gathered, name: str) -> list[Row]:
    rows, numbers = gathered.side(name)
    return [rows[number] for number in numbers]


def _content(rows: list[Row]) -> set[str]:
    return {json.dumps(row) for row in rows}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_is_on_both_sides_even_where_rows_repeat(of: Callable[..., Loaded], share: float, seed: int) -> None:
    rows = [_talk(i % 20) for i in range(50)]
    gathered = gather(of(rows, evaluation=share, train={"seed": seed}))
    train, held_out = (_content(_side(gathered, name)) for name in ("train", "evaluation"))
    assert train | held_out == _content(rows)
    assert train.isdisjoint(held_out)
    assert len(held_out) == len(gathered.split.evaluation) == max(1, round(share * 20))


def test_the_split_follows_from_the_seed(of: Callable[..., Loaded]) -> None:
    rows = [_talk(i) for i in range(40)]
    sides = [gather(of(rows, evaluation=0.2, train={"seed": seed})).split.evaluation for seed in (0, 0, 1)]
    assert sides[0] == sides[1] != sides[2]


def test_a_file_is_held_out_whole_and_its_rows_are_not_trained_on(
    of: Callable[..., Loaded], jsonl: Callable[..., Path]
) -> None:
    held = jsonl([_talk(3), _talk(99)], "held.jsonl")
    gathered = gather(of([_talk(i) for i in range(5)], evaluation=str(held)))
    assert _side(gathered, "evaluation") == [_talk(3), _talk(99)]
    assert _side(gathered, "train") == [_talk(i) for i in (0, 1, 2, 4)]


def test_none_holds_out_nothing(of: Callable[..., Loaded]) -> None:
    split = gather(of([_talk(0), _talk(1)], evaluation="none")).split
    assert (len(split.train), len(split.evaluation), len(split.test)) == (2, 0, 0)


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0, -0.1, 1.5])
def test_a_share_outside_of_zero_and_one_is_refused(of: Callable[..., Loaded], share: float) -> None:
    with pytest.raises(RecipeError, match="a share lies between 0 and 1"):
        gather(of([_talk(0), _talk(1)], evaluation=share))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(of: Callable[..., Loaded]) -> None:
    with pytest.raises(DataError, match="no row is left to train on"):
        gather(of([_talk(0), _talk(0)], evaluation=0.5))


def test_a_few_unusable_rows_are_dropped_and_listed_by_their_number_in_the_data(
    of: Callable[..., Loaded], reader: Reader
) -> None:
    rows = [_talk(i) for i in range(60)]
    rows[17] = rows[41] = ALONE
    dataset = _encoded(of(rows, evaluation=0.3), reader)
    assert set(dataset.dropped) == {"no assistant turn"}
    assert "these.jsonl:18" in dataset.dropped["no assistant turn"]
    assert 17 not in {example.row for example in (*dataset.train, *dataset.evaluation)}


def test_examples_carry_the_number_of_their_row(of: Callable[..., Loaded], reader: Reader) -> None:
    dataset = _encoded(of([_talk(i) for i in range(30)], evaluation=0.3), reader)
    assert sorted(e.row for e in (*dataset.train, *dataset.evaluation)) == list(range(30))
    for example in (*dataset.train, *dataset.evaluation):
        assert f"{example.row}?" in reader.tokenizer.decode(example.ids)


def test_broken_lines_of_a_file_that_is_held_out_are_listed_too(
    of: Callable[..., Loaded], reader: Reader, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_bytes(b"".join(json.dumps(_talk(i)).encode() + b"\n" for i in range(100, 140)) + b"{broken\n\xff\n")
    rows = [_talk(i) for i in range(60)]
    dataset = _encoded(of(rows, evaluation=str(held)), reader)
    places = {place for reason in dataset.dropped.values() for place in reason}
    assert places == {"held.jsonl:41", "held.jsonl:42"}
    assert len(dataset.evaluation) == 40
    rows[2] = rows[3] = rows[5] = rows[7] = ALONE  # with the broken ones, 6 of 102
    with pytest.raises(DataError, match=r"these\.jsonl', '.*held\.jsonl': 6 of 102 rows cannot be used"):
        _encoded(of(rows, evaluation=str(held)), reader)


def test_many_unusable_rows_are_refused_with_reasons_and_numbers(of: Callable[..., Loaded], reader: Reader) -> None:
    rows = [_talk(i) for i in range(20)]
    for number in (3, 5, 8):
        rows[number] = {"messages": [{"role": "user", "content": str(number)}]}
    rows[2] = {"messages": [{"role": "assistant", "content": "me first"}]}
    with pytest.raises(DataError) as caught:
        _encoded(of(rows), reader)
    told = str(caught.value)
    assert "4 of 20 rows cannot be used" in told
    assert "no assistant turn (these.jsonl:4, these.jsonl:6, these.jsonl:9)" in told
    assert "begins with the assistant: there is nothing to answer (these.jsonl:3)" in told


def test_five_percent_is_where_noise_ends(of: Callable[..., Loaded], reader: Reader) -> None:
    rows = [_talk(i) for i in range(20)]
    rows[0] = ALONE
    assert len(_encoded(of(rows), reader).train) == 19
    rows[1] = {"messages": []}
    with pytest.raises(DataError, match="2 of 20"):
        _encoded(of(rows), reader)


def test_only_unusable_rows_are_refused(of: Callable[..., Loaded], reader: Reader) -> None:
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        _encoded(of([ALONE]), reader)


def test_the_report_counts_what_is_trained_on(of: Callable[..., Loaded], reader: Reader) -> None:
    dataset = _encoded(of([_talk(i) for i in range(10)], evaluation=0.2), reader)
    report = dataset.report()
    lengths = sorted(len(example.ids) for example in dataset.train)
    assert (report["train_rows"], report["evaluation_rows"], report["dropped"]) == (8, 2, {})
    assert report["tokens"] == dataset.train.tokens == sum(lengths)
    assert report["supervised"] == dataset.train.supervised == 8 * 3  # a digit, "!" and the end of the turn
    assert (report["length_max"], report["length_p50"]) == (lengths[-1], lengths[4])


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"data": "missing.jsonl"}, "data"),
        ({"evaluation": "missing.jsonl"}, "evaluation"),
        ({"evaluation": 3}, "evaluation"),
    ],
    ids=str,
)
def test_data_at_fault_is_told_with_the_line_that_names_it(
    chat_recipe: Callable[..., Loaded], task: Row, line: str
) -> None:
    loaded = chat_recipe(task=task)
    with pytest.raises(OnegpuError) as caught:
        preflight(loaded)
    assert str(caught.value).startswith(f"{loaded.places['task', 'chat', line]}: ")
    assert str(caught.value).count("recipe.yaml:") == 1


def test_all_files_that_are_missing_are_told_at_once(of: Callable[..., Loaded]) -> None:
    with pytest.raises(OnegpuError) as caught:
        gather(of([_talk(1)], data="train.jsonl", evaluation="held.jsonl", test="unseen.jsonl"))
    assert [
        name for name in ("train.jsonl", "held.jsonl", "unseen.jsonl") if f"data '{name}'" not in str(caught.value)
    ] == []
