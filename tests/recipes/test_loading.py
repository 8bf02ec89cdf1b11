import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from onegpu.adapters import ADAPTERS, TASKS, DataError, PluginError, RecipeError, StackError, entries, get
from onegpu.recipes import Loaded, Recipe, Train, load_recipe, packaged_recipes, parse_recipe
from onegpu.recipes.tasks import get_task
from onegpu.recipes.tasks.chat import Chat

COMPLETE = """\
base: somewhere
adapters:
  - nf4
  - lora:
      rank: 8
  - layerwise-lr: {decay: 0.9}
task:
  chat:
    data: train.jsonl
train:
  steps: 5
  learning_rate: 2e-5
"""
ADAPTER_NAMES = sorted({entry.name for entry in entries(ADAPTERS) if entry.distribution == "onegpu"})
TASK_NAMES = sorted({entry.name for entry in entries(TASKS) if entry.distribution == "onegpu"})
SECTIONS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("train",): Train,
    **{("task", name): get_task(name) for name in TASK_NAMES},
    **{("adapters", name): get(name) for name in ADAPTER_NAMES},
}
LEAVES = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def _parse(text: str, *overrides: str) -> Loaded:
    return parse_recipe(text, name="recipe.yaml", folder=Path("/nowhere"), overrides=overrides)


