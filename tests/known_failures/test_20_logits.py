"""20. Logits over a large vocabulary take most of the memory.

Met: logits for every position in float32, twice, also for the positions that carry no loss.

Here: logits are computed for the positions that any row of a batch supervises, and only what carries loss is widened to
float32; value and gradient are those of the plain loss.

Not yet: the cross-entropy in chunks, for runs that supervise long answers.

Also: tests/recipes/tasks/test_chat.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.recipes import Loaded, preflight

VOCABULARY = 64


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_only_supervised_positions_get_logits_and_the_gradient_is_the_plain_one(
    variant: str,
    recipe: Callable[..., Loaded],
    fresh: Callable[..., PreTrainedModel],
    noise: Callable[[Any], None],
    distance: Callable[..., float],
) -> None:
    job = preflight(recipe())
    batch = job.loaded.task.collate(list(job.dataset.train)[:4], job.pad)
    model: Any = fresh(variant)
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    objective = job.loaded.task.objective(model, batch)
    objective.total.backward()
    ours = _taken(stack.trainable())
    supervised = int((batch["labels"][:, 1:] != -100).any(0).sum())
    assert shapes == [(4, supervised, VOCABULARY)]
    assert supervised < batch["labels"].shape[1] - 1
    plain = model(**batch).loss * objective.weight
    plain.backward()
    assert shapes[1] == (*batch["labels"].shape, VOCABULARY)
    assert float(objective.total) == pytest.approx(float(plain), rel=1e-5)
    assert distance(ours, _taken(stack.trainable())) <= 1e-5


def _taken(trainable: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable.items()}
    for parameter in trainable.values():
        parameter.grad = None
    return found
