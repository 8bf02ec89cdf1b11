"""The house stays as the README says: packages, entry points, import direction, map, documented commands."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from onegpu.recipes.cli import app

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOMS = {"adapters": "onegpu.adapters", "recipes": "onegpu.recipes"}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def test_every_folder_with_code_is_a_declared_package() -> None:
    on_disk = {".".join(("onegpu", *p.parent.relative_to(ROOT).parts)) for p in SOURCES if p.name == "__init__.py"}
    assert on_disk == set(PROJECT["tool"]["setuptools"]["packages"])
    assert {p.parent for p in SOURCES} == {p.parent for p in SOURCES if p.name == "__init__.py"}


@pytest.mark.parametrize("group", ["onegpu.adapters", "onegpu.tasks"])
def test_declared_entry_points_are_the_installed_ones(group: str) -> None:
    declared = PROJECT["project"]["entry-points"][group]
    installed = {p.name: p.value for p in entry_points(group=group) if p.dist and p.dist.name == "onegpu"}
    assert installed == declared
    assert declared


def test_every_declared_entry_point_can_be_loaded() -> None:
    points = [p for group in PROJECT["project"]["entry-points"] for p in entry_points(group=group)]
    assert points
    assert all(isinstance(point.load(), type) for point in points)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports from onegpu."""
    package = ("onegpu", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_adapters_never_import_recipes() -> None:
    guilty = [
        p for p in SOURCES if p.is_relative_to(ROOT / "adapters") and any("onegpu.recipes" in i for i in imports(p))
    ]
    assert not guilty


def test_methods_never_import_each_other() -> None:
    methods = {value.partition(":")[0] for value in PROJECT["project"]["entry-points"]["onegpu.adapters"].values()}
    assert len(methods) >= 5
    for method in methods:
        path = ROOT / Path(*method.removeprefix("onegpu.").split(".")).with_suffix(".py")
        others = {i for i in imports(path) for other in methods - {method} if i.startswith(f"{other}.") or i == other}
        assert not others, f"{path.name} imports {others}"


def readme_map() -> set[str]:
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.partition("## Map")[2].split("```")[1]
    found, room = set(), ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        room = name if not line.startswith(" ") else room
        found.add(name if name == room else room + name)
    return found


def test_the_map_in_the_readme_is_the_disk() -> None:
    listed = {entry for entry in readme_map() if entry.endswith(".py")}
    on_disk = {str(path.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py"}
    assert listed == on_disk
    assert all((ROOT / entry).exists() for entry in readme_map())


def test_the_readme_gives_one_command_line_for_each_of_its_two_promises() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for marker, ending in (("the quickstart command", "onegpu run quickstart"), ("the test command", "pytest -q -n 2")):
        block = text.partition(f"<!-- {marker} -->")[2].split("```")[1].removeprefix("sh").strip()
        assert len(block.splitlines()) == 1
        assert block.endswith(ending)
        assert "-c constraints.txt" in block


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [(d, link) for d in documents for link in re.findall(r"\]\(([^)#:]+)\)", d.read_text("utf-8"))]
    assert links
    assert [(d.name, link) for d, link in links if not (d.parent / link).exists()] == []


def test_the_command_line_page_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    commands = app.commands
    assert len(commands) >= 8
    for name, command in commands.items():
        section = page.partition(f"## onegpu {name}\n")[2].partition("\n## ")[0]
        assert section, f"docs/cli.md has no section on {name}"
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert [o for o in options if o not in section] == []


def test_the_constraints_pin_every_dependency() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    optional = [d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra]
    needed = {re.split(r"[><=]", d)[0].lower() for d in (*PROJECT["project"]["dependencies"], *optional)}
    assert needed <= pinned


def test_the_rooms_are_reachable_for_type_checkers() -> None:
    for room in ROOMS:
        assert (ROOT / ".imports" / "onegpu" / room).resolve() == ROOT / room


def test_public_names_exist_and_listing_needs_no_torch() -> None:
    code = (
        "import sys, onegpu.adapters as a, onegpu.recipes as r; a.entries(a.ADAPTERS)\n"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "[getattr(m, n) for m in (a, r) for n in m.__all__]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_is_called_like_a_function_it_defines() -> None:
    # Re-exported from its package, such a function would hide the module.
    guilty = [
        path.name
        for path in SOURCES
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == path.stem
    ]
    assert not guilty