def _refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        _parse(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def _with_key(section: tuple[str, ...], key: str, value: Any = None, *, instead_of: str | None = None) -> str:
    """A recipe with `key` in `section`, one key a line."""
    task = section[1] if section[:1] == ("task",) else "chat"
    adapter = section[1] if section[:1] == ("adapters",) else "lora"
    content: dict[str, Any] = {
        "base": "somewhere",
        "adapters": [{adapter: {}}],
        "task": {task: {"data": "train.jsonl"}},
        "train": {},
    }
    place = content
    for part in section:
        place = place[part][0] if isinstance(place[part], list) else place[part]
    if instead_of is not None:
        value = place.pop(instead_of, value)
    place[key] = value
    return yaml.safe_dump(content, sort_keys=False)


def _line_of(text: str, key: str) -> int:
    (line,) = [n for n, line in enumerate(text.splitlines(), 1) if line.lstrip(" -").startswith(f"{key}:")]
    return line


def _below(text: str, section: tuple[str, ...]) -> str:
    """How the path of a section begins in a message."""
    return ".".join(section).replace("adapters.", "adapters[0].")


def test_a_complete_recipe_is_read() -> None:
    loaded = _parse(COMPLETE)
    assert loaded.name == "recipe"
    assert loaded.recipe.base == "somewhere"
    assert [named.name for named in loaded.stack] == ["nf4", "lora", "layerwise-lr"]
    assert loaded.stack[1].adapter.model_dump()["rank"] == 8
    assert loaded.task_name == "chat"
    assert loaded.recipe.train.steps == 5


# --- unknown and misplaced keys ---------------------------------------------------------------------------------------


def test_there_are_leaf_keys_in_every_section() -> None:
    assert len(ADAPTER_NAMES) >= 60
    assert len(LEAVES) > 40
    assert {section for section, _ in LEAVES} == set(SECTIONS)


def test_a_task_that_is_left_empty_is_a_fault_at_its_line() -> None:
    assert "recipe.yaml:2: task: write a name, or one name with its settings" in _refusal("base: x\ntask:\n")


def test_a_path_that_no_file_can_have_is_no_path(tmp_path: Path) -> None:
    assert parse_recipe(f"base: {'x' * 5000}\ntask: {{chat: {{data: y}}}}\nadapters: [lora]", name="r", folder=tmp_path)


def test_of_many_faults_the_first_are_told() -> None:
    told = _refusal("base: x\nadapters: [lora]\ntask: {chat: {data: y}}\n" + "".join(f"key{i}: 1\n" for i in range(30)))
    assert len(told.splitlines()) == 9
    assert told.endswith("and 22 more")


@pytest.mark.parametrize(("section", "key"), LEAVES, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_a_misspelt_key_is_refused_with_its_line_and_the_right_spelling(section: tuple[str, ...], key: str) -> None:
    wrong = f"{key}x"
    text = _with_key(section, wrong, instead_of=key)
    lines = _refusal(text).splitlines()
    place = ".".join(filter(None, (_below(text, section), wrong)))
    (line,) = [line for line in lines if f"{place}: unknown key" in line]
    assert line.startswith(f"recipe.yaml:{_line_of(text, wrong)}: ")
    assert f"did you mean {key!r}?" in line


@pytest.mark.parametrize("key", sorted(Train.model_fields))
def test_a_setting_of_training_at_the_top_is_sent_where_it_belongs(key: str) -> None:
    text = _with_key((), key)
    assert f"recipe.yaml:{_line_of(text, key)}: {key}: unknown key; {key!r} belongs under `train`" in _refusal(text)


@pytest.mark.parametrize("home", ["train", "task.chat", "adapters.lora"])
@pytest.mark.parametrize("key", sorted(set(Recipe.model_fields)))
def test_a_key_of_the_top_level_elsewhere_is_sent_to_the_top(home: str, key: str) -> None:
    text = _with_key(tuple(home.split(".")), key)
    assert f"{key!r} belongs at the top level" in _refusal(text)


@pytest.mark.parametrize("key", sorted(set(Chat.model_fields)))
@pytest.mark.parametrize("home", ["", "train", "adapters.lora"])
def test_a_setting_of_the_task_elsewhere_is_sent_to_the_task(home: str, key: str) -> None:
    text = _with_key(tuple(filter(None, home.split("."))), key)
    assert f"{key!r} belongs under `chat`" in _refusal(text)


@pytest.mark.parametrize("key", sorted(set(get("lora").model_fields) - {"name"}))
@pytest.mark.parametrize("home", ["", "train", "task.chat"])
def test_a_setting_of_an_adapter_elsewhere_is_sent_to_the_adapter(home: str, key: str) -> None:
    text = _with_key(tuple(filter(None, home.split("."))), key)
    assert f"{key!r} belongs under `lora`" in _refusal(text)


def test_all_faults_are_told_at_once() -> None:
    text = COMPLETE.replace("rank: 8", "rnak: 8").replace("steps: 5", "stesp: 5").replace("decay: 0.9", "decay: 9")
    assert len(_refusal(text).splitlines()) == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["loraa"], ["did you mean 'lora'"]),
        (["full", "int8"], ["a base is packed once", "full trains the base itself"]),
        (["lora"], ["two adapters are called 'lora'"]),
    ],
    ids=str,
)
def test_a_missing_plugin_and_an_impossible_stack_are_told_with_the_other_faults(
    more: list[str], told: list[str]
) -> None:
    content = yaml.safe_load(COMPLETE)
    content["adapters"] += more
    content["train"]["stesp"] = content["train"].pop("steps")
    found = _refusal(yaml.safe_dump(content))
    for text in ("train.stesp: unknown key; did you mean 'steps'?", *told):
        assert text in found


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "becomes", "told"),
    [
        ("rank: 8", "rank: eight", "recipe.yaml:5: adapters[1].lora.rank: must be a valid integer, not 'eight'"),
        ("rank: 8", "rank: 8.5", "recipe.yaml:5: adapters[1].lora.rank: "),
        ("rank: 8", "rank: 0", "recipe.yaml:5: adapters[1].lora.rank: must be greater than or equal to 1, not 0"),
        ("rank: 8", 'rank: "8"', "recipe.yaml:5: adapters[1].lora.rank: must be a valid integer, not '8'"),
        ("steps: 5", "steps: yes", "recipe.yaml:11: train.steps: must be a valid integer, not True"),
        ("steps: 5", "steps: 1e3", "recipe.yaml:11: train.steps: must be a valid integer, not 1000.0"),
        ("2e-5", '"2e-5"', "recipe.yaml:12: train.learning_rate: must be a valid number, not '2e-5'"),
        ("data: train.jsonl", "limit: 3", "recipe.yaml:8: task.chat.data: this key is needed"),
        ("base: somewhere", "revision: main", "recipe.yaml: base: this key is needed"),
        ("base: somewhere", "base: [a]", "recipe.yaml:1: base: must be a valid string"),
        ("  - nf4", "  - nf4: 8", "recipe.yaml:3: adapters[0]: write a name, or one name with its settings"),
        ("  - nf4", "  - 4", "recipe.yaml:3: adapters[0]: write a name, or one name with its settings"),
        ("  chat:\n    data: train.jsonl", "  - chat", "recipe.yaml:7: task: write a name, or one name"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(was: str, becomes: str, told: str) -> None:
    assert was in COMPLETE
    assert told in _refusal(COMPLETE.replace(was, becomes))


@pytest.mark.parametrize("number", ["2e-5", "2E-5", "2.0e-5", ".2e-4", "+2e-5", "20e-6", "0.00002"])
def test_a_number_in_any_notation_is_a_number(number: str) -> None:
    assert _parse(COMPLETE.replace("2e-5", number)).recipe.train.learning_rate == pytest.approx(2e-5, rel=1e-12)
    assert _parse(COMPLETE, f"train.learning_rate={number}").recipe.train.learning_rate == pytest.approx(2e-5)


@pytest.mark.parametrize("text", ["2e", "e-5", "2e-5x", "1e5e5"])
def test_what_only_resembles_a_number_stays_text(text: str) -> None:
    assert _parse(COMPLETE.replace("somewhere", text)).recipe.base == text


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: a\nbase: b\n", "recipe.yaml:2: base: this key is given twice"),
        ("train:\n  seed: 1\n  seed: 2\n", "recipe.yaml:3: train.seed: this key is given twice"),
        ("base: a\n1: b\n", "recipe.yaml:2: 1: a key must be text, not 1"),
        ("train:\n  yes: 1\n", "recipe.yaml:2: train.True: a key must be text, not True"),
        ("base: [a\ntask: b\n", "not YAML"),
        ("base: a\n\ttask: b\n", "recipe.yaml:2: not YAML"),
        ("base: !!python/object:os.system x\n", "recipe.yaml:1: not YAML"),
        ("base: a\x00b\n", "recipe.yaml: not YAML"),
        ("- a\n- b\n", "a recipe is a set of keys"),
        ("just text\n", "a recipe is a set of keys"),
        ("", "base: this key is needed"),
        ("base: &a\n  - *a\n", "recipe.yaml:1: not a recipe: an alias contains itself"),
    ],
    ids=range(12),
)
def test_broken_yaml_is_refused_with_its_line(text: str, told: str) -> None:
    assert told in _refusal(text)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"base: \xff\xfe\n")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(str(path))


