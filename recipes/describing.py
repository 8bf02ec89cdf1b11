"""What plugins say about themselves: descriptions, schemas, and what is broken."""

import dataclasses
import inspect
from typing import Any

from pydantic import BaseModel

from onegpu.adapters import ADAPTERS, TASKS, Adapter, Entry, PluginError, entries, get
from onegpu.adapters.registry import find, load

from .schema import Recipe
from .tasks import Task, get_task

__all__ = ["breakage", "describe_adapter", "describe_task", "recipe_schema"]


def describe_adapter(name: str) -> dict[str, Any]:
    """One adapter: its documentation, capabilities and settings."""
    entry, adapter = find(ADAPTERS, name), get(name)
    return _described(entry, adapter, dataclasses.asdict(adapter.capabilities))


def describe_task(name: str) -> dict[str, Any]:
    """One task: its documentation, needs and settings."""
    entry, task = find(TASKS, name), get_task(name)
    return _described(entry, task, {"model": task.kind, "columns": ", ".join(task.needs), "own head": task.has_head})


def breakage(group: str, entry: Entry) -> str | None:
    """Why a plugin cannot be used, or None."""
    try:
        load(entry, Adapter if group == ADAPTERS else Task)
    except PluginError as error:
        return str(error)
    return None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the settings of every adapter and task that is installed and not broken."""
    schema = Recipe.model_json_schema()
    schema["$defs"] = schema.get("$defs", {})
    schema["properties"]["adapters"]["items"] = _choice(ADAPTERS, schema["$defs"])
    schema["properties"]["task"] |= _choice(TASKS, schema["$defs"])
    return schema


def _choice(group: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Either a name, or an object whose one key is a name and whose value are its settings."""
    names, objects = [], []
    for entry in entries(group):
        if breakage(group, entry) is not None:
            continue
        model: type[BaseModel] = load(entry, Adapter if group == ADAPTERS else Task)
        inner = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= inner.pop("$defs", {})
        names.append(entry.name)
        objects.append(
            {
                "type": "object",
                "properties": {entry.name: {"anyOf": [inner, {"type": "null"}]}},
                "required": [entry.name],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [{"enum": names}, *objects]}


def _described(entry: Entry, model: type[BaseModel], facts: dict[str, Any]) -> dict[str, Any]:
    properties = model.model_json_schema()["properties"]
    settings = [
        {
            "name": name,
            "type": _type_of(properties[name]),
            "default": "(needed)" if field.is_required() else field.get_default(call_default_factory=True),
            "doc": field.description or "",
        }
        for name, field in model.model_fields.items()
    ]
    return {
        "name": entry.name,
        "origin": entry.origin,
        "doc": inspect.getdoc(model),
        "facts": facts,
        "settings": settings,
    }


def _type_of(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_of(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    return str(schema.get("const", schema.get("type", "any")))
