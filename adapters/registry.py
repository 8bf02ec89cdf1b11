"""Finds adapters, tasks and recipes that installed distributions declare as entry points.

Metadata first: listing reads names, distributions and versions from disk and imports nothing; using one imports that
one. The built-in adapters register exactly as a third party's do. Plugin code comes from installed distributions only,
never from a path or an import string in a recipe or an artefact.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from .errors import PluginError, nearest

__all__ = ["ADAPTERS", "API", "RECIPES", "TASKS", "Entry", "entries", "entry_of", "find", "load"]

ADAPTERS, TASKS, RECIPES = "onegpu.adapters", "onegpu.tasks", "onegpu.recipes"
KINDS = {ADAPTERS: "adapter", TASKS: "task", RECIPES: "recipe collection"}

# The level of the contract that this version speaks. It rises only when a plugin written for the old one would break.
API = 1


@dataclass(frozen=True)
class Entry:
    """One declared entry point: what can be known without importing it."""

    name: str
    distribution: str
    version: str
    point: EntryPoint = field(repr=False)

    @property
    def value(self) -> str:
        """Where the object lives, as `module:attribute`."""
        return self.point.value

    @property
    def origin(self) -> str:
        """Distribution and version, as a user would name them to pip."""
        return f"{self.distribution} {self.version}"


def entries(group: str) -> list[Entry]:
    """All declarations of a group, sorted by name. Imports nothing."""
    found = [_entry(point) for point in importlib.metadata.entry_points(group=group)]
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


def _entry(point: EntryPoint) -> Entry:
    dist = point.dist
    if dist is None:  # only for an entry point that was made by hand
        return Entry(point.name, "unknown", "0", point)
    return Entry(point.name, dist.name, dist.version, point)


def find(group: str, name: str, among: Sequence[Entry] | None = None) -> Entry:
    """The one declaration of `name`, which may be written `distribution:name`.

    Raises:
        PluginError: unknown (with the nearest name), or offered by several distributions.
    """
    known = entries(group) if among is None else among
    wanted, _, bare = name.rpartition(":")
    matches = [e for e in known if e.name == bare and wanted in ("", e.distribution)]
    if not matches:
        hint = nearest(name, [e.name for e in known])
        raise PluginError(f"no {KINDS[group]} is called {name!r}{hint}")
    if len(matches) > 1:
        picks = " or ".join(f"{e.distribution}:{e.name}" for e in matches)
        origins = " and ".join(e.origin for e in matches)
        raise PluginError(f"the {KINDS[group]} {bare!r} is offered by {origins}; write {picks}")
    return matches[0]


def load(entry: Entry, base_class: type) -> Any:
    """Import the one class that an entry declares, and check that it speaks this version's API.

    Raises:
        PluginError: it cannot be imported, is not a `base_class`, or was written for another API level.
    """
    try:
        loaded = entry.point.load()
    except (Exception, SystemExit) as cause:  # whatever a plugin raises must not take the others down
        raise PluginError(f"{entry.name} of {entry.origin} is broken: {_reason(cause)}") from cause
    if not (isinstance(loaded, type) and issubclass(loaded, base_class)):
        raise PluginError(f"{entry.name} of {entry.origin} is broken: {entry.value} is no {base_class.__name__}")
    declared = getattr(loaded, "api", None)
    if declared != API:
        older = not isinstance(declared, int) or declared < API
        side = entry.distribution if older else "onegpu"
        raise PluginError(
            f"{entry.name} of {entry.origin} was written for API level {declared}, onegpu speaks {API}: upgrade {side}"
        )
    return loaded


def _reason(cause: BaseException) -> str:
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__


@cache
def entry_of(group: str, loaded: type) -> Entry | None:
    """The declaration that a class was loaded from, or None when nobody registered it."""
    value = f"{loaded.__module__}:{loaded.__qualname__}"
    return next((e for e in entries(group) if e.value == value), None)
