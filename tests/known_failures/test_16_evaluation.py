"""16. Scores of evaluations are wrong or missing, and the best checkpoint is not the best.

Met: a mean of means of batches, so that the loss depends on the batch size; no loss at all with a wrapped model; the
best checkpoint is not what is loaded at the end; evaluating changes the training that follows.

Here: a score is computed over all rows at once; an evaluation leaves modes and random states as they were; the base is
scored at step 0; with `train.best` the adapter of the best evaluation is saved when it is found, and comes back.

Also: tests/recipes/test_evaluation.py, tests/recipes/test_selection.py, tests/recipes/test_every_task.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onegpu.recipes import Loaded, Outcome

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
STACKS: dict[str, list[Any]] = {"lora": [{"lora": {"rank": 4}}], "prefix": [{"prefix": {"length": 3}}]}
RATES = {"lora": 0.05, "prefix": 0.3}
HELD_OUT = {"evaluation": 0.7}


@pytest.mark.parametrize("name", STACKS)
def test_the_loss_does_not_depend_on_the_batch_size_and_is_there_before_training(
    name: str, recipe: Recipe, run: Run, metrics: Any, tmp_path: Path
) -> None:
    losses = []
    for size in (1, 2, 7):
        train = {"steps": 1, "effective_batch": 7, "micro_batch": size, "learning_rate": 1e-6}
        run(recipe(STACKS[name], task=HELD_OUT, train=train), f"by-{size}")
        lines = [line for line in metrics(tmp_path / f"by-{size}") if "evaluation" in line]
        assert [(line["step"], line["adapter"]) for line in lines] == [(0, False), (1, True)]
        losses.append(lines[0]["evaluation"]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_evaluating_changes_nothing_of_the_training(
    recipe: Recipe, run: Run, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    stack = [{"lora": {"rank": 4, "dropout": 0.3}}]
    found = [
        tensors(run(recipe(stack, task=HELD_OUT, train={"steps": 4, "evaluate_every": each}), str(each)).adapter)
        for each in (1, None)
    ]
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


@pytest.mark.parametrize("name", STACKS)
def test_the_best_is_what_is_kept(
    name: str, recipe: Recipe, run: Run, metrics: Any, tmp_path: Path, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    # Three rows are learned by heart, and the others get worse again.
    train = {"steps": 16, "evaluate_every": 2, "best": {"metric": "loss"}, "learning_rate": RATES[name]}
    outcome = run(recipe(STACKS[name], task=HELD_OUT, train=train))
    losses = {m["step"]: m["evaluation"]["loss"] for m in metrics(tmp_path / "out") if "evaluation" in m and m["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != max(losses)
    assert outcome.after["loss"] == losses[best]
    kept, last = tensors(outcome.adapter), tensors(tmp_path / f"out/checkpoints/best-{best:06d}/adapter")
    assert {key.rpartition(":")[2] for key in kept} == {key.rpartition(":")[2] for key in last}
    assert all(torch.equal(kept[key], last[key]) for key in kept)
