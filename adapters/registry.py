"""Finds adapters, tasks and recipes that installed distributions declare as entry points.

Metadata first: listing reads names, distributions and versions from disk and imports nothing; using one imports that
one. The built-in adapters register exactly as a third party's do. Plugin code comes from installed distributions only,
never from a path or an import string in a recipe or an artefact. `ONEGPU_PLUGINS=none|name,name` limits whose code may
be imported at all.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint
from typing import Any

from .errors import PluginError, nearest

__all__ = [
    "ADAPTERS",
    "API",
    "OURS",
    "RECIPES",
    "TASKS",
    "VARIABLE",
    "Entry",
    "entries",
    "entry_of",
    "find",
    "load",
    "reason",
    "unmatched",
    "unqualified",
]

ADAPTERS, TASKS, RECIPES = "onegpu.adapters", "onegpu.tasks", "onegpu.recipes"
KINDS = {ADAPTERS: "adapter", TASKS: "task", RECIPES: "recipe collection"}

# The level of the contract that this version speaks. It rises only when a plugin written for the old one would break.
API = 1

# The distribution whose plugins always may load.
OURS = "onegpu"
VARIABLE = "ONEGPU_PLUGINS"


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

    @property
    def allowed(self) -> bool:
        """Whether the environment lets it load; ours always may."""
        listed = _listed()
        return listed is None or self.distribution == OURS or any(self.meant_by(item) for item in listed)

    def meant_by(self, item: str) -> bool:
        """Whether an item of the variable is its name, its distribution, or `distribution:name`."""
        distribution, _, name = item.rpartition(":")
        if distribution:
            return name == self.name and _normal(distribution) == _normal(self.distribution)
        return name == self.name or _normal(name) == _normal(self.distribution)


def _listed() -> tuple[str, ...] | None:
    """The items of the variable, none for `none`; None when it is unset or empty, and everything may load."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return None
    return () if value == "none" else tuple(item.strip() for item in value.split(",") if item.strip())


def _normal(distribution: str) -> str:
    """My_Package and my-package are one to pip."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def unmatched() -> list[str]:
    """A sentence for each item of the variable that nothing installed is called: a typing error must not be silent."""
    listed = _listed()
    if not listed:
        return []
    everything = [entry for group in KINDS for entry in entries(group)]
    wrong = [item for item in listed if not any(entry.meant_by(item) for entry in everything)]
    theirs = {name for e in everything if e.distribution != OURS for name in (e.name, e.distribution)}
    return [f"{VARIABLE} lists {item!r}, and no plugin is called that{nearest(item, theirs)}" for item in wrong]


def entries(group: str) -> list[Entry]:
    """All declarations of a group, sorted by name. Imports nothing."""
    points = importlib.metadata.entry_points(group=group)
    dists = {id(point.dist): point.dist for point in points}
    origins = {key: _origin(dist) for key, dist in dists.items()}  # once each: it parses the whole description
    found = [Entry(point.name, *origins[id(point.dist)], point) for point in points]
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


def _origin(dist: Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution; there is none for an entry point that was made by hand."""
    if dist is None:
        return "unknown", "0"
    try:
        metadata = dist.metadata
        return metadata["Name"] or "unknown", metadata["Version"] or "0"
    except Exception:  # a half-removed installation has no METADATA, and each version of Python says so in its own way
        return "unknown", "0"


def find(group: str, name: str, among: Sequence[Entry] | None = None) -> Entry:
    """The one declaration of `name`, which may be written `distribution:name`.

    What may not load does not make a name ambiguous, and is found where nothing else is: `load` refuses it.

    Raises:
        PluginError: unknown (with the nearest name), or offered by several distributions.
    """
    known = entries(group) if among is None else among
    wanted, _, bare = name.rpartition(":")
    matches = [e for e in known if e.name == bare and _normal(wanted) in ("", _normal(e.distribution))]
    if not matches:
        hint = nearest(name, [e.name for e in known])
        raise PluginError(f"no {KINDS[group]} is called {name!r}{hint}")
    matches = [e for e in matches if e.allowed] or matches
    if len(matches) > 1:
        picks = " or ".join(f"{e.distribution}:{e.name}" for e in matches)
        origins = " and ".join(e.origin for e in matches)
        raise PluginError(f"the {KINDS[group]} {bare!r} is offered by {origins}; write {picks}")
    return matches[0]


def unqualified(entry: Entry, among: Sequence[Entry]) -> bool:
    """Whether the bare name means this one; otherwise several offer it, and it must be written `distribution:name`."""
    rivals = [e for e in among if e.name == entry.name]
    return len([e for e in rivals if e.allowed] or rivals) == 1


def load(entry: Entry, base_class: type) -> Any:
    """Import the one class that an entry declares, and check that it speaks this version's API.

    Raises:
        PluginError: it may not load, cannot be imported, is not a `base_class`, or was written for another API level.
    """
    if not entry.allowed:
        raise PluginError(_not_allowed(entry))
    try:
        loaded = entry.point.load()
        fits = isinstance(loaded, type) and issubclass(loaded, base_class)
        declared = getattr(loaded, "api", None)
    except (Exception, SystemExit) as cause:  # whatever a plugin raises must not take the others down
        raise PluginError(f"{entry.name} of {entry.origin} is broken: {reason(cause)}{_hint(entry, cause)}") from cause
    if not fits:
        raise PluginError(f"{entry.name} of {entry.origin} is broken: {entry.value} is no {base_class.__name__}")
    if declared != API:
        older = not isinstance(declared, int) or declared < API
        side = entry.distribution if older else OURS
        raise PluginError(
            f"{entry.name} of {entry.origin} was written for API level {declared}, onegpu speaks {API}: upgrade {side}"
        )
    return loaded


def _not_allowed(entry: Entry) -> str:
    value = os.environ[VARIABLE].strip()
    wider = entry.name if value == "none" else f"{value},{entry.name}"
    text = f"{entry.name} of {entry.origin} is not allowed by {VARIABLE}={value}; to trust it, set {VARIABLE}={wider}"
    return "; ".join([text, *unmatched()])


def _hint(entry: Entry, cause: BaseException) -> str:
    missing = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    foreign = missing and missing != entry.value.partition(".")[0]
    command = f"pip install {missing}" if foreign else f"pip install --upgrade {entry.distribution}"
    return f"; `onegpu --debug` shows where, `{command}` may help"


def reason(cause: BaseException) -> str:
    """An exception in one line: its type, and the first line of what it says."""
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__


@cache
def entry_of(group: str, loaded: type) -> Entry | None:
    """The declaration that a class was loaded from, or None when nobody registered it."""
    value = f"{loaded.__module__}:{loaded.__qualname__}"
    return next((e for e in entries(group) if e.value == value), None)
