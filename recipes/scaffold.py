"""`onegpu new-adapter`: a publishable package with a small method that works, to be changed into another one."""

import ast
import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from onegpu.adapters import ADAPTERS, RecipeError, entries
from onegpu.adapters.files import atomic_folder

__all__ = ["new_adapter"]

TEMPLATES = Path(__file__).parent / "templates"
FILES = {  # template -> the file it becomes
    "pyproject.toml.txt": "pyproject.toml",
    "module.py.txt": "$module.py",
    "test.py.txt": "tests/test_$module.py",
    "README.md.txt": "README.md",
    "gitignore.txt": ".gitignore",
    "LICENSE.txt": "LICENSE",
}
# Files and folders of this name mean something else to setuptools and pytest.
RESERVED = {"setup", "tests", "conftest"}


@dataclass(frozen=True)
class Names:
    """What a new package and its parts are called."""

    name: str  # of the distribution and of the adapter: my-gate
    module: str  # my_gate
    class_name: str  # MyGate


def new_adapter(name: str, folder: Path | None = None) -> Path:
    """Write the package, whole or not at all; returns its folder, which is called like the adapter when left out.

    Raises:
        RecipeError: the name cannot be used, or the folder holds something.
    """
    names = _names(name)
    files = {Template(at).substitute(vars(names)): _filled(template, names) for template, at in FILES.items()}
    folder = folder or Path(names.name)
    faults = [*_faults(names, files), *_occupied(folder)]
    if faults:
        raise RecipeError("; ".join(faults))
    try:
        _write(folder, files)
    except OSError as cause:
        raise RecipeError(f"{folder} cannot be written: {cause.strerror}") from cause
    return folder


def _names(name: str) -> Names:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_]+[A-Za-z0-9]+)*", name):
        raise RecipeError(f"{name!r} cannot name an adapter: begin with a letter, go on with letters, digits and -")
    parts = re.split(r"[-_]+", name.lower())
    return Names("-".join(parts), "_".join(parts), "".join(part.capitalize() for part in parts))


def _filled(template: str, names: Names) -> str:
    return Template((TEMPLATES / template).read_text("utf-8")).substitute(vars(names))


def _faults(names: Names, files: Mapping[str, str]) -> Iterator[str]:
    """Why a package of that name would be in somebody's way."""
    for entry in entries(ADAPTERS):
        if entry.name == names.name:
            yield f"an adapter {entry.name!r} is installed already, by {entry.origin}"
    if keyword.iskeyword(names.module) or keyword.iskeyword(names.class_name):
        yield f"{names.module!r} is a word of the language Python, so it cannot be imported"
    elif names.module in sys.stdlib_module_names:
        yield f"{names.module!r} is a module of Python's standard library, which the new one would hide"
    elif names.module in RESERVED:
        yield f"a file {names.module}.py means something else to Python's tools"
    elif _importable(names.module):
        yield f"a module {names.module!r} is installed already, which the new one would hide"
    elif names.class_name in _imported(files[f"{names.module}.py"]):
        yield f"the class would be called {names.class_name}, like one that it is made of"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is there, and does not say from where
        return True


def _imported(source: str) -> set[str]:
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _occupied(folder: Path) -> Iterator[str]:
    if folder.is_dir() and any(folder.iterdir()):
        yield f"the folder {folder} is not empty"
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            yield f"{place} is a file"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    with atomic_folder(folder) as partial:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
