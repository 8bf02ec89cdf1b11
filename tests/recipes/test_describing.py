import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onegpu.adapters import ADAPTERS, TASKS, PluginError, entries, get
from onegpu.recipes import Recipe, Train, packaged_recipes, parse_recipe
from onegpu.recipes.describing import breakage, describe_adapter, describe_task, recipe_schema
from onegpu.recipes.tasks import get_task

ADAPTER_NAMES = [entry.name for entry in entries(ADAPTERS) if entry.distribution == "onegpu"]
TASK_NAMES = [entry.name for entry in entries(TASKS) if entry.distribution == "onegpu"]


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_an_adapter_is_described_with_every_setting(name: str) -> None:
    told = describe_adapter(name)
    assert told["name"] == name
    assert told["origin"].startswith("onegpu ")
    assert told["doc"] == (get(name).__doc__ or "").strip() or told["doc"].splitlines()[0] in str(get(name).__doc__)
    assert {setting["name"] for setting in told["settings"]} == get(name).model_fields.keys()
    assert all(setting["doc"] and setting["type"] for setting in told["settings"])
    assert isinstance(told["facts"]["trains"], bool)
    json.dumps(told)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_task_is_described_with_its_columns_and_settings(name: str) -> None:
    told = describe_task(name)
    task = get_task(name)
    columns = "as the task inside" if name == "distillation" else ", ".join(task.needs)
    assert told["facts"]["columns"] == columns
    assert {setting["name"]: setting["default"] for setting in told["settings"]}["data"] == "(needed)"
    assert {setting["name"] for setting in told["settings"]} == task.model_fields.keys()
    json.dumps(told)


def test_types_and_defaults_are_told_as_a_recipe_writes_them() -> None:
    told = {setting["name"]: setting for setting in describe_adapter("lora")["settings"]}
    assert (told["rank"]["type"], told["rank"]["default"]) == ("integer", 16)
    assert (told["targets"]["type"], told["targets"]["default"]) == ("string or list of string", "all-linear")
    task = {setting["name"]: setting for setting in describe_task("chat")["settings"]}
    assert task["supervise"]["type"] == "assistant or last or all"


@pytest.mark.parametrize("describe", [describe_adapter, describe_task])
def test_what_is_not_installed_cannot_be_described(describe: Callable[[str], Any]) -> None:
    with pytest.raises(PluginError, match="is called 'nope'"):
        describe("nope")


def test_every_built_in_plugin_works() -> None:
    assert ADAPTER_NAMES
    assert TASK_NAMES
    for group, names in ((ADAPTERS, ADAPTER_NAMES), (TASKS, TASK_NAMES)):
        assert [breakage(group, entry) for entry in entries(group) if entry.name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("onegpu_no_such_module:Toy", "ModuleNotFoundError"),
        ("json:dumps", "is no Adapter"),
        ("json:nothing", "AttributeError"),
    ],
)
def test_a_broken_plugin_is_told_with_its_reason(value: str, reason: str, declare: Callable[..., None]) -> None:
    declare(ADAPTERS, "toy", value)
    (entry,) = [entry for entry in entries(ADAPTERS) if entry.name == "toy"]
    assert reason in str(breakage(ADAPTERS, entry))


# --- JSON Schema ------------------------------------------------------------------------------------------------------


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = recipe_schema()
    references = [node["$ref"] for node in _walk(schema) if isinstance(node.get("$ref"), str)]
    assert references
    for reference in references:
        assert reference.removeprefix("#/$defs/") in schema["$defs"], reference


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = recipe_schema()
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert schema["$defs"]["Train"]["properties"].keys() == Train.model_fields.keys()
    for choice, names, find in (
        (schema["properties"]["adapters"]["items"], ADAPTER_NAMES, get),
        (schema["properties"]["task"], TASK_NAMES, get_task),
    ):
        enum, *objects = choice["anyOf"]
        assert set(enum["enum"]) >= set(names)
        settings = {next(iter(o["properties"])): o["properties"] for o in objects}
        for name in names:
            inner = settings[name][name]["anyOf"][0]
            assert inner["properties"].keys() == find(name).model_fields.keys()
            assert inner["additionalProperties"] is False


def test_a_broken_plugin_is_left_out_of_the_schema(declare: Callable[..., None]) -> None:
    declare(ADAPTERS, "toy", "onegpu_no_such_module:Toy")
    assert "toy" not in json.dumps(recipe_schema())


@pytest.mark.parametrize("value", [True, False, {"every": 2}])
def test_the_schema_takes_each_form_of_a_setting(value: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate({"gradient_checkpointing": value}, Train.model_json_schema())


@pytest.mark.parametrize("name", [packaged.name for packaged in packaged_recipes()])
def test_packaged_recipes_follow_the_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    (packaged,) = [p for p in packaged_recipes() if p.name == name]
    loaded = parse_recipe(packaged.path.read_text("utf-8"), name=name, folder=packaged.path.parent)
    jsonschema.validate(loaded.resolved(), recipe_schema())
