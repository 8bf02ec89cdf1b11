"""Malformed rows of every format and task, up to where weights would be read."""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from onegpu.adapters import Unavailable
from onegpu.recipes.jobs import Job

ENCODERS = ("classification", "tagging", "question-answering")
ENDINGS = ("jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz")
Rows = list[dict[str, Any]]


def _table(rows: Rows, delimiter: str) -> bytes:
    out = io.StringIO()
    names = list(dict.fromkeys(str(key) for row in rows for key in row))
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([str(row.get(name, "")) for name in names] for row in rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: Rows) -> bytes:
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, out)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, RecursionError, NotImplementedError):
        return b"PAR1"  # rows that are no table
    return out.getvalue()


def _file(rows: Rows, ending: str) -> bytes:
    if ending == "parquet":
        return _as_parquet(rows)
    if ending in ("csv", "tsv"):
        return _table(rows, "," if ending == "csv" else "\t")
    lines = [json.dumps(row) for row in rows]
    return (f"[{', '.join(lines)}]" if ending == "json" else "\n".join(lines)).encode()


@pytest.fixture
def judge(
    command: Callable[..., Any],
    bases: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Counter[str],
    first_time: Callable[..., bool],
) -> Callable[[str, str, bytes, float], None]:
    """Gives a file of rows to the command line, in a recipe that is right."""

    def stop(self: Job) -> Any:
        raise Unavailable("everything before weights is right")

    monkeypatch.setattr(Job, "load_base", stop)
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"

    def give(task: str, name: str, content: bytes, tolerate: float) -> None:
        if not first_time(task, name, content):
            return
        for old in tmp_path.glob("rows.*"):
            old.unlink()
        (tmp_path / name).write_bytes(content)
        settings = {"data": str(tmp_path / name), "evaluation": 0.3, "tolerate": tolerate}
        base = bases["bert" if task in ENCODERS else "llama"]
        recipe.write_text(yaml.safe_dump({"base": base, "adapters": ["lora"], "task": {task: settings}}))
        shown = command("data", str(recipe))
        verdict = command("run", str(recipe), "-o", str(out))
        assert not out.exists()
        right = "everything before weights is right" in verdict.message
        assert right is (shown.code == 0), (shown, verdict)
        tally["right" if right else f"exit {verdict.code}"] += 1

    return give


def _check(judge: Any, rows_of: Any, spoil: Any, spoil_bytes: Any, data: st.DataObject, *tasks: str) -> None:
    task = data.draw(st.sampled_from(tasks or sorted(set(rows_of) - {"distillation"})))
    ending = data.draw(st.sampled_from(ENDINGS))
    rows = rows_of[task]
    for _ in range(data.draw(st.integers(0, 3))):
        spoilt = spoil(data.draw, rows)
        rows = spoilt if isinstance(spoilt, list) and spoilt else rows
    if ending == "parquet":
        rows = [row for row in rows if isinstance(row, dict)]
    content = _file(rows if ending not in ("csv", "tsv") else [r for r in rows if isinstance(r, dict)], ending)
    if data.draw(st.booleans()):
        content = spoil_bytes(data.draw, content)
    judge(task, f"rows.{ending}", content, data.draw(st.sampled_from((0.05, 0.9))))


@settings(max_examples=25)
@given(data=st.data())
def test_malformed_rows_are_a_message(
    judge: Any, rows_of: Any, spoil: Any, spoil_bytes: Any, data: st.DataObject
) -> None:
    _check(judge, rows_of, spoil, spoil_bytes, data)


@pytest.mark.fuzz
def test_a_thousand_malformed_files_of_rows(
    judge: Any, rows_of: Any, spoil: Any, spoil_bytes: Any, tally: Counter[str]
) -> None:
    @settings(max_examples=1_000)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check(judge, rows_of, spoil, spoil_bytes, data)

    each()
    print(f"\nfiles of rows: {dict(tally)}")
    assert tally.total() - tally["right"] >= 300, tally


@pytest.mark.fuzz
def test_hundreds_of_malformed_files_of_conversations(
    judge: Any, rows_of: Any, spoil: Any, spoil_bytes: Any, tally: Counter[str]
) -> None:
    @settings(max_examples=600)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check(judge, rows_of, spoil, spoil_bytes, data, "chat")

    each()
    print(f"\nfiles of conversations: {dict(tally)}")
    assert tally.total() - tally["right"] >= 200, tally
