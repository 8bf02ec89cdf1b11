import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from onegpu.adapters import DataError, OnegpuError
from onegpu.recipes.data.formats import ENDINGS, Record, check_data, read_records

File = Callable[..., Path]

ROWS = [{"text": 'a, "quoted" text', "label": "x"}, {"text": "zwei\nZeilen – ß", "label": "y"}]


def _table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "label"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
WRITTEN = {
    "rows.jsonl": JSONL,
    "rows.ndjson": JSONL,
    "rows.jsonl.gz": gzip.compress(JSONL),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": _table(","),
    "rows.csv.gz": gzip.compress(_table(",")),
    "rows.tsv": _table("\t"),
    "rows.parquet": _parquet(ROWS),
    "ROWS.JSONL": JSONL,
}


def _read(path: Path) -> list[Record]:
    check_data(path, path.name)
    return list(read_records(path))


def _rows(path: Path) -> list[Any]:
    return [record.row for record in _read(path)]


def _problems(path: Path) -> dict[int, str]:
    return {record.line: record.problem for record in _read(path) if record.problem is not None}


def _refusal(path: Path) -> str:
    with pytest.raises(OnegpuError) as caught:
        _read(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_same_rows(file: File, name: str) -> None:
    assert _rows(file(name, WRITTEN[name])) == ROWS


def test_no_ending_is_untested() -> None:
    assert {*ENDINGS} == {Path(name.lower().removesuffix(".gz")).suffix for name in WRITTEN} | {".txt"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_a_byte_order_mark_is_no_part_of_the_text(file: File, name: str) -> None:
    assert _rows(file(name, b"\xef\xbb\xbf" + WRITTEN[name])) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_lines_may_end_as_on_windows(file: File, name: str) -> None:
    content = WRITTEN[name].replace(b"x\n", b"x\r\n").replace(b"y\n", b"y\r\n").replace(b"}\n", b"}\r\n")
    assert b"\r" in content
    assert _rows(file(name, content)) == ROWS


def test_lines_are_counted_where_rows_begin(file: File) -> None:
    assert [r.line for r in _read(file("a.jsonl", b"\n" + JSONL.replace(b"}\n", b"}\n  \n")))] == [2, 4]
    assert [r.line for r in _read(file("a.csv", 'text\n"a\nb"\n\nc\n'))] == [2, 5]
    assert [r.line for r in _read(file("a.txt", "a\n\nb"))] == [1, 3]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_only_line_ends_end_a_line(file: File, mark: str) -> None:
    # Python's splitlines takes these for line ends, and a text may hold them as they are.
    assert _rows(file("a.jsonl", f'{{"text": "a{mark}b"}}\n')) == [{"text": f"a{mark}b"}]
    assert _rows(file("a.csv", f"text,n\na{mark}b,1\n")) == [{"text": f"a{mark}b", "n": "1"}]
    assert _rows(file("a.txt", f"a{mark}b\n")) == [{"text": f"a{mark}b"}]


@pytest.mark.parametrize(("name", "comma"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_long_field_is_read(file: File, name: str, comma: str) -> None:
    long = "word " * 40_000  # above the 131,072 characters that Python's reader takes by default
    assert _rows(file(name, f"text{comma}label\n{long}{comma}x\n")) == [{"text": long, "label": "x"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "not JSON: Expecting value"),
        (b'{"text": "a"} {}', "not JSON: Extra data"),
        (b"[1]", "a row must be a JSON object, not list"),
        (b'{"score": NaN}', "not JSON: NaN is no JSON number"),
        (b'{"score": -Infinity}', "not JSON: -Infinity is no JSON number"),
        (b'{"text": "\xe9"}', "not UTF-8"),
        (b'{"text": ' + b"[" * 200_000, "not JSON that can be read: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
    ids=["cut", "two", "list", "nan", "infinity", "latin-1", "deep", "long number"],
)
def test_a_broken_line_of_json_spoils_no_other(file: File, line: bytes, problem: str) -> None:
    path = file("rows.jsonl", JSONL + line + b"\n" + JSONL)
    ((number, told),) = _problems(path).items()
    assert number == 3
    assert told.startswith(problem)
    assert [row for row in _rows(path) if row] == ROWS * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"b", "not as many fields as the header has"),
        (b"b,x,y", "not as many fields as the header has"),
        (b"\xe9,x", "not UTF-8"),
        (b'"two\n\xe9 lines",x', "not UTF-8"),
        (b'"a"b,x', "not a row of fields: ',' expected after '\"'"),
    ],
)
def test_a_broken_line_of_csv_spoils_no_other(file: File, line: bytes, problem: str) -> None:
    path = file("rows.csv", b"text,label\na,x\n" + line + b"\nc,z\n")
    assert _problems(path) == {3: problem}
    assert [row for row in _rows(path) if row] == [{"text": "a", "label": "x"}, {"text": "c", "label": "z"}]


def test_a_quote_that_is_never_closed_is_told_by_the_line_where_it_opens(file: File) -> None:
    path = file("rows.csv", 'text,label\na,x\n"b,y\nc,z\n')
    assert _problems(path) == {3: "not a row of fields: unexpected end of data"}


def test_a_text_file_is_a_row_a_line(file: File) -> None:
    path = file("poem.txt", b"  Two roads\r\n\n \nand \xe9\nI took\n")
    assert [row for row in _rows(path) if row] == [{"text": "  Two roads"}, {"text": "I took"}]
    assert _problems(path) == {4: "not UTF-8"}


def test_json_may_be_an_object_with_one_list_of_objects(file: File) -> None:
    assert _rows(file("a.json", json.dumps({"version": 1, "tags": ["a"], "data": ROWS}))) == ROWS


def test_items_of_a_json_list_are_counted_from_one(file: File) -> None:
    path = file("a.json", '[{"text": "a"}, 3, {"text": NaN}]')
    assert _problems(path) == {
        2: "a row must be a JSON object, not int",
        3: "not JSON: NaN or infinity is no JSON number",
    }


def test_parquet_keeps_nested_rows_and_is_read_across_its_groups(file: File, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}], "n": i, "score": i / 4} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    records = _read(tmp_path / "rows.parquet")
    assert [r.row for r in records] == rows
    assert [r.line for r in records] == list(range(1, 3001))


