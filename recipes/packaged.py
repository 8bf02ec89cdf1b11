"""Recipes that installed distributions ship. Listing them imports nothing but this."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from onegpu.adapters.registry import RECIPES, entries

__all__ = ["Packaged", "packaged_recipes"]


@dataclass(frozen=True)
class Packaged:
    """A recipe file of an installed distribution."""

    name: str
    origin: str
    path: Path
    allowed: bool = True  # False when the environment keeps its distribution's plugins out

    @property
    def summary(self) -> str:
        """Its first line, where that is a comment."""
        first = self.path.read_text("utf-8", errors="replace").partition("\n")[0]
        return first.removeprefix("#").strip() if first.startswith("#") else ""


def packaged_recipes() -> list[Packaged]:
    """Every packaged recipe, ours first; a third party's is called `its-entry-point:its-file`."""
    found = [Packaged(path.stem, "onegpu", path) for path in sorted((Path(__file__).parent / "library").glob("*.yaml"))]
    for entry in entries(RECIPES):
        folder = _folder_of(entry.value)
        files = sorted(folder.glob("*.yaml")) if folder is not None else []
        found += [Packaged(f"{entry.name}:{path.stem}", entry.origin, path, entry.allowed) for path in files]
    return found


def _folder_of(module: str) -> Path | None:
    """The folder of a package by its dotted name, without importing it."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):  # what an entry point says need not be a name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *inner)
