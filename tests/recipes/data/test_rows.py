import concurrent.futures
import datetime
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from onegpu.adapters import DataError, OnegpuError, RecipeError
from onegpu.recipes.data import formats
from onegpu.recipes.data.rows import Rows, describe, digest_of, read_rows
from onegpu.recipes.data.sources import Source

pytestmark = pytest.mark.usefixtures("cache")

File = Callable[..., Path]


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"text": f"t{i}", "label": "ab"[i % 2], "more": i} for i in range(1200)]  # more than two batches
WANTED = [{"text": row["text"], "label": row["label"]} for row in ROWS]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Rows]:
    """`read("rows.jsonl", needs=("text",))`: rows of files in the folder of the test."""

    def call(data: Any = "rows.jsonl", **options: Any) -> Rows:
        return read_rows(data, folder=tmp_path, **({"needs": ("text", "label")} | options))

    return call


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many rows were read from files."""
    done: list[int] = []
    real = formats._READERS[".jsonl"]

    def count(path: Path) -> Iterator[formats.Record]:
        done.append(0)
        for record in real(path):
            done[-1] += 1
            yield record

    monkeypatch.setitem(formats._READERS, ".jsonl", count)
    return done


def test_rows_are_those_of_the_file_mapped(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines(ROWS))
    rows = read()
    assert len(rows) == 1200
    assert list(rows) == WANTED
    assert [rows[i] for i in (0, 511, 512, 1199, -1)] == [WANTED[i] for i in (0, 511, 512, 1199, -1)]
    assert rows[510:515] == WANTED[510:515]
    for beyond in (1200, -1201):
        with pytest.raises(IndexError):
            rows[beyond]


def test_places_digests_and_sources_belong_to_their_rows(file: File, read: Callable[..., Rows]) -> None:
    file("a.jsonl", "\n" + _lines(ROWS[:700]))
    file("t/b/1.txt", "one")
    file("t/a/1.txt", "two")
    rows = read(["a.jsonl", Source(source="t", weight=0.5)])
    assert [rows.place(i) for i in (0, 699, 700, 701)] == ["a.jsonl:2", "a.jsonl:701", "t/a/1.txt", "t/b/1.txt"]
    assert [rows.of(i) for i in (0, 699, 700, 701)] == [0, 0, 1, 1]
    assert rows.sources.tolist() == [0] * 700 + [1] * 2
    assert rows.weights == (1.0, 0.5)
    assert rows.digests.tolist() == [digest_of(row).encode() for row in rows]


def test_what_is_kept_is_a_file_of_the_datasets_library(file: File, read: Callable[..., Rows], cache: Path) -> None:
    file("rows.jsonl", _lines(ROWS))
    read()
    (kept,) = cache.rglob("*.arrow")
    seen = datasets.Dataset.from_file(str(kept))
    assert [json.loads(row) for row in seen["row"]] == WANTED
    assert seen[1199]["place"] == "rows.jsonl:1200"


def test_equal_rows_have_equal_digests_and_the_order_of_their_columns_stays() -> None:
    assert digest_of({"a": 1, "b": {"x": 1, "y": 2}}) == digest_of({"b": {"y": 2, "x": 1}, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_nested_objects_keep_their_order(file: File, read: Callable[..., Rows]) -> None:
    # A chat template may print a tool as it stands.
    tool = {"type": "function", "name": "f", "arguments": {"z": 1, "a": [None, True, 0.1]}}
    file("rows.jsonl", _lines([{"tools": tool}]))
    assert json.dumps(read(needs=("tools",))[0]["tools"]) == json.dumps(tool)


def test_values_that_json_does_not_have_are_text_or_a_problem(tmp_path: Path, read: Callable[..., Rows]) -> None:
    for number, value in enumerate([datetime.date(2024, 1, 2), Decimal("1.50"), b"raw", float("nan")]):
        rows = [{"text": value, "label": "a"}] * 2
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    assert read("0.parquet")[0]["text"] == "2024-01-02"
    assert read("1.parquet")[0]["text"] == "1.50"
    with pytest.raises(DataError, match="a value of type bytes is neither text, number, list nor object"):
        read("2.parquet")
    with pytest.raises(DataError, match="NaN or infinity is no JSON number"):
        read("3.parquet")


def test_half_a_surrogate_pair_is_a_problem(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines(ROWS) + '{"text": "\\ud83d", "label": "a"}\n')
    assert read().problems == {"half of a surrogate pair: not text": ["rows.jsonl:1201"]}


def test_broken_rows_are_listed_with_their_places(file: File, read: Callable[..., Rows]) -> None:
    broken = ["{", '{"text": "x"}', "[]", '{"text": "x", "label": null}', "{"]
    file("rows.jsonl", _lines(ROWS) + "\n".join(broken))
    rows = read()
    assert len(rows) == 1200
    assert rows.problems == {
        "not JSON: Expecting property name enclosed in double quotes": ["rows.jsonl:1201", "rows.jsonl:1205"],
        "no column 'label'": ["rows.jsonl:1202"],
        "a row must be a JSON object, not list": ["rows.jsonl:1203"],
        "column 'label' is null": ["rows.jsonl:1204"],
    }


def test_five_percent_is_where_noise_ends(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines(ROWS[:19]) + "x\n")
    assert len(read()) == 19
    file("rows.jsonl", _lines(ROWS[:19]) + "x\n{}\n")
    with pytest.raises(DataError) as caught:
        read()
    assert str(caught.value) == (
        "data 'rows.jsonl': 2 of 21 rows cannot be used: no column 'text' (rows.jsonl:21); "
        "not JSON: Expecting value (rows.jsonl:20)"
    )
    assert len(read(broken=0.1)) == 19
    with pytest.raises(DataError, match="2 of 21"):  # what was kept for the more patient is no way around
        read()


def test_a_source_without_one_usable_row_is_refused_beside_any_other(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines(ROWS))
    file("other.jsonl", "x\ny\n")
    with pytest.raises(DataError, match=r"data 'other\.jsonl': 2 of 2 rows cannot be used"):
        read(["rows.jsonl", "other.jsonl"], broken=0.99)


def test_the_first_five_places_of_a_reason_are_told() -> None:
    problems = {"rare": ["a:1"], "often": [f"a:{i}" for i in range(6)]}
    assert describe(problems) == "often (a:0, a:1, a:2, a:3, a:4, ...); rare (a:1)"
    assert describe({str(i): [i] for i in range(6)}).endswith("4 (4); ...")


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("\n\n", {}, "data 'rows.jsonl' has no rows"),
        ('{"text": "a", "lable": "x"}\n' * 30, {}, "no column 'label' (it has: text, lable); did you mean 'lable'?"),
        (_lines(ROWS), {"columns": {"text": "headline"}}, "no column 'headline' (it has: text, label, more); map it"),
        (_lines(ROWS), {"columns": {"text": "{headline} {more}"}}, "no column 'headline'"),
        (_lines(ROWS), {"optional": ("weight",), "columns": {"weight": "w"}}, "no column 'w'"),
    ],
)
def test_a_column_that_no_row_has_is_refused_with_those_there(
    file: File, read: Callable[..., Rows], content: str, options: dict[str, Any], told: str
) -> None:
    file("rows.jsonl", content)
    with pytest.raises(DataError) as caught:
        read(**options)
    assert told in str(caught.value)


def test_an_unknown_key_under_columns_is_refused_before_anything_is_read(read: Callable[..., Rows]) -> None:
    with pytest.raises(RecipeError, match="the task has no column 'txt'"):
        read("missing.jsonl", columns={"txt": "text"})


def test_an_optional_column_is_there_where_a_row_has_it(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines([{"text": "a", "label": "x", "weight": 2}, {"text": "b", "label": "x"}]))
    assert list(read(optional=("weight", "never"))) == [
        {"text": "a", "label": "x", "weight": 2},
        {"text": "b", "label": "x"},
    ]


def test_the_limit_takes_the_first_rows_of_each_source(
    file: File, read: Callable[..., Rows], readings: list[int]
) -> None:
    file("a.jsonl", "x\n" + _lines(ROWS))
    file("b.jsonl", _lines(ROWS[5:]))
    rows = read(["a.jsonl", "b.jsonl"], limit=3, broken=0.5)
    assert list(rows) == [*WANTED[:3], *WANTED[5:8]]
    assert readings == [4, 3]


# --- the cache


def test_the_second_reading_reads_no_file(file: File, read: Callable[..., Rows], readings: list[int]) -> None:
    file("rows.jsonl", _lines(ROWS) + "x\n")
    first, second = read(), read()
    assert readings == [1201]
    assert list(first) == list(second) == WANTED
    assert (first.fingerprint, first.problems) == (second.fingerprint, second.problems)


def test_whatever_the_rows_follow_from_is_in_the_key(
    file: File, read: Callable[..., Rows], readings: list[int]
) -> None:
    file("rows.jsonl", _lines(ROWS))
    for options in ({}, {"limit": 7}, {"columns": {"text": "label"}}, {"optional": ("more",)}, {"needs": ("text",)}):
        read(**options)
    file("rows.jsonl", _lines(ROWS[1:]))
    assert list(read()) == WANTED[1:]
    file("other.jsonl", _lines(ROWS))  # another name: places tell it
    assert read("other.jsonl").place(0) == "other.jsonl:1"
    assert len(readings) == 7


def test_the_fingerprint_is_of_the_rows_in_order(file: File, read: Callable[..., Rows]) -> None:
    file("rows.jsonl", _lines(ROWS))
    file("same.jsonl", "\n" + _lines(ROWS) + "x\n")
    file("turned.jsonl", _lines(ROWS[::-1]))
    prints = [read(name).fingerprint for name in ("rows.jsonl", "same.jsonl", "turned.jsonl")]
    assert prints[0] == prints[1] != prints[2]


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["rows.arrow", "facts.json"])
def test_a_damaged_cache_is_written_anew(
    file: File, read: Callable[..., Rows], readings: list[int], cache: Path, name: str, how: str
) -> None:
    file("rows.jsonl", _lines(ROWS))
    read()
    (kept,) = cache.rglob(name)
    _damage(kept, how)
    assert list(read()) == WANTED
    assert list(read()) == WANTED
    assert readings == [1200, 1200]


@pytest.mark.parametrize("change", [{"rows": 1199}, {"problems": {"x": ["y"]}}, {"key": {}}, {"counts": []}], ids=str)
def test_facts_that_were_changed_are_not_believed(
    file: File, read: Callable[..., Rows], readings: list[int], cache: Path, change: dict[str, Any]
) -> None:
    file("rows.jsonl", _lines(ROWS))
    read()
    (facts,) = cache.rglob("facts.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | change))
    assert (len(read()), read().problems) == (1200, {})
    assert len(readings) == 2


def test_a_reading_that_fails_leaves_nothing_behind(file: File, read: Callable[..., Rows], cache: Path) -> None:
    file("rows.jsonl", _lines(ROWS))
    with pytest.raises(OnegpuError):
        read(needs=("headline",))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_rows_outlive_their_cache(file: File, read: Callable[..., Rows], cache: Path) -> None:
    file("rows.jsonl", _lines(ROWS))
    rows = read()
    (kept,) = cache.rglob("rows.arrow")
    kept.unlink()
    assert list(read()) == list(rows) == WANTED


def test_two_processes_at_once_read_the_same_rows(file: File, tmp_path: Path, cache: Path) -> None:
    file("rows.jsonl", _lines(ROWS))
    code = (
        "import sys; from pathlib import Path\n"
        "from onegpu.recipes.data.rows import read_rows\n"
        "rows = read_rows('rows.jsonl', folder=Path(sys.argv[1]), needs=('text', 'label'))\n"
        "print(len(rows), rows.fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(subprocess.run, command, capture_output=True, text=True) for _ in range(2)]
        said = [(run.result().returncode, run.result().stdout, run.result().stderr) for run in runs]
    assert said[0] == said[1]
    assert said[0][1].startswith("1200 ")
    assert len(list(cache.rglob("rows.arrow"))) == 1


def test_threads_at_once_read_the_file_once(file: File, read: Callable[..., Rows], readings: list[int]) -> None:
    file("rows.jsonl", _lines(ROWS))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [run.result() for run in [pool.submit(read) for _ in range(4)]]
    assert [len(rows) for rows in found] == [1200] * 4
    assert readings == [1200]


@pytest.mark.slow
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, read: Callable[..., Rows]) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} " * 25, "label": str(i % 7)}) + "\n" for i in range(200_000))
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert size > 35_000_000
    tracemalloc.start()
    try:
        rows = read()
        assert rows[199_999]["text"].startswith("199999 ")
        assert sum(1 for _ in rows) == 200_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 10
    assert np.unique(rows.digests).size == 200_000
