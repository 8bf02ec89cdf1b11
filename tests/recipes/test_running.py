import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onegpu.adapters import (
    ArtefactError,
    InvalidInput,
    OnegpuError,
    RecipeError,
    StackError,
    TargetError,
    load,
    load_base,
)
from onegpu.recipes import Loaded, Outcome, preflight, run as run_loudly

LORA = {"lora": {"rank": 4}}
Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Bytes = Callable[[Path], dict[str, bytes]]
Tensors = Callable[[Path], dict[str, Tensor]]


# --- reproducible bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stack", [[{"lora": {"rank": 4, "dropout": 0.1}}], ["nf4", LORA, {"prefix": {"length": 3}}], ["full"]], ids=str
)
def test_one_recipe_and_seed_give_the_same_bytes(
    stack: list[Any], chat_recipe: Recipe, run: Run, folder_bytes: Bytes
) -> None:
    first, second = (run(chat_recipe(stack, task={"evaluation": 0.2}), name) for name in ("first", "second"))
    assert folder_bytes(first.adapter) == folder_bytes(second.adapter)


def test_another_seed_gives_another_adapter(chat_recipe: Recipe, run: Run, saved_tensors: Tensors) -> None:
    first, second = (saved_tensors(run(chat_recipe(train={"seed": seed}), str(seed)).adapter) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first if "lora_A" in name)


def test_a_classifier_with_its_new_head_is_reproducible_too(
    class_recipe: Recipe, run: Run, folder_bytes: Bytes
) -> None:
    first, second = (run(class_recipe(task={"evaluation": 0.2}), name) for name in ("first", "second"))
    assert folder_bytes(first.adapter) == folder_bytes(second.adapter)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_it_should(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe()
    run(loaded)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "metrics.jsonl", "recipe.yaml"]
    assert (tmp_path / "out/recipe.yaml").read_text("utf-8") == loaded.as_yaml()


def test_the_manifest_tells_what_the_run_was(class_recipe: Recipe, run: Run) -> None:
    loaded = class_recipe([LORA, {"layerwise-lr": {"decay": 0.5}}], task={"evaluation": 0.2})
    outcome = run(loaded)
    manifest = json.loads((outcome.adapter / "manifest.json").read_text("utf-8"))
    facts = manifest["run"]
    assert facts["train"] == loaded.recipe.train.model_dump()
    assert facts["labels"] == ["money", "sports", "weather"]
    assert facts["data"]["train_rows"] == 7  # of ten rows in three classes: one of each is held out
    assert facts["steps"] == 2
    assert facts["scores"] == outcome.after
    assert facts["threads"] == 1
    assert [group["learning_rate"] for group in facts["groups"]] == [0.0025, 0.005, 0.01]
    assert sum(group["tensors"] for group in facts["groups"]) == 2 * 2 * 6 + 2 * 1 + 2  # two layers, pooler, head


def test_the_scores_before_are_those_of_the_base_alone(chat_recipe: Recipe, run: Run, chat_base: Path) -> None:
    # A fresh prefix acts like a prompt; evaluation at step 0 is without it.
    task = {"evaluation": 0.2}
    lora, prefix = (run(chat_recipe([s], task=task), next(iter(s))) for s in (LORA, {"prefix": {"length": 3}}))
    assert lora.before == pytest.approx(
        prefix.before, rel=1e-6
    )  # rows are packed beside one and padded beside the other


# --- preflight --------------------------------------------------------------------------------------------------------


def _refusal(loaded: Loaded, run: Run, tmp_path: Path, *, key: tuple[str | int, ...]) -> str:
    """The message of a run that is refused before it wrote anything, with the line of the key at fault in front."""
    with pytest.raises(OnegpuError) as caught:
        run(loaded)
    assert isinstance(caught.value, InvalidInput)
    assert not (tmp_path / "out").exists()
    assert str(caught.value).startswith(f"{loaded.places[key]}: ")
    return str(caught.value)


