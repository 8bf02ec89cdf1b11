"""A setting that nobody reads must not exist: each is read in a run that uses it, and changes what the run does."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from transformers.models.llama.modeling_llama import LlamaMLP

from onegpu.adapters import entries, get
from onegpu.adapters.bridge.injected import Bridged
from onegpu.adapters.registry import ADAPTERS
from onegpu.recipes import Loaded, Outcome, Train, parse_recipe
from onegpu.recipes.display import Display
from onegpu.recipes.schema import Best, Checkpointing, Recipe
from onegpu.recipes.tasks.chat import Chat

Make = Callable[..., Loaded]
Run = Callable[..., Outcome]
Reading = Callable[..., AbstractContextManager[Mapping[type[BaseModel], set[str]]]]


def test_a_setting_that_is_only_written_out_is_not_read(reading: Reading) -> None:
    settings = Train()
    with reading(Train) as found:
        assert settings.model_dump()["clip"] == 1.0
        assert settings.model_copy().seed == 0
    assert found[Train] == {"seed"}


# --- what is read -----------------------------------------------------------------------------------------------------

BEST = {"metric": "loss", "patience": 2, "min_delta": 0.01}


def test_a_run_reads_every_setting_of_training_and_of_the_recipe(chat_recipe: Make, run: Run, reading: Reading) -> None:
    first = run(chat_recipe(), "first")
    loaded = chat_recipe(
        task={"evaluation": 0.3}, train={"best": BEST, "evaluate_every": 1}, adapter=str(first.adapter)
    )
    with reading(Train, Best, Recipe) as found:
        run(loaded, "second")
        run(chat_recipe(train={"steps": None, "epochs": 1}), "third")
    assert found[Train] == set(Train.model_fields)
    assert found[Best] == set(Best.model_fields)
    # The stack and the task were read by then, into `Loaded`.
    assert found[Recipe] | {"adapters", "task"} == set(Recipe.model_fields)


OURS = {
    entry.name: get(entry.name)
    for entry in entries(ADAPTERS)
    if entry.distribution == "onegpu" and not entry.value.startswith("onegpu.adapters.bridge")
}
PEFTS = sorted(e.name for e in entries(ADAPTERS) if e.distribution == "onegpu" and e.name not in OURS)
STACKS: dict[str, list[Any]] = {
    "trainable-tokens": [{"trainable-tokens": {"tokens": ["a", "e"]}}],
    "prefix": [{"prefix": {"length": 2, "text": "Hi"}}],
    "layerwise-lr": ["lora", "layerwise-lr"],
    "lora-plus": ["lora", "lora-plus"],
    "loftq": ["nf4", "loftq"],
    **{kind: [kind, "lora"] for kind in ("int8", "nf4", "fp4")},
}
COMPUTED = {  # settings that PEFT is given together with what only the model can tell
    "adalora": {"total_step"},
    "adaption-prompt": {"adapter_layers"},
}
ENCODERS_ONLY = {"bitfit"}  # the tiny Llama has no biases


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_run_reads_every_setting_of_an_adapter(
    name: str, chat_recipe: Make, class_recipe: Make, run: Run, reading: Reading
) -> None:
    make = class_recipe if name in ENCODERS_ONLY else chat_recipe
    loaded = make(STACKS.get(name, [name]))
    with reading(OURS[name]) as found:
        run(loaded)
    assert found[OURS[name]] | {"name"} == set(OURS[name].model_fields)  # the name was read when the stack was built


def test_there_are_methods_of_pefts() -> None:
    assert len(PEFTS) > 30


@pytest.mark.parametrize("name", PEFTS)
def test_every_setting_of_a_method_of_pefts_reaches_its_own_configuration(name: str) -> None:
    method = get(name)
    if not issubclass(method, Bridged):
        pytest.skip("has a configuration of its own")
    given = set(method.model_construct().values()) | COMPUTED.get(name, set())
    assert set(method.model_fields) - {"name", "targets"} <= given


# --- what it changes --------------------------------------------------------------------------------------------------

BASE = {
    "steps": 6,
    "effective_batch": 3,
    "micro_batch": 3,
    "learning_rate": 0.5,
    "optimizer": "sgd",
    "clip": 0.5,
    "evaluate_every": 3,
    "checkpoint_every": 3,
    "schedule": "linear",
    "precision": "fp32",
}
# setting -> (the base with which it is compared, its other value, what differs)
CHANGES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "steps": ({}, 5, "steps"),
    "epochs": ({"steps": None, "epochs": 1}, 2, "steps"),
    "effective_batch": ({}, 2, "loss"),
    "micro_batch": ({}, 1, "passes"),
    "tokens_per_micro_batch": ({"micro_batch": "auto"}, 1, "passes"),
    "learning_rate": ({}, 0.25, "tensors"),
    "optimizer": ({}, "adamw", "tensors"),
    "weight_decay": ({}, 0.1, "tensors"),
    "clip": ({}, 0.01, "tensors"),
    "schedule": ({}, "cosine", "rates"),
    "warmup": ({}, 2, "rates"),
    "precision": ({}, "bf16", "loss"),
    "attention": ({}, "eager", "attention"),
    "gradient_checkpointing": ({}, True, "layers"),
    "compile": ({}, True, "compiled"),
    "evaluate_every": ({}, 2, "evaluations"),
    "best": ({}, {"metric": "loss"}, "files"),
    "checkpoint_every": ({}, 2, "files"),
    "seed": ({}, 1, "loss"),
}
WITHIN_BEST: dict[str, tuple[dict[str, Any], Any, str]] = {
    "metric": ({"metric": "loss"}, "token_accuracy", "told"),
    "patience": ({"metric": "loss", "min_delta": 100.0}, 1, "steps"),
    "min_delta": ({"metric": "loss"}, 100.0, "tensors"),
}


WITHIN_CHECKPOINTING: dict[str, tuple[dict[str, Any], Any, str]] = {
    "every": ({}, 2, "layers"),
    "offload": ({}, True, "told"),  # elsewhere than on a CPU: test_recomputing.py
}


SEEN: dict[str, dict[str, Any]] = {}  # many are compared with one and the same run


def test_the_tables_hold_every_setting() -> None:
    assert CHANGES.keys() == Train.model_fields.keys()
    assert WITHIN_BEST.keys() == Best.model_fields.keys()
    assert WITHIN_CHECKPOINTING.keys() == Checkpointing.model_fields.keys()


@pytest.fixture
def observed(
    chat_recipe: Make, run: Run, tmp_path: Path, saved_tensors: Any
) -> Iterator[Callable[..., dict[str, Any]]]:
    """`observed(seed=1)`: what a run with these settings of `train:` did, and what its manifest says."""
    counted: dict[str, Any] = {}

    def go(**train: Any) -> dict[str, Any]:
        key = json.dumps(train, sort_keys=True)
        if key not in SEEN:
            SEEN[key] = once(train)
        return SEEN[key]

    def once(train: dict[str, Any]) -> dict[str, Any]:
        counted.update(passes=0, layers=0, compiled=0, told=[])
        folder = f"run-{len(list(tmp_path.iterdir()))}"
        outcome = run(chat_recipe(task={"evaluation": 0.3}, train=BASE | train), folder)
        lines = [json.loads(x) for x in (tmp_path / folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        tensors = saved_tensors(outcome.adapter)
        return {
            **counted,
            "manifest": json.loads((outcome.adapter / "manifest.json").read_text("utf-8"))["run"]["train"],
            "steps": len(steps),
            "loss": [line["loss"] for line in steps],
            "rates": [line["learning_rate"] for line in steps],
            "evaluations": [line["step"] for line in lines if "evaluation" in line],
            "files": sorted(p.name for p in (tmp_path / folder / "checkpoints").glob("*")),
            "tensors": torch.cat([t.flatten() for _, t in sorted(tensors.items())]).tolist(),
        }

    objective, forward = Chat.objective, LlamaMLP.forward

    def passing(task: Chat, model: Any, batch: Any) -> Any:
        counted.update(passes=counted["passes"] + 1, attention=model.config._attn_implementation)
        return objective(task, model, batch)

    def layer(*given: Any) -> Any:
        counted["layers"] += 1
        return forward(*given)  # type: ignore[no-untyped-call]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "objective", passing)
        patch.setattr(LlamaMLP, "forward", layer)
        patch.setattr(torch.nn.Module, "compile", lambda self, **_: counted.update(compiled=counted["compiled"] + 1))
        patch.setattr(
            Display, "line", lambda self, label, text: label in ("best", "note") and counted["told"].append(text)
        )
        yield go


@pytest.mark.parametrize("name", CHANGES)
def test_two_recipes_that_differ_in_a_setting_of_training_do_and_say_different_things(
    name: str, observed: Callable[..., dict[str, Any]]
) -> None:
    base, value, what = CHANGES[name]
    one, other = observed(**base), observed(**base | {name: value})
    assert one["manifest"] != other["manifest"]
    assert one[what] != other[what], what


@pytest.mark.parametrize("name", WITHIN_BEST)
def test_two_recipes_that_differ_in_what_is_best_do_and_say_different_things(
    name: str, observed: Callable[..., dict[str, Any]]
) -> None:
    base, value, what = WITHIN_BEST[name]
    # Far too fast, so that the last evaluation is not the best one.
    fast = {"evaluate_every": 1, "learning_rate": 20.0, "clip": None, "schedule": "constant"}
    one, other = (observed(**fast, best=base | changed) for changed in ({}, {name: value}))
    assert one["manifest"] != other["manifest"]
    assert one[what] != other[what], what


@pytest.mark.parametrize("name", WITHIN_CHECKPOINTING)
def test_two_recipes_that_recompute_differently_do_and_say_different_things(
    name: str, observed: Callable[..., dict[str, Any]]
) -> None:
    base, value, what = WITHIN_CHECKPOINTING[name]
    one, other = (observed(gradient_checkpointing=base | changed) for changed in ({"every": 1}, {name: value}))
    assert one["manifest"] != other["manifest"]
    assert one[what] != other[what], what


def test_the_same_recipe_does_the_same_twice(observed: Callable[..., dict[str, Any]]) -> None:
    once = observed()
    SEEN.clear()
    assert observed() == once


def test_a_recipe_is_one_file(chat_recipe: Make, tmp_path: Path) -> None:
    again = parse_recipe(chat_recipe().as_yaml(), name="again.yaml", folder=tmp_path)
    assert yaml.safe_load(again.as_yaml()) == yaml.safe_load(chat_recipe().as_yaml())
