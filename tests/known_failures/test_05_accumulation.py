"""5. Gradient accumulation changes the objective.

Met: the mean of the means of micro-batches is not the mean over their tokens, and a short last window is divided by the
configured number. Losses and gradients depend on how a batch is split.

Here: an objective returns a sum and a weight; the gradient of a step is divided once by the weight of its whole window,
also of a short one, so that no split changes it.

Also: tests/recipes/test_training.py, tests/recipes/test_every_task.py, tests/adapters/conformance/test_table.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from onegpu.recipes import Loaded, Outcome

STACKS: dict[str, list[Any]] = {
    "lora": [{"lora": {"rank": 4}}],
    "prefix": [{"prefix": {"length": 3}}],
    "full": ["full"],
    "lora on nf4": ["nf4", {"lora": {"rank": 4}}],
}
WHOLE = {"steps": 1, "effective_batch": 10}
# Ten rows in windows of 4, 4 and 2; a rate this small keeps later gradients from magnifying rounding.
TAILED = {"steps": None, "epochs": 1, "effective_batch": 4, "learning_rate": 1e-3}


@pytest.fixture
def stepped(
    recipe: Callable[..., Loaded],
    run: Callable[..., Outcome],
    metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> Callable[..., tuple[dict[str, Tensor], list[float]]]:
    """The gradients that the optimiser is given in a run, by step and tensor, and the losses that are logged."""

    def of(stack: list[Any], micro_batch: int, train: dict[str, Any]) -> tuple[dict[str, Tensor], list[float]]:
        found: dict[str, Tensor] = {}
        count = 0

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal count
            count += 1
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    found[f"{count} {name}"] = parameter.grad.clone()

        handle = register_optimizer_step_pre_hook(look)
        name = f"{micro_batch}-{len(train)}"
        try:
            run(recipe(stack, train=train | {"micro_batch": micro_batch, "clip": None}), name)
        finally:
            handle.remove()
        return found, [line["loss"] for line in metrics(tmp_path / name)]

    return of


@pytest.mark.parametrize("name", STACKS)
def test_no_split_changes_the_gradient_or_the_logged_loss(
    name: str, stepped: Callable[..., Any], distance: Callable[..., float]
) -> None:
    for train, splits, steps in ((WHOLE, (10, 5, 2, 1), 1), (TAILED, (4, 3), 3)):
        expected, losses = stepped(STACKS[name], splits[0], train)
        assert len(losses) == steps
        for micro_batch in splits[1:]:
            found, logged = stepped(STACKS[name], micro_batch, train)
            assert distance(found, expected) <= 1e-6
            assert logged == pytest.approx(losses, rel=1e-6)