def test_an_index_column_without_a_name_does_no_harm(file: File) -> None:
    # What pandas' `to_csv` writes unless told otherwise.
    assert _rows(file("rows.csv", ",text\n0,a\n1,b\n")) == [{"": "0", "text": "a"}, {"": "1", "text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", "text,label,text\na,x,b\n", "rows.csv: two columns have the name 'text'"),
        ("rows.csv", ",\na,x\n", "rows.csv: there is no header"),
        ("rows.csv", "\n\n", "rows.csv: there is no header"),
        ("rows.csv", b"t\xe9xt,label\na,x\n", "rows.csv:1: the header is not UTF-8"),
        ("rows.tsv", 'te"xt\t"a"b\n', "rows.tsv:1: the header cannot be read"),
        ("rows.jsonl", "", "data 'rows.jsonl': the file is empty"),
        ("rows.parquet", "PAR1 nonsense", "rows.parquet cannot be read as Parquet"),
        ("rows.json", '{"a": [{}], "b": [{}]}', "an object with one list of objects (it has: a, b)"),
        ("rows.json", "3", "must be a list of objects, or an object with one list of objects (it has: int)"),
        ("rows.json", '{"a": 1}\n{"a": 2}\n', "rows.json:2: not JSON: Extra data; a file with one object a line must"),
        ("rows.json", b'["\xe9"]', "rows.json is not UTF-8"),
        ("rows.json", "[" * 200_000, "rows.json: nested too deeply"),
        ("rows.jsonl.gz", b"not packed", "rows.jsonl.gz cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-12], "rows.jsonl.gz cannot be read: Compressed file ended"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused(file: File, name: str, content: str | bytes, told: str) -> None:
    assert told in _refusal(file(name, content))


def test_a_missing_file_is_refused_with_the_nearest(file: File, tmp_path: Path) -> None:
    file("train.jsonl", JSONL)
    file("notes.md", "no data")
    assert _refusal(tmp_path / "trian.jsonl") == (
        "data 'trian.jsonl': no such file; did you mean 'train.jsonl'? (valid: train.jsonl)"
    )


def test_an_unknown_ending_is_refused_with_the_known_ones(file: File) -> None:
    told = _refusal(file("rows.xlsx", "PK"))
    assert all(ending in told for ending in ENDINGS)
    assert ".json, .parquet" in _refusal(file("rows.parquet.gz", b"PAR1"))  # only formats of lines may be packed


@pytest.fixture
def folder(file: File, tmp_path: Path) -> Path:
    """Three classes of unequal size."""
    for name in ("b/1.txt", "b/2.txt", "b/3.txt", "a/9.txt", "c/1.txt", "c/2.txt"):
        file(f"reviews/{name}", f"of {name}\n")
    return tmp_path / "reviews"


def test_a_folder_of_texts_takes_its_classes_in_turns(folder: Path) -> None:
    assert [(r.file, r.line) for r in _read(folder)] == [
        ("a/9.txt", 1), ("b/1.txt", 2), ("c/1.txt", 3), ("b/2.txt", 4), ("c/2.txt", 5), ("b/3.txt", 6),
    ]  # fmt: skip
    assert _rows(folder)[1] == {"text": "of b/1.txt\n", "label": "b", "file": "b/1.txt"}


def test_hidden_files_and_files_beside_the_classes_are_no_rows(folder: Path) -> None:
    before = _rows(folder)
    (folder / "a" / ".DS_Store").write_text("")
    (folder / ".git").mkdir()
    (folder / ".git" / "1.txt").write_text("")
    (folder / "README.md").write_text("")
    assert _rows(folder) == before


def test_files_of_a_class_that_cannot_be_read_are_problems(folder: Path) -> None:
    (folder / "a" / "latin.txt").write_bytes(b"\xe9")
    (folder / "a" / "page.html").write_text("")
    (folder / "a" / "lost.txt").symlink_to(folder / "nowhere")
    assert {r.file: r.problem for r in _read(folder) if r.problem} == {
        "a/latin.txt": "not UTF-8",
        "a/page.html": "not a .txt file",
        "a/lost.txt": "cannot be read: No such file or directory",
    }


def test_a_folder_without_classes_is_refused_and_names_its_files(file: File, tmp_path: Path) -> None:
    file("data/train.jsonl", JSONL)
    file("data/train/pos/1.txt", "deeper than classes are")
    told = _refusal(tmp_path / "data")
    assert told == (
        "data 'data': a folder must hold a folder of .txt files for each class; it holds train.jsonl: name the file"
    )


def test_reading_does_not_wait_for_the_end_of_the_file(file: File) -> None:
    records = read_records(file("rows.csv", "text,label\na,x\n" + '"never closed,'))
    assert next(records).row == {"text": "a", "label": "x"}
    with pytest.raises(DataError):
        next(read_records(file("rows.csv", b"\xe9\n")))