@pytest.fixture
def base_without(chat_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`base_without("tokenizer.json")`: the tiny chat base, incomplete."""

    def build(name: str) -> Path:
        folder = tmp_path / "incomplete"
        shutil.copytree(chat_base, folder, ignore=lambda _, names: [n for n in names if n.startswith(name)])
        return folder

    return build


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer", "has no tokenizer that can be read"),
        ("chat_template", "has no chat template"),
    ],
)
def test_an_incomplete_base_is_refused_by_what_it_lacks(
    missing: str, told: str, base_without: Callable[[str], Path], chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    loaded = chat_recipe(base=base_without(missing))
    assert told in _refusal(loaded, run, tmp_path, key=("base",))


def test_a_base_of_an_unknown_kind_is_refused_at_its_own_line(
    base_without: Callable[[str], Path], chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    folder = base_without("nothing")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    loaded = chat_recipe(base=folder)
    assert "cannot be used as a causal-lm model" in _refusal(loaded, run, tmp_path, key=("base",))


def test_a_missing_base_is_refused_at_its_line(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe(base="nowhere/at/all")
    assert "no such file or folder" in _refusal(loaded, run, tmp_path, key=("base",))


def test_targets_that_match_nothing_are_refused_at_their_line(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe([{"lora": {"targets": ["q_prj"]}}])
    told = _refusal(loaded, run, tmp_path, key=("adapters", 0))
    assert "target 'q_prj' matches no linear layer; did you mean 'q_proj'?" in told


def test_a_limit_above_what_the_model_can_take_is_refused(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe(task={"max_length": 257})
    told = _refusal(loaded, run, tmp_path, key=("task", "chat", "max_length"))
    assert "max_length is 257, and the model has room for 256 tokens" in told


def test_a_prefix_takes_its_share_of_the_room(chat_recipe: Recipe) -> None:
    assert preflight(chat_recipe([LORA])).reader.limit == 256
    assert preflight(chat_recipe([LORA, {"prefix": {"length": 6}}])).reader.limit == 250


def test_a_revision_of_a_folder_is_refused_rather_than_ignored(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe()
    loaded = type(loaded)(**(vars(loaded) | {"recipe": loaded.recipe.model_copy(update={"revision": "main"})}))
    with pytest.raises(RecipeError, match="revision"):
        run(loaded)


def test_the_stop_tokens_are_those_of_tokenizer_and_model(
    chat_recipe: Recipe, base_without: Callable[[str], Path]
) -> None:
    folder = base_without("nothing")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token_id": [1, 7]}), "utf-8")
    assert preflight(chat_recipe(base=folder)).reader.stops == {1, 7}


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"steps": 7}, 7),
        ({"steps": None, "epochs": 2, "effective_batch": 4}, 6),
        ({"steps": None, "effective_batch": 16}, 1),
    ],
)
def test_steps_follow_from_epochs_where_they_are_not_given(
    train: dict[str, Any], steps: int, chat_recipe: Recipe
) -> None:
    assert preflight(chat_recipe(train=train)).steps == steps


def test_a_row_without_an_answer_is_not_demonstrated(
    chat_recipe: Recipe, run: Run, rows: list[dict[str, Any]], jsonl: Callable[..., Path]
) -> None:
    broken = {"messages": [{"role": "user", "content": "alone"}]}
    many = [{"messages": [*row["messages"], *row["messages"]]} for row in rows] + rows
    held = jsonl([broken, rows[0]], "held.jsonl")
    outcome = run(chat_recipe(task={"data": str(jsonl(many * 2, "many.jsonl")), "evaluation": str(held)}))
    assert [question for question, _ in outcome.demonstrations] == ["Who?", "Who?"]


# --- continuing from an adapter ---------------------------------------------------------------------------------------


def test_a_saved_adapter_is_trained_further(chat_recipe: Recipe, run: Run, saved_tensors: Tensors) -> None:
    train = {"optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant", "effective_batch": 10, "clip": None}
    straight = run(chat_recipe(train=train | {"steps": 4}), "straight")
    first = run(chat_recipe(train=train | {"steps": 2}), "first")
    second = run(chat_recipe(train=train | {"steps": 2}, adapter=str(first.adapter)), "second")
    expected, found, halfway = (saved_tensors(outcome.adapter) for outcome in (straight, second, first))
    for name in expected:
        # Not the same bytes: the second run orders its window anew, so its sums round otherwise.
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6), name
        assert not torch.equal(found[name], halfway[name])


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        ([{"lora": {"rank": 5}}], "lora_A"),
        ([{"prefix": {"length": 3}}], "missing"),
        ([{"lora": {"rank": 4, "alpha": 3}}], "lora_alpha"),
    ],
)
def test_another_stack_cannot_continue_from_it(
    stack: list[Any], told: str, chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    first = run(chat_recipe(), "first")
    with pytest.raises(ArtefactError, match=told):
        run(chat_recipe(stack, adapter=str(first.adapter)))
    assert not (tmp_path / "out").exists()


def test_another_base_cannot_continue_from_it(
    chat_recipe: Recipe, run: Run, base_without: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    first, other = run(chat_recipe(), "first"), base_without("nothing")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OnegpuError, match="another") as caught:
        run(chat_recipe(base=other, adapter=str(first.adapter)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_other_classes_cannot_continue_from_it(
    class_recipe: Recipe, run: Run, texts: list[dict[str, Any]], jsonl: Callable[..., Path]
) -> None:
    first = run(class_recipe(), "first")
    renamed = [row | {"label": row["label"].replace("money", "zoo")} for row in texts]
    loaded = class_recipe(task={"data": str(jsonl(renamed, "renamed.jsonl"))})
    loaded = type(loaded)(
        **(vars(loaded) | {"recipe": loaded.recipe.model_copy(update={"adapter": str(first.adapter)})})
    )
    with pytest.raises(
        RecipeError, match=r"\['money', 'sports', 'weather'\], and these are \['sports', 'weather', 'zoo'\]"
    ):
        run(loaded)


def test_an_adapter_folder_that_is_none_is_refused_at_its_line(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    loaded = chat_recipe(adapter="nowhere")
    assert "nowhere is not an adapter folder" in _refusal(loaded, run, tmp_path, key=("adapter",))


def test_targets_are_checked_before_weights_are_read(
    chat_recipe: Recipe, run: Run, base_without: Callable[[str], Path]
) -> None:
    folder = base_without("model.safetensors")
    with pytest.raises(TargetError):
        run(chat_recipe([{"lora": {"targets": "nope"}}], base=folder))


# --- stacks of many, and methods of PEFT ------------------------------------------------------------------------------


def test_five_adapters_are_one_artefact(chat_recipe: Recipe, run: Run, chat_base: Path) -> None:
    stack = ["nf4", LORA, {"prefix": {"length": 3}}, {"layerwise-lr": {"decay": 0.8}}, {"lora-plus": {"ratio": 4}}]
    outcome = run(chat_recipe(stack, task={"evaluation": 0.2}, train={"steps": 4}))
    assert outcome.round_trip_error == 0
    assert sorted(path.name for path in outcome.adapter.iterdir() if path.is_dir()) == ["lora", "prefix"]
    manifest = json.loads((outcome.adapter / "manifest.json").read_text("utf-8"))
    assert [record["adapter"] for record in manifest["adapters"]] == [
        "nf4",
        "lora",
        "prefix",
        "layerwise-lr",
        "lora-plus",
    ]
    rates = sorted({group["learning_rate"] for group in manifest["run"]["groups"]})
    assert rates == pytest.approx(sorted(0.01 * 0.8**depth * b for depth in (1, 2) for b in (1, 4)))
    loaded = load(load_base(str(chat_base), ["nf4"], precision="fp32"), outcome.adapter)
    assert [a.name for a in loaded.attachments] == ["lora", "prefix"]


@pytest.mark.parametrize(
    "stack",
    [
        [{"vera": {"r": 8}}],
        ["nf4", {"ia3": {"targets": ["k_proj", "down_proj"]}}, LORA],
        [{"prompt-tuning": {"num_virtual_tokens": 3}}],
        [{"adalora": {"total_step": 6, "init_r": 4, "target_r": 2}}],
        [{"peft-lora": {"init_lora_weights": "eva", "r": 2}}],
        [{"peft-lora": {"alora_invocation_tokens": [0]}}],
        [{"prefix-tuning": {"num_virtual_tokens": 3}}],
        ["bitfit"],
    ],
    ids=str,
)
def test_methods_of_peft_and_others_run_from_a_recipe(
    stack: list[Any], chat_recipe: Recipe, class_recipe: Recipe, run: Run, folder_bytes: Bytes
) -> None:
    recipe = class_recipe if stack == ["bitfit"] else chat_recipe
    first, second = (
        run(recipe(stack, task={"evaluation": 0.2}, train={"steps": 6}), name) for name in ("first", "second")
    )
    assert first.round_trip_error == 0
    assert first.after["loss"] != first.before["loss"]
    assert folder_bytes(first.adapter) == folder_bytes(second.adapter)


def test_checkpointing_is_refused_at_its_line_where_an_adapter_cannot(chat_recipe: Recipe, run: Run) -> None:
    recipe = chat_recipe(["prefix-tuning"], train={"gradient_checkpointing": True})
    with pytest.raises(
        StackError, match=r"recipe.yaml:\d+: prefix-tuning cannot work under gradient checkpointing: keys and"
    ):
        run(recipe)


def test_half_precision_is_refused_where_an_adapter_cannot(chat_recipe: Recipe, run: Run) -> None:
    with pytest.raises(StackError, match=r"adaption-prompt cannot work on a base in bfloat16: .*; load it in float32"):
        run(chat_recipe([{"adaption-prompt": {"adapter_layers": 1}}], train={"precision": "bf16"}))


def test_it_says_so_where_the_result_depends_on_the_split(
    chat_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_loudly(chat_recipe(["lily"]), tmp_path / "out")
    assert "with lily the result depends on train.micro_batch: its router averages over the batch" in " ".join(
        capsys.readouterr().out.split()
    )


def test_no_folder_of_this_machine_is_in_the_manifest_of_several_sources(
    chat_recipe: Recipe, run: Run, jsonl: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    sources = [{"source": str(jsonl(rows[:6], "a.jsonl")), "weight": 2.0}, {"source": str(jsonl(rows[6:], "b.jsonl"))}]
    outcome = run(chat_recipe(task={"data": sources}))
    text = (outcome.adapter / "manifest.json").read_text("utf-8")
    task = json.loads(text)["run"]["task"]["chat"]
    assert task["data"] == [{"source": "a.jsonl", "weight": 2.0}, {"source": "b.jsonl", "weight": 1.0}]
