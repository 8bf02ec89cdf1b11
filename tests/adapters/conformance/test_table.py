"""The page on adapters says what was proved, for every adapter that is registered."""

import re
from pathlib import Path

import pytest

from onegpu.adapters import ADAPTERS, entries
from onegpu.adapters.conformance import CHECKS
from onegpu.adapters.conformance.table import COLUMNS, PROOFS, Row, page, proved, row_of

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
REGISTERED = [entry.name for entry in entries(ADAPTERS) if entry.distribution == "onegpu"]


def shown(text: str) -> dict[str, dict[str, str]]:
    """Adapter -> heading -> `yes`, or the text of the note that its cell points to."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text.partition("## Notes")[2], re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    headings = lines[0][1:]
    rows = {line[0].strip("`"): dict(zip(headings, line[1:], strict=True)) for line in lines[2:]}
    return {name: {heading: _resolved(cell, notes) for heading, cell in cells.items()} for name, cells in rows.items()}


def _resolved(cell: str, notes: dict[str, str]) -> str:
    number = re.fullmatch(r"no \[(\d+)\]", cell)
    return notes[number.group(1)] if number else cell


@pytest.mark.parametrize("name", REGISTERED)
def test_an_adapter_is_proved_and_its_row_is_what_was_proved(name: str) -> None:
    report = proved(name)
    assert report.failures == {}
    row = row_of(report)
    text = PAGE.read_text("utf-8")
    assert shown(text)[name] == row.cells
    assert f"- `{name}`: {row.summary}" in text
    assert row.summary


def test_the_page_has_exactly_the_registered_adapters() -> None:
    assert len(REGISTERED) >= 7
    assert list(shown(PAGE.read_text("utf-8"))) == REGISTERED


def test_settings_for_proofs_are_of_registered_adapters() -> None:
    assert PROOFS.keys() <= set(REGISTERED)


def test_columns_are_made_of_checks() -> None:
    assert {check for checks in COLUMNS.values() for check in checks} <= CHECKS.keys()


def test_equal_reasons_share_a_note_and_a_page_can_be_read_back() -> None:
    cells = dict.fromkeys(COLUMNS, "yes") | {"T5": "it has no legs", "merge": "it has no legs"}
    rows = [
        Row("one", "First.", "https://arxiv.org/abs/1", cells),
        Row("two", "Second.", "", cells | {"BERT": "tired"}),
    ]
    text = page(rows)
    assert shown(text) == {row.name: row.cells for row in rows}
    assert text.count("it has no legs") == 1
    assert "| `two` | yes | no [2] | no [1] |" in text
    assert "- `one`: First. [paper](https://arxiv.org/abs/1)" in text