def test_an_alias_stands_for_what_it_names() -> None:
    text = COMPLETE.replace("rank: 8", "rank: &size 8\n      alpha: *size")
    lora = _parse(text).stack[1].adapter.model_dump()
    assert (lora["rank"], lora["alpha"]) == (8, 8)


# --- plugins and stacks -----------------------------------------------------------------------------------------------


def test_an_unknown_adapter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PluginError, match=r"recipe.yaml:4: adapters\[1\]: .*'loar'.*did you mean 'lora'"):
        _parse(COMPLETE.replace("lora:", "loar:"))


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(PluginError, match=r"recipe.yaml:7: task: .*'chatt'.*did you mean 'chat'"):
        _parse(COMPLETE.replace("chat:", "chatt:"))


@pytest.mark.parametrize(
    ("adapters", "told"),
    [
        ("[lora, {lora: {rank: 4}}]", "two adapters are called 'lora'"),
        ("[lora, {prefix: {name: lora}}]", "two adapters are called 'lora'"),
        ("[nf4, int8, lora]", "a base is packed once"),
        ("[nf4, full]", "full cannot work on what nf4 has packed"),
        ("[full, lora]", "full trains the base itself"),
        ("[nf4]", "nothing would be trained"),
        ("[]", "nothing would be trained"),
        ("[layerwise-lr]", "nothing would be trained"),
    ],
)
def test_adapters_that_cannot_work_together_are_refused_with_the_place(adapters: str, told: str) -> None:
    with pytest.raises(StackError) as caught:
        _parse(f"base: somewhere\ntask: {{chat: {{data: x.jsonl}}}}\nadapters: {adapters}\n")
    assert str(caught.value).startswith("recipe.yaml:3: adapters: ")
    assert told in str(caught.value)


def test_a_task_with_a_head_needs_no_adapter() -> None:
    assert _parse("base: somewhere\ntask: {classification: {data: x.csv}}\n").stack == ()


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=9", ("train", "steps"), 9),
        ("train.clip=null", ("train", "clip"), None),
        ("train.micro_batch=auto", ("train", "micro_batch"), "auto"),
        ("base=elsewhere", ("base",), "elsewhere"),
        ("base=a=b", ("base",), "a=b"),
        ("task.chat.max_length=99", ("task", "chat", "max_length"), 99),
        ("adapters.lora.rank=4", ("adapters", 1, "lora", "rank"), 4),
        ("adapters.1.rank=4", ("adapters", 1, "lora", "rank"), 4),
        ("adapters.lora.targets=[q_proj, v_proj]", ("adapters", 1, "lora", "targets"), ["q_proj", "v_proj"]),
        ("adapters.nf4.double_quantisation=false", ("adapters", 0, "nf4", "double_quantisation"), False),
        ("adapters.0=int8", ("adapters", 0, "int8", "name"), None),
        ("adapters.layerwise-lr={layerwise-lr: {decay: 0.5}}", ("adapters", 2, "layerwise-lr", "decay"), 0.5),
        ("adapters=[prefix]", ("adapters", 0, "prefix", "length"), 16),
    ],
)
def test_an_override_changes_one_value(override: str, path: tuple[str | int, ...], value: object) -> None:
    found: Any = _parse(COMPLETE, override).resolved()
    for part in path:
        found = found[part]
    assert found == value


