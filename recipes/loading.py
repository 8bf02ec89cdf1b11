"""Reads a recipe strictly: every fault at once, each with its line, its path and the nearest valid choice."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from onegpu.adapters import ADAPTERS, TASKS, OnegpuError, PluginError, RecipeError, build, entries, get
from onegpu.adapters.errors import nearest, noted, together
from onegpu.adapters.files import there
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import VARIABLE, find, unqualified
from onegpu.adapters.specs import Named, check, split
from onegpu.adapters.validation import Fault, Path as KeyPath, faults

from .document import LARGEST, Document, read_document
from .packaged import packaged_recipes
from .schema import Recipe, Train
from .tasks import Task, get_task

__all__ = ["Loaded", "load_recipe", "parse_recipe"]


Model = TypeVar("Model", bound=BaseModel)
MOST_FAULTS = 8  # in one message


@dataclass(frozen=True)
class Loaded:
    """A recipe that was read, checked and resolved; no weight was touched."""

    name: str
    recipe: Recipe
    stack: tuple[Named, ...]
    task_name: str
    task: Task
    folder: Path  # what relative paths start from
    places: Mapping[KeyPath, str] = field(default_factory=dict)  # of each key, as `file:line`
    allow_base_mismatch: bool = False  # of an adapter that is continued or scored: said with the command, not in it
    fault: OnegpuError | None = None  # what is wrong with the recipe itself, for a preflight that finds the rest

    def resolved(self) -> dict[str, Any]:
        """The recipe with every effective value written out; loading this again gives the same run."""
        content = self.recipe.model_dump()
        content["adapters"] = [{_written(n): _settings(n)} for n in self.stack]
        content["task"] = {self.task_name: self.task.model_dump()}
        return content

    @contextmanager
    def place(self, *path: str | int) -> Iterator[None]:
        """Put the place of a key in front of what is found wrong inside the block."""
        try:
            yield
        except OnegpuError as error:
            above = (path[:n] for n in range(len(path), 0, -1))
            place = next((self.places[part] for part in above if part in self.places), self.name)
            raise type(error)(f"{place}: {error}") from error

    def as_yaml(self) -> str:
        """`resolved` as a file."""
        text: str = yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)
        return text


def load_recipe(name: str, overrides: Sequence[str] = (), *, defer: bool = False) -> Loaded:
    """Load a recipe file, or a packaged recipe by its name, with `key.path=value` overrides.

    Args:
        defer: where the recipe can be read without its wrong keys, hand it on with its `fault`; `preflight` raises it
            together with everything else that is wrong. Nothing but `preflight` may be called with such a recipe.

    Raises:
        RecipeError: with every fault of the recipe.
        PluginError: an adapter or a task is not installed, or broken.
    """
    path = Path(name)
    if there(path) and path.is_file():
        try:
            if path.stat().st_size > LARGEST:
                raise RecipeError(f"{name} has more than {LARGEST:,} bytes: no recipe is so large")
            text = path.read_text("utf-8")
        except UnicodeDecodeError as cause:
            raise RecipeError(f"{name} is not UTF-8: {cause}") from None
        except OSError as cause:
            raise RecipeError(f"{name} cannot be read: {cause.strerror}") from None
        return parse_recipe(text, name=name, folder=path.resolve().parent, overrides=overrides, defer=defer)
    known = {p.name: p for p in packaged_recipes()}
    if name not in known:
        kind = "no such file" if path.suffix or "/" in name else "no such recipe"
        raise RecipeError(f"recipe {name!r}: {kind}{nearest(name, known)}")
    if not known[name].allowed:
        raise PluginError(f"recipe {name!r} of {known[name].origin} is not allowed by {VARIABLE}")
    text = known[name].path.read_text("utf-8")
    return parse_recipe(text, name=name, folder=Path.cwd(), overrides=overrides, defer=defer)


def parse_recipe(text: str, *, name: str, folder: Path, overrides: Sequence[str] = (), defer: bool = False) -> Loaded:
    """Check the text of a recipe. `name` is what messages call it; for `defer` see `load_recipe`."""
    document = read_document(text, name)
    for override in overrides:
        document.override(override)
    found: list[Fault] = []
    try:
        return _checked(document, folder, found)
    except OnegpuError as error:
        if not (defer and found):
            raise
        try:
            return replace(_checked(document.without([fault.path for fault in found]), folder, []), fault=error)
        except OnegpuError:
            raise error from None


def _checked(document: Document, folder: Path, found: list[Fault]) -> Loaded:
    """The recipe of a document; what is wrong with its keys is added to `found`, and raised with the rest."""
    errors: list[OnegpuError] = []  # more than a wrong setting: a plugin that is missing, a stack that cannot be
    recipe = _validated(Recipe, document.content, found)
    stack = _stack(document, found, errors)
    task_name, task = _task(document, found, errors)
    if stack is not None and task is not None:
        with noted(errors), document.at("adapters"):
            check(stack, has_head=task.traits().has_head)
    if found:
        told = [document.explain(fault) for fault in _with_belonging(found, document.content)]
        more = [f"and {len(told) - MOST_FAULTS} more"] if len(told) > MOST_FAULTS else []
        errors.insert(0, RecipeError("\n".join(told[:MOST_FAULTS] + more)))
    if errors:
        raise together(errors)
    assert recipe is not None
    assert stack is not None
    assert task is not None
    short = Path(document.name).stem if Path(document.name).suffix else document.name
    recipe = _with_whole_paths(recipe, ("base", "adapter"), folder)
    task = _with_whole_paths(task, task.traits().paths, folder)
    return Loaded(short, recipe, stack, task_name, task, folder, document.places)


def _with_whole_paths(model: Model, keys: Sequence[str], folder: Path) -> Model:
    """Make relative paths independent of where the recipe lies, so that its resolved form can lie elsewhere."""
    return model.model_copy(update={key: _whole(getattr(model, key), folder) for key in keys})


def _whole(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [source.model_copy(update={"source": _whole(source.source, folder)}) for source in value]
    if isinstance(value, str) and there(folder / value):
        return str((folder / value).resolve())
    return value


# --- validation -------------------------------------------------------------------------------------------------------


def _validated(model: type[BaseModel], content: Any, found: list[Fault], at: KeyPath = ()) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found += faults(error, model, at)
        return None


def _stack(document: Document, found: list[Fault], errors: list[OnegpuError]) -> tuple[Named, ...] | None:
    """The stack; None where something is wrong with one of its adapters."""
    specs, before = document.content.get("adapters") or [], (len(found), len(errors))
    named: list[Named] = []
    for index, spec in enumerate(specs if isinstance(specs, list) else []):
        with noted(errors), document.at("adapters", index):
            try:
                named += build([spec])
            except RecipeError as error:
                inner = error.faults or (((), _after_place(str(error))),)
                found += [Fault(("adapters", index, *path), message) for path, message in inner]
    with noted(errors), document.at("adapters"):
        build(named)  # refuses two of one name
    return tuple(named) if (len(found), len(errors)) == before else None


def _task(document: Document, found: list[Fault], errors: list[OnegpuError]) -> tuple[str, Any]:
    if "task" not in document.content:
        return "", None  # a fault already
    spec = document.content["task"]
    try:
        name, settings = split(spec, "task")
    except RecipeError as error:
        found.append(Fault(("task",), _after_place(str(error))))
        return "", None
    with noted(errors), document.at("task"):
        task_class, entry = get_task(name), find(TASKS, name)
        with answerable(name, entry, "reading its settings"):
            return name, _validated(task_class, settings, found, ("task", name))
    return name, None


def _after_place(text: str) -> str:
    return text.partition(": ")[2] or text


def _with_belonging(found: Sequence[Fault], content: Mapping[str, Any]) -> list[Fault]:
    """Where an unknown key is a known one elsewhere in this recipe, say where it belongs."""
    homes = dict.fromkeys(Recipe.model_fields, "at the top level") | dict.fromkeys(Train.model_fields, "under `train`")
    adapters = content.get("adapters")
    plugins = [("adapters", spec, get) for spec in (adapters if isinstance(adapters, list) else [])]
    for place, spec, loader in (*plugins, ("task", content.get("task"), get_task)):
        try:
            name, _ = split(spec, place)
            homes = dict.fromkeys(loader(name).model_fields, f"under `{name}`") | homes
        except OnegpuError:
            continue  # that is a fault of its own
    told = []
    for fault in found:
        key = str(fault.path[-1]) if fault.path else ""
        if fault.message.startswith("unknown key") and key in homes:
            fault = fault._replace(message=f"unknown key; {key!r} belongs {homes[key]}")
        told.append(fault)
    return told


def _written(named: Named) -> str:
    """The name that means this adapter here: with its distribution where several offer one of that name."""
    assert named.entry is not None
    name = named.entry.name
    return name if unqualified(named.entry, entries(ADAPTERS)) else f"{named.entry.distribution}:{name}"


def _settings(named: Named) -> dict[str, Any]:
    """Every setting of an adapter, as plain values whatever types its author chose."""
    with answerable(named.name, named.entry, "writing its settings"):
        return named.adapter.model_dump(mode="json")
