from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from onegpu.adapters import DataError, OnegpuError, RecipeError
from onegpu.recipes.rows import Rows, canonical, read_rows

ROWS = [{"text": 'a, "quoted" text', "label": "x"}, {"text": "zwei\nZeilen – ß", "label": "y"}]
CSV = 'text,label\n"a, ""quoted"" text",x\n"zwei\nZeilen – ß",y\n'
JSONL = '{"text": "a, \\"quoted\\" text", "label": "x"}\n{"text": "zwei\\nZeilen – ß", "label": "y"}\n'


def _read(path: Path, **options: Any) -> Rows:
    needs = options.pop("needs", ("text", "label"))
    return read_rows(path.name, folder=path.parent, **({"needs": needs, "columns": {}} | options))


def _write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(OnegpuError) as caught:
        _read(path, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "content"), [("rows.csv", CSV), ("rows.jsonl", JSONL)])
def test_text_files_are_read_with_any_line_ends_and_byte_order_mark(
    tmp_path: Path, name: str, content: str, encoding: str, ends: str
) -> None:
    content = content.replace("\n", ends) if name.endswith("jsonl") else content.replace("x\n", f"x{ends}")
    assert _read(_write(tmp_path / name, content, encoding)).rows == ROWS


def test_parquet_is_read(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert _read(tmp_path / "rows.parquet").rows == ROWS


def test_parquet_keeps_nested_messages(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert _read(tmp_path / "rows.parquet", needs=("messages",)).rows == rows


def test_empty_lines_are_passed_over(tmp_path: Path) -> None:
    assert _read(_write(tmp_path / "rows.jsonl", "\n" + JSONL.replace("}\n", "}\n\n  \n"))).rows == ROWS


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_only_line_ends_end_a_line_of_json(tmp_path: Path, mark: str) -> None:
    # Python's splitlines takes these for line ends, and a JSON string may hold them as they are.
    path = _write(tmp_path / "rows.jsonl", f'{{"text": "a{mark}b", "label": "x"}}\n')
    assert _read(path).rows == [{"text": f"a{mark}b", "label": "x"}]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_only_line_ends_end_a_line_of_csv(tmp_path: Path, mark: str) -> None:
    path = _write(tmp_path / "rows.csv", f"text,label\na{mark}b,x\n")
    assert _read(path).rows == [{"text": f"a{mark}b", "label": "x"}]


def test_a_long_text_in_csv_is_read(tmp_path: Path) -> None:
    long = "word " * 40_000  # above the 131,072 characters that Python's reader takes by default
    assert _read(_write(tmp_path / "rows.csv", f"text,label\n{long},x\n")).rows == [{"text": long, "label": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", '{"text": "a", "label": "x"}\n\n{"text": \n', "rows.jsonl:3: not JSON"),
        ("rows.jsonl", '{"text": "a", "label": "x"}\n[1]\n', "rows.jsonl:2: a row must be a JSON object, not list"),
        ("rows.csv", "text,label\na,x\nb\n", "rows.csv:3: not as many fields as the header has"),
        ("rows.csv", "text,label\na,x,y\n", "rows.csv:2: not as many fields as the header has"),
        ("rows.parquet", "PAR1 nonsense", "rows.parquet cannot be read as Parquet"),
        ("rows.jsonl", "", "data 'rows.jsonl' has no rows"),
        ("rows.csv", "text,label\n", "data 'rows.csv' has no rows"),
        (
            "rows.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "class": "x"}\n',
            "row 1: no column 'label' (it has: text, class); map it under `columns:`",
        ),
        ("rows.csv", "headline,label\na,x\n", "row 0: no column 'text' (it has: headline, label)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str, content: str, told: str) -> None:
    assert told in _refusal(_write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_another_encoding_is_refused(tmp_path: Path, name: str) -> None:
    assert f"{name} is not UTF-8" in _refusal(_write(tmp_path / name, "é", "latin-1"))


def test_a_missing_file_is_refused_and_those_beside_it_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", JSONL)
    _write(tmp_path / "notes.txt", "no data")
    told = _refusal(tmp_path / "trian.jsonl")
    assert told.endswith("data 'trian.jsonl': no such file; there: train.jsonl")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert "a file must end in .jsonl, .csv, .parquet" in _refusal(_write(tmp_path / "rows.txt", JSONL))


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.csv", "headline,topic,extra\na,x,1\n")
    assert _read(path, columns={"text": "headline", "label": "topic"}).rows == [{"text": "a", "label": "x"}]


def test_a_mapping_of_a_column_the_task_does_not_have_is_refused(tmp_path: Path) -> None:
    told = _refusal(_write(tmp_path / "rows.jsonl", JSONL), columns={"headline": "text"})
    assert told == "columns: the task has no column 'headline' (valid: text, label)"


def test_a_mapping_to_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    told = _refusal(_write(tmp_path / "rows.jsonl", JSONL), columns={"text": "headline"})
    assert "row 0: no column 'headline' (it has: text, label)" in told


def test_the_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert _read(_write(tmp_path / "rows.jsonl", JSONL), limit=1).rows == ROWS[:1]


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    same = _read(_write(tmp_path / "rows.csv", CSV)), _read(jsonl(ROWS, "same.jsonl"))
    assert same[0].fingerprint == same[1].fingerprint
    others = [_read(jsonl(ROWS[::-1], "a.jsonl")), _read(jsonl(ROWS[:1], "b.jsonl"))]
    assert len({same[0].fingerprint, *(rows.fingerprint for rows in others)}) == 3


def test_equal_rows_are_equal_whatever_the_order_of_their_columns() -> None:
    assert canonical({"a": 1, "b": [2]}) == canonical({"b": [2], "a": 1})
    assert canonical({"a": 1}) != canonical({"a": "1"})


def test_a_hub_data_set_is_read_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, *, revision: str, split: str) -> list[dict[str, str]]:
        asked.append((name, revision, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_rows("hub:people/talk@abc123", folder=tmp_path, needs=("text", "label"), columns={})
    assert found.rows == ROWS
    assert asked == [("people/talk", "abc123", "train")]


def test_a_hub_data_set_needs_a_revision(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hub:people/talk@REVISION"):
        read_rows("hub:people/talk", folder=tmp_path, needs=("text",), columns={})


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise ConnectionError("no way there\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'hub:people/talk@1' cannot be loaded: no way there$"):
        read_rows("hub:people/talk@1", folder=tmp_path, needs=("text",), columns={})
