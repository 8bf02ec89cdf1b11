"""What plugins say about themselves: descriptions, schemas, and what is broken."""

import dataclasses
import inspect
from typing import Any

from pydantic import BaseModel

from onegpu.adapters import ADAPTERS, TASKS, Adapter, Entry, PluginError, entries, get
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import find, load, unqualified

from .schema import Recipe
from .tasks import Task, get_task

__all__ = ["breakage", "describe_adapter", "describe_task", "recipe_schema"]


def describe_adapter(name: str) -> dict[str, Any]:
    """One adapter: its documentation, capabilities and settings."""
    entry, adapter = find(ADAPTERS, name), get(name)
    capabilities = dataclasses.asdict(adapter.capabilities)
    with answerable(name, entry, "describing itself"):
        return _described(entry, adapter, capabilities)


def describe_task(name: str) -> dict[str, Any]:
    """One task: its documentation, needs and settings."""
    entry, task = find(TASKS, name), get_task(name)
    with answerable(name, entry, "describing itself"):
        return _described(entry, task, task.facts())


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
    names, objects, found = [], [], entries(group)
    for entry in found:
        try:
            model: type[BaseModel] = load(entry, Adapter if group == ADAPTERS else Task)
        except PluginError:
            continue
        name = entry.name if unqualified(entry, found) else f"{entry.distribution}:{entry.name}"
        names.append(name)
        objects.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [_settings_schema(name, model, definitions), {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    return {"anyOf": [{"enum": names}, *objects]}


def _settings_schema(name: str, model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """The settings of one plugin; any, where its author chose types that JSON Schema cannot express."""
    try:
        inner = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")  # two plugins may share a name
    except Exception:
        return {"type": "object"}
    definitions |= {f"{name}.{key}": value for key, value in inner.pop("$defs", {}).items()}
    return inner


def _described(entry: Entry, model: type[BaseModel], facts: dict[str, Any]) -> dict[str, Any]:
    properties = _settings_schema(entry.name, model, {}).get("properties", {})
    settings = [
        {
            "name": name,
            "type": _type_of(properties.get(name, {})),
            "default": "(needed)" if field.is_required() else field.get_default(call_default_factory=True),
            "doc": field.description or "",
        }
        for name, field in model.model_fields.items()
    ]
    return {
        "name": entry.name,
        "origin": entry.origin,
        "doc": inspect.cleandoc(model.__doc__ or "(says nothing about itself)"),  # not its base class's
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