def test_an_override_may_make_the_section_it_needs() -> None:
    loaded = _parse("base: a\nadapters: [lora]\n", "task.chat.data=x.jsonl", "train.seed=3", "adapters.lora.rank=2")
    assert (loaded.task.data, loaded.recipe.train.seed) == ("x.jsonl", 3)
    assert loaded.stack[0].adapter.model_dump()["rank"] == 2


def test_the_last_override_of_a_value_wins() -> None:
    assert _parse(COMPLETE, "train.steps=7", "train.steps=8").recipe.train.steps == 8


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "--set train.steps: write key.path=value"),
        ("=5", "--set =5: write key.path=value"),
        ("train.steps=[1", "--set train.steps=[1: '[1' is not a YAML value"),
        ("train.stesp=5", "--set train.stesp=5: train.stesp: unknown key; did you mean 'steps'?"),
        ("stesp=5", "--set stesp=5: stesp: unknown key"),
        ("steps=5", "'steps' belongs under `train`"),
        ("train.steps=many", "--set train.steps=many: train.steps: must be a valid integer, not 'many'"),
        ("adapters.loar.rank=4", "--set adapters.loar.rank=4: 'loar' is not in the list; did you mean 'lora'?"),
        ("adapters.7.rank=4", "'7' is not in the list"),
        ("adapters.lora.rnak=4", "--set adapters.lora.rnak=4: adapters[1].lora.rnak: unknown key"),
        ("adapters.lora=4", "--set adapters.lora=4: adapters[1]: write a name, or one name with its settings"),
        ("base.x=4", "'base' is a value, it has no keys below it"),
        ("train.steps.x=4", "'steps' is a value, it has no keys below it"),
        ("train=", "--set train=: train: "),
        ("adapters=[{lora: {rank: 2, rank: 4}}]", "given twice"),
    ],
)
def test_a_wrong_override_is_refused_by_its_own_text(override: str, told: str) -> None:
    assert told in _refusal(COMPLETE, override)


@pytest.mark.parametrize("item", ["{lora: {}, prefix: {}}", "4", "[]", "{}", "{lora: 8}"])
def test_an_override_into_a_malformed_item_is_refused(item: str) -> None:
    text = f"base: somewhere\ntask: {{chat: {{data: x.jsonl}}}}\nadapters:\n  - {item}\n"
    assert "adapters" in _refusal(text, "adapters.0.rank=4")


def test_an_adapter_given_twice_is_reached_by_its_index_only() -> None:
    text = COMPLETE.replace("  - nf4\n", "  - lora: {name: first}\n")
    assert "is there more than once, use its index" in _refusal(text, "adapters.lora.rank=4")
    assert _parse(text, "adapters.0.rank=4").stack[0].adapter.model_dump()["rank"] == 4


# --- resolved form and paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [COMPLETE, *(p.path.read_text("utf-8") for p in packaged_recipes())])
def test_the_resolved_recipe_loads_to_itself(text: str) -> None:
    once = _parse(text)
    again = _parse(once.as_yaml())
    assert again.resolved() == once.resolved()
    assert again.as_yaml() == once.as_yaml()


def test_the_resolved_recipe_says_every_setting() -> None:
    resolved = _parse(COMPLETE).resolved()
    assert resolved.keys() == Recipe.model_fields.keys()
    assert resolved["train"].keys() == Train.model_fields.keys()
    assert resolved["task"]["chat"].keys() == Chat.model_fields.keys()
    assert resolved["adapters"][1]["lora"].keys() == get("lora").model_fields.keys()


def test_relative_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    for name in ("train.jsonl", "held.jsonl"):
        (home / name).touch()
    (home / "recipe.yaml").write_text(
        "base: model\nadapters: [lora]\nadapter: model\ntask: {chat: {data: train.jsonl, evaluation: held.jsonl}}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(os.path.join("home", "recipe.yaml"))
    assert loaded.recipe.base == loaded.recipe.adapter == str(home / "model")
    assert (loaded.task.data, loaded.task.evaluation) == (str(home / "train.jsonl"), str(home / "held.jsonl"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("quickstrat", "no such recipe; did you mean 'quickstart'?"),
        ("missing.yaml", "no such file"),
        ("folder/missing", "no such file"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(name: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told.replace("?", r"\?")):
        load_recipe(name)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("train", "steps"), "recipe.yaml:11"),
        (("task", "chat", "data"), "recipe.yaml:9"),
        (("task", "chat", "limit"), "recipe.yaml:8"),  # not written: the section it would be in
        (("nowhere",), "recipe"),
    ],
)
def test_what_is_found_wrong_later_is_told_with_its_line(path: tuple[str, ...], place: str) -> None:
    with pytest.raises(DataError, match=f"^{place}: bad$"), _parse(COMPLETE).place(*path):
        raise DataError("bad")
