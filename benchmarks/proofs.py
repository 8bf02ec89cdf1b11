"""The table of thirty known failures in docs/proofs.md, from the tests and from the plain libraries.

    python benchmarks/proofs.py docs/proofs.md            everything; the plain libraries take about a minute
    python benchmarks/proofs.py docs/proofs.md --keep     without them: what was observed before stays
    python benchmarks/proofs.py docs/proofs.md --only 7   only those of row 7 are run again

What onegpu does is what the file of a row says on its top (tests/known_failures/test_NN_*.py). What the plain libraries
do is what was observed of them here: cases are the functions `case_NN_*` in benchmarks/peers. No figure is written by
hand.
"""

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "known_failures"
BEGIN, END = "<!-- the thirty: written by benchmarks/proofs.py -->", "<!-- end of the thirty -->"
PARTS = ("Met", "Here", "Not yet", "Also")
PEERS = ("training", "folders", "settings")
LIBRARIES = ("transformers", "peft", "trl", "bitsandbytes", "torch")
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One known failure, as the docstring of its test says it."""

    number: int
    problem: str
    parts: Mapping[str, str]
    test: str  # path below the repository

    @property
    def here(self) -> str:
        """What happens in onegpu, and what is to come."""
        first, rest, later = self.parts["Here"][0], self.parts["Here"][1:], self.parts.get("Not yet")
        return first.upper() + rest + (f" **Not yet:** {later}" if later else "")

    @property
    def tests(self) -> str:
        """Its own file, and those that show more."""
        others = re.findall(r"[\w/]+\.(?:py|md)", self.parts.get("Also", ""))
        links = [f"[{Path(path).name}](../{path})" for path in (self.test, *others)]
        return ", ".join(links)


def rows() -> list[Row]:
    """The thirty, by number.

    Raises:
        ValueError: a docstring lacks a part, or has one that the table does not know.
    """
    return [_row(path) for path in sorted(TESTS.glob("test_[0-9][0-9]_*.py"))]


def _row(path: Path) -> Row:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    title, *paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    number, _, problem = title.partition(". ")
    parts = dict(paragraph.split(": ", 1) for paragraph in paragraphs)
    if not {"Met", "Here"} <= parts.keys() <= set(PARTS) or path.name[5:7] != f"{int(number):02}":
        raise ValueError(f"{path.name}: its docstring needs a number, Met and Here, and has {', '.join(parts)}")
    return Row(int(number), problem.rstrip("."), parts, str(path.relative_to(ROOT)))


def table(found: Iterable[Row], observed: Mapping[int, str]) -> str:
    """The table between the two marks."""
    lines = ["| | problem | in onegpu | shown by | in the plain libraries |", "| ---: | --- | --- | --- | --- |"]
    for row in found:
        cells = (str(row.number), row.problem, row.here, row.tests, observed.get(row.number, NONE))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def shown(page: str) -> dict[int, list[str]]:
    """Number -> cells, of the table on a page."""
    block = page.partition(BEGIN)[2].partition(END)[0]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in block.splitlines() if re.match(r"\| \d", line)]
    return {int(first): [cell.replace("\\|", "|") for cell in others] for first, *others in cells}


def cases() -> Iterator[tuple[int, Callable[[], str]]]:
    """Every case of the plain libraries, with the number of its row."""
    for module in PEERS:
        for name, case in vars(import_module(f"peers.{module}")).items():
            if name.startswith("case_"):
                yield int(name[5:7]), case


def observe(only: Iterable[int]) -> dict[int, str]:
    """Run the cases of some rows; what each library was seen to do. Without any, the libraries are not imported."""
    only = set(only)
    found: dict[int, list[str]] = {}
    for number, case in cases() if only else ():
        if number in only:
            print(f"{case.__name__} ...", file=sys.stderr, flush=True)
            found.setdefault(number, []).append(f"*{(case.__doc__ or '').strip()}*: {case()}.")
    return {number: "<br>".join(texts) for number, texts in found.items()}


def heading() -> str:
    """With which versions and processor the plain libraries were observed."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"The last column was observed with {versions}, on a CPU, on a Llama of two layers with random weights."


def write(page: Path, only: Iterable[int] | None) -> None:
    """Rewrite the table on a page, and nothing else of it."""
    text = page.read_text("utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no {BEGIN} and {END}")
    found = rows()
    observed = {number: cells[3] for number, cells in shown(text).items()} if only is not None else {}
    wanted = [row.number for row in found] if only is None else list(only)
    told = heading() if wanted else _heading_of(text)
    observed = {number: cell for number, cell in observed.items() if number not in wanted} | observe(wanted)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{told}\n\n{table(found, observed)}\n\n{END}{after}", "utf-8")


def _heading_of(page: str) -> str:
    """The sentence above the table, as it stands."""
    return page.partition(BEGIN)[2].partition("\n| ")[0].strip()


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--only", type=int, nargs="+")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # on matrices this small, threads wait longer than they compute
    os.environ["HF_HUB_OFFLINE"] = "0"  # as users have it; the one case that asks the hub is stopped on its way
    write(given.page, [] if given.keep else given.only)


if __name__ == "__main__":
    main()
