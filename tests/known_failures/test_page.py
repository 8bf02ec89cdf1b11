"""The table in docs/proofs.md has exactly the thirty files, says what they say, and what was observed of others."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE, GENERATOR = ROOT / "docs" / "proofs.md", ROOT / "benchmarks" / "proofs.py"
FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if re.match(r"test_\d\d_", path.name))


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    """The names of benchmarks/proofs.py; it imports none of the libraries before it observes them."""
    return runpy.run_path(str(GENERATOR))


@pytest.fixture(scope="module")
def cells(generator: dict[str, Any]) -> dict[int, list[str]]:
    """Problem, onegpu, tests and the plain libraries, by number, as the page shows them."""
    found: dict[int, list[str]] = generator["shown"](PAGE.read_text("utf-8"))
    return found


def test_there_is_one_file_for_each_of_the_thirty_and_the_page_names_it(cells: dict[int, list[str]]) -> None:
    assert [int(path.name[5:7]) for path in FILES] == list(range(1, 31))
    assert list(cells) == list(range(1, 31))
    assert [
        path.name for path in FILES if f"({'../tests/known_failures/' + path.name})" not in cells[_of(path)][2]
    ] == []


def _of(path: Path) -> int:
    return int(path.name[5:7])


def test_the_page_says_what_the_files_say(generator: dict[str, Any], cells: dict[int, list[str]]) -> None:
    rows = generator["rows"]()
    assert len(rows) == 30
    for row in rows:
        assert cells[row.number][:3] == [row.problem, row.here, row.tests], row.number


def test_every_file_tests_something_and_names_files_that_exist(generator: dict[str, Any]) -> None:
    for path in FILES:
        tests = [n for n in ast.parse(path.read_text("utf-8")).body if getattr(n, "name", "").startswith("test_")]
        assert tests, path.name
    linked = [path for row in generator["rows"]() for path in re.findall(r"\]\(\.\./(.*?)\)", row.tests)]
    assert len(linked) > 60
    assert [path for path in linked if not (ROOT / path).is_file()] == []


def test_every_case_of_the_plain_libraries_is_on_the_page_and_nothing_else(cells: dict[int, list[str]]) -> None:
    asked: dict[int, list[str]] = {}
    for path in sorted((ROOT / "benchmarks" / "peers").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("case_"):
                asked.setdefault(int(node.name[5:7]), []).append(ast.get_docstring(node) or "")
    assert sum(map(len, asked.values())) > 40
    assert all(text for texts in asked.values() for text in texts)
    for number, (_, _, _, observed) in cells.items():
        found = [text.partition("*: ")[0].removeprefix("*") for text in observed.split("<br>") if text != "-"]
        assert sorted(found) == sorted(asked.get(number, [])), number


def test_only_the_table_is_rewritten(tmp_path: Path, generator: dict[str, Any]) -> None:
    page = Path(shutil.copy(PAGE, tmp_path / "proofs.md"))
    page.write_text("Before.\n" + page.read_text("utf-8") + "After.\n", "utf-8")
    before = page.read_text("utf-8")
    generator["write"](page, [])
    assert page.read_text("utf-8") == before
    page.write_text(before.replace("| 7 | The adapter", "| 7 | Another"), "utf-8")
    generator["write"](page, [])
    assert page.read_text("utf-8") == before


@pytest.mark.peers
def test_the_plain_libraries_still_do_what_the_page_says(
    tmp_path: Path, generator: dict[str, Any], cells: dict[int, list[str]]
) -> None:
    page = Path(shutil.copy(PAGE, tmp_path / "proofs.md"))
    done = subprocess.run([sys.executable, str(GENERATOR), str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = generator["shown"](page.read_text("utf-8"))
    changed = [number for number in cells if _without_figures(again[number][3]) != _without_figures(cells[number][3])]
    assert changed == []


def _without_figures(text: str) -> str:
    """Figures depend on the processor; what is done, and said, does not."""
    return re.sub(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", "#", text)
