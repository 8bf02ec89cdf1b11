"""Turns what pydantic found wrong in a configuration into messages that name the place and the valid choices."""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .errors import brief, nearest

__all__ = ["Fault", "faults"]

Path = tuple[str | int, ...]


class Fault(NamedTuple):
    """One thing wrong in a configuration."""

    path: Path
    message: str


def faults(error: ValidationError, model: type[BaseModel], at: Path = ()) -> Iterator[Fault]:
    """Every fault of a validation; `at` is the path of the validated part inside the whole."""
    seen = set()
    for detail in error.errors(include_url=False):
        path = _without_union_tags(model, detail["loc"])
        message = _message(detail, model, path)
        if (path, message) not in seen:
            seen.add((path, message))
            yield Fault((*at, *path), message)


def _message(detail: Any, model: type[BaseModel], path: Path) -> str:
    if detail["type"] == "extra_forbidden":
        parent = _model_at(model, path[:-1])
        return f"unknown key{nearest(str(path[-1]), parent.model_fields if parent else ())}"
    if detail["type"] == "missing":
        return "this key is needed"
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ").replace("should ", "must ", 1)
    text = text[:1].lower() + text[1:]
    given = detail["input"]
    return f"{text}, not {brief(given)}" if isinstance(given, (str, int, float, bool, list, type(None))) else text


def _without_union_tags(model: type[BaseModel], location: Path) -> Path:
    """pydantic adds the tried type to the location of a union (`targets.str`): keep only what the user wrote."""
    path: list[str | int] = []
    current: Any = model  # the type at `path`; None where it is not known
    for part in location:
        members = [member for member in _members(current) if member is not NoneType]
        if len(members) > 1:
            current = None
            continue
        path.append(part)
        current = _below(members[0] if members else current, part)
    return tuple(path)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()


def _below(annotation: Any, part: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    return get_args(annotation)[-1] if get_origin(annotation) in (dict, list) else None


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    current: Any = model
    for part in path:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return None
        current = current.model_fields[str(part)].annotation
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
