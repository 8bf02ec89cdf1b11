"""Each setting of `chat` and `classification` changes what a run does, and what its manifest says."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from onegpu.adapters import DataError
from onegpu.recipes import Loaded, Outcome, training
from onegpu.recipes.tasks.chat import Chat
from onegpu.recipes.tasks.classification import Classification

Row = dict[str, Any]
Settings = Mapping[str, Any]
Make = Callable[..., Loaded]
Observe = Callable[..., dict[str, Any]]

TRAIN = {"optimizer": "sgd", "learning_rate": 0.5, "clip": None, "schedule": "constant"}
GENERATES = {"evaluation": 0.3, "metrics": ["bleu"]}
CUT = {"too_long": "cut-right", "tolerate": 0.9}
SHORT = CUT | {"max_length": 60}

# setting -> (settings of both recipes, its value in the second one, what differs)
# `data` is the name of a file that the fixture below writes.
CHAT: dict[str, tuple[Settings, Any, str]] = {
    "data": ({}, "fewer", "examples"),
    "evaluation": ({}, 0.3, "evaluations"),
    "test": ({}, 0.3, "scored"),
    "limit": ({}, 5, "examples"),
    "columns": ({"data": "two talks", "columns": {"messages": "first"}}, {"messages": "second"}, "examples"),
    "max_length": (CUT, 60, "examples"),
    "packing": ({}, False, "shapes"),
    "metrics": ({"evaluation": 0.3}, ["chrf"], "evaluations"),
    "answer_tokens": (GENERATES, 4, "shapes"),
    "bleu_tokeniser": (GENERATES | {"data": "one answer"}, "char", "evaluations"),
    "label_smoothing": ({}, 0.3, "loss"),
    "supervise": ({}, "last", "loss"),
    "too_long": (SHORT, "cut-left", "examples"),
}
CLASSIFICATION: dict[str, tuple[Settings, Any, str]] = {
    "data": ({}, "fewer", "examples"),
    "evaluation": ({}, 0.3, "evaluations"),
    "test": ({}, 0.3, "scored"),
    "limit": ({}, 5, "examples"),
    "columns": ({"data": "two texts", "columns": {"text": "first"}}, {"text": "second"}, "examples"),
    "max_length": (CUT, 4, "examples"),
    "predict": ({"data": "numbers"}, "number", "head"),
    "label_smoothing": ({}, 0.3, "loss"),
    "class_weight": ({}, {"sports": 3.0}, "loss"),
    "too_long": (CUT | {"max_length": 4}, "cut-left", "examples"),
}
TABLES = {"chat": CHAT, "classification": CLASSIFICATION}
EVERY = [pytest.param(task, setting, id=f"{task}.{setting}") for task, table in TABLES.items() for setting in table]
SEEN: dict[tuple[str, str], dict[str, Any]] = {}  # many are compared with one and the same run


def test_the_tables_hold_every_setting() -> None:
    """`tolerate` decides whether there is a run at all, and has a test of its own."""
    assert CHAT.keys() | {"tolerate"} == Chat.model_fields.keys()
    assert CLASSIFICATION.keys() | {"tolerate"} == Classification.model_fields.keys()


@pytest.fixture
def make(chat_recipe: Make, class_recipe: Make, rows: list[Row], texts: list[Row], messages: Any, jsonl: Any) -> Make:
    """`make("chat", {"limit": 5})`: a recipe with these settings; its data may be one of the files below."""
    numbers = [{"text": row["text"], "label": float(i % 3)} for i, row in enumerate(texts)]
    files = {
        "chat": {
            "rows": rows,
            "fewer": rows[:5],
            "two talks": [{"first": rows[i]["messages"], "second": rows[-1 - i]["messages"]} for i in range(4)],
            "one is none": [*rows[:4], {"messages": []}],
            "one answer": [{"messages": messages((str(i), "aaaaaa"))} for i in range(8)],
        },
        "classification": {
            "texts": texts,
            "fewer": texts[:5],
            "two texts": [{"first": t["text"], "second": f"{t['text']} again", "label": t["label"]} for t in texts],
            "one is none": [*texts[:4], {"text": "", "label": "sports"}],
            "numbers": numbers,
        },
    }

    def of(task: str, settings: Settings) -> Loaded:
        given = dict(settings)
        if "data" in given:
            given["data"] = str(jsonl(files[task][given["data"]], f"{given['data'].replace(' ', '-')}.jsonl"))
        return (chat_recipe if task == "chat" else class_recipe)(task=given, train=TRAIN)

    return of


@pytest.fixture
def observed(make: Make, run: Callable[..., Outcome], saved_tensors: Any, tmp_path: Path) -> Observe:
    """`observed("chat", {"limit": 5})`: what a run with these settings did, and what its manifest says of the task."""

    def go(task: str, settings: Settings) -> dict[str, Any]:
        key = task, json.dumps(settings, sort_keys=True)
        if key not in SEEN:
            SEEN[key] = once(task, settings)
        return SEEN[key]

    def once(task: str, settings: Settings) -> dict[str, Any]:
        examples: list[Any] = []
        shapes: list[Any] = []
        accumulate, forward = training._accumulate, LlamaMLP.forward

        def step(session: Any, window: Any, trainable: Any) -> Any:
            examples.append([(example.ids, example.labels) for example in window])
            return accumulate(session, window, trainable)

        def layer(self: LlamaMLP, x: Tensor) -> Tensor:
            shapes.append(x.shape)
            out: Tensor = forward(self, x)  # type: ignore[no-untyped-call]
            return out

        folder = f"run-{len(list(tmp_path.iterdir()))}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_accumulate", step)
            patch.setattr(LlamaMLP, "forward", layer)
            outcome = run(make(task, settings), folder)
        lines = [json.loads(x) for x in (tmp_path / folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        tensors = saved_tensors(outcome.adapter)
        return {
            "manifest": json.loads((outcome.adapter / "manifest.json").read_text("utf-8"))["run"]["task"],
            "examples": examples,
            "shapes": shapes,
            "loss": [line["loss"] for line in lines if "loss" in line],
            "evaluations": [line["evaluation"] for line in lines if "evaluation" in line],
            "scored": outcome.test,
            "head": [t.shape for name, t in tensors.items() if "classifier" in name],
        }

    return go


@pytest.mark.slow
@pytest.mark.parametrize(("task", "setting"), EVERY)
def test_two_recipes_that_differ_in_one_setting_of_a_task_do_and_say_different_things(
    task: str, setting: str, observed: Observe
) -> None:
    base, value, what = TABLES[task][setting]
    one, other = observed(task, base), observed(task, {**base, setting: value})
    assert one["manifest"] != other["manifest"]
    assert one[what] != other[what], what


@pytest.mark.slow
@pytest.mark.parametrize("task", TABLES)
def test_the_same_settings_do_the_same_twice(task: str, observed: Observe) -> None:
    once = observed(task, {})
    SEEN.clear()
    assert observed(task, {}) == once


@pytest.mark.slow
@pytest.mark.parametrize("task", TABLES)
def test_how_many_rows_may_be_unusable_decides_whether_there_is_a_run(task: str, observed: Observe) -> None:
    with pytest.raises(DataError, match=r"1 of 5 rows cannot be used"):
        observed(task, {"data": "one is none", "tolerate": 0.1})
    one, other = (observed(task, {"data": "one is none", "tolerate": share}) for share in (0.3, 0.5))
    assert one["manifest"] != other["manifest"]
    assert one["examples"] == other["examples"]
