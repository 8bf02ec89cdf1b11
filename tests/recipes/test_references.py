"""What the reference model said is remembered, and is the same as asked again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from onegpu.adapters import Interrupted, PluginError
from onegpu.recipes import Loaded, Outcome, parse_recipe, training
from onegpu.recipes.references import References
from onegpu.recipes.tasks import Batch, Example
from onegpu.recipes.tasks.preference import Preference

Row = dict[str, Any]
Run = Callable[..., Outcome]

PAIRS = [("Hi", "Hello.", "Go"), ("Who?", "Me.", "No"), ("One?", "Two", "Nine"), ("Sun", "Rain", "A"), ("B", "C", "DE")]
EXAMPLES = [Example(row, [row], [row]) for row in range(4)]


class Asked:
    """A reference that counts how often it is asked; of example i it says (i, 10 i)."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, batch: Batch) -> Batch:
        self.times += 1
        rows = batch["input_ids"].flatten().float()
        return {"reference": torch.cat([rows, 10 * rows])}


def _batch(*numbers: int) -> tuple[list[Example], Batch]:
    return [EXAMPLES[number] for number in numbers], {"input_ids": torch.tensor([[number] for number in numbers])}


def _references(asked: Asked, *, again: bool = True, loss: str = "dpo") -> References:
    task = Preference.model_validate({"data": "x.jsonl", "loss": loss})
    return References(task, asked, examples=4, again=again)


def test_an_example_that_comes_again_is_not_asked_about_again() -> None:
    asked = Asked()
    references = _references(asked)
    references(*_batch(2, 0))
    references(*_batch(1, 3))
    assert references.complete
    found = references(*_batch(3, 0, 2))
    assert asked.times == 2
    assert found["reference"].tolist() == [3, 0, 2, 30, 0, 20]
    assert found["reference"].dtype == torch.float32
    assert found["input_ids"].tolist() == [[3], [0], [2]]


def test_a_batch_with_a_new_example_is_asked_about_whole() -> None:
    asked = Asked()
    references = _references(asked)
    references(*_batch(2, 0))
    found = references(*_batch(0, 1))
    assert asked.times == 2
    assert found["reference"].tolist() == [0, 1, 0, 10]
    assert not references.complete


@pytest.mark.parametrize(
    "answer", [torch.zeros(2, 2), torch.zeros(3), torch.zeros(2, dtype=torch.float64)], ids=["table", "odd", "double"]
)
def test_what_cannot_be_remembered_is_refused(answer: Tensor) -> None:
    task = Preference.model_validate({"data": "x.jsonl"})
    references = References(task, lambda batch: {"reference": answer}, examples=4, again=True)
    with pytest.raises(PluginError, match=r"must be so many float32 numbers, or a multiple"):
        references(*_batch(1, 2))


@pytest.mark.parametrize(("again", "loss"), [(False, "dpo"), (True, "kto"), (True, "simpo")])
def test_nothing_is_remembered_of_what_comes_once_or_is_never_the_same(again: bool, loss: str) -> None:
    asked = Asked()
    references = _references(asked, again=again, loss=loss)
    for _ in range(2):
        references(*_batch(1, 2))
    assert asked.times == 2
    assert references.complete


@pytest.fixture
def recipe(chat_base: Path, jsonl: Callable[[list[Row]], Path], tmp_path: Path) -> Callable[..., Loaded]:
    """`recipe(steps=3)`: preferences over five rows, three a step."""
    data = jsonl([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS])

    def load(**train: Any) -> Loaded:
        settings = {"effective_batch": 3, "micro_batch": 2, "precision": "fp32", "learning_rate": 0.01, **train}
        content = {
            "base": str(chat_base),
            "adapters": [{"lora": {"rank": 2}}],
            "task": {"preference": {"data": str(data), "evaluation": "none"}},
            "train": settings,
        }
        return parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path)

    return load


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each batch that the reference is asked about."""
    found: list[list[int]] = []
    real = Preference.refer

    def refer(task: Preference, model: torch.nn.Module, batch: Batch) -> Batch:
        found.append(batch["rows"].tolist())
        return real(task, model, batch)

    monkeypatch.setattr(Preference, "refer", refer)
    return found


def test_a_run_has_the_losses_of_one_that_asks_in_every_epoch(
    recipe: Callable[..., Loaded],
    run: Run,
    asked: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run(recipe(epochs=4), "once")
    once = len(asked)
    monkeypatch.setattr(Preference, "refers_once", lambda task: False)
    run(recipe(epochs=4), "always")
    # Five rows are two steps, of two passes and one.
    assert (once, len(asked) - once) == (3, 12)
    assert len(_losses(tmp_path / "once")) == 8
    assert _losses(tmp_path / "once") == pytest.approx(_losses(tmp_path / "always"), abs=1e-6)


@pytest.mark.parametrize("stopped", [1, 3, 5])
def test_a_run_that_goes_on_hears_the_same_bits(
    stopped: int,
    recipe: Callable[..., Loaded],
    run: Run,
    asked: list[list[int]],
    saved_tensors: Callable[[Path], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded = recipe(epochs=3, checkpoint_every=1)
    straight = run(loaded, "straight")
    first_epoch = asked.copy()
    real = training._checkpoint

    def stop(session: Any) -> None:
        real(session)
        if session.step == stopped:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_checkpoint", stop)
        with pytest.raises(Interrupted):
            run(loaded, "resumed")
    asked.clear()
    resumed = run(loaded, "resumed", resume=True)
    assert asked == first_epoch
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "straight")
    ours, theirs = saved_tensors(resumed.adapter), saved_tensors(straight.adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
