"""The task in docs/write-a-task.md, as an installed plugin, and what the page says of the contract."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from onegpu.adapters import TASKS
from onegpu.adapters.base import Kind
from onegpu.recipes.tasks import PredictiveTask, Task

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-task.md").read_text("utf-8")
WORDS = ("wins", "rise", "sun", "fall", "loses")

Declare = Callable[[str, str, str], None]
Command = Callable[..., tuple[int, str, str]]


def _blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


@pytest.fixture
def plugin(declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's module, with its test in the same one."""
    (tmp_path / "onegpu_stars.py").write_text("\n\n".join(_blocks("python")), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onegpu_stars", raising=False)
    declare(TASKS, "stars", "onegpu_stars:Stars")
    return importlib.import_module("onegpu_stars")


@pytest.fixture
def workplace(class_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's recipe, on a tiny base, and 60 reviews, one of them with too many stars."""
    stars = [1 + i % 5 for i in range(59)]
    reviews = [f"{WORDS[count - 1]} {' '.join(['again'] * (i // 5))},{count}" for i, count in enumerate(stars)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,rating", *reviews, "rain,6"]) + "\n", "utf-8")
    content = yaml.safe_load(_blocks("yaml")[0])
    content["base"] = str(class_base)
    content["train"] |= {"epochs": 8, "effective_batch": 8, "learning_rate": 0.01, "precision": "fp32"}
    content["train"] |= {"evaluate_every": 10}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_of_the_page_is_listed_explained_trained_and_evaluated(
    plugin: ModuleType, workplace: Path, onegpu: Command
) -> None:
    code, out, err = onegpu("tasks", "stars")
    assert code == 0, err
    assert "Stars of the best text; the worst has one." in out
    code, out, err = onegpu("data", "recipe.yaml", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["dropped"] == {"stars is no whole number from 1 to 5": ["reviews.csv:61"]}
    assert list(report["labels"]) == ["over 1", "over 2", "over 3", "over 4"]
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out")
    assert code == 0, err
    records = [json.loads(line) for line in (workplace / "out" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record["evaluation"] for record in records if "evaluation" in record]
    assert evaluations[0].keys() == {"loss", "mean_error", "accuracy"}
    assert min(scores["loss"] for scores in evaluations) < evaluations[0]["loss"] / 2
    code, out, err = onegpu("evaluate", "out", "--json")
    assert code == 0, err
    assert json.loads(out)["what"] == "test rows"


def test_the_test_of_the_page_passes(plugin: Any, class_base: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(class_base, num_labels=4)
    tokenizer = AutoTokenizer.from_pretrained(class_base)
    tests = [test for name, test in vars(plugin).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(model, tokenizer)


def test_the_page_names_all_that_a_task_can_declare_and_override() -> None:
    contracts = (vars(Task), vars(PredictiveTask))
    verbs = [name for contract in contracts for name, value in contract.items() if _overridable(name, value)]
    assert len(verbs) >= 15
    assert [verb for verb in verbs if f"`{verb}(" not in PAGE] == []
    declared = [name for name in Task.__annotations__ if name not in Task.model_fields]
    assert [name for name in (*declared, *Task.model_fields, *get_args(Kind)) if f"`{name}`" not in PAGE] == []


def _overridable(name: str, value: Any) -> bool:
    around = {"traits", "facts", "teacher_folder"}  # of a task around another one
    return not name.startswith("_") and name not in around and isinstance(value, FunctionType)
