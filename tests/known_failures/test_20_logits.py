"""20. Logits over a large vocabulary take most of the memory.

Met: logits for every position in float32, twice, also for the positions that carry no loss.

Here: logits are made for a chunk of supervised tokens at a time, so no tensor of a vocabulary's width is larger than a
chunk, in training and evaluation; value and gradient are those of the plain loss, with soft caps, scales and adapters
on the head. A trial on the model decides; where its head cannot be applied in pieces, a line says why.

Also: tests/recipes/tasks/test_chunks.py, tests/recipes/tasks/test_output_head.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.recipes import Loaded, preflight
from onegpu.recipes.tasks import chunks

VOCABULARY = 66  # as wide as nothing else in the model
WAYS: dict[str, tuple[str, list[Any]]] = {
    "plain": ("plain", ["lora"]),
    "tied": ("tied", ["lora"]),
    "wide heads": ("wide-heads", ["lora"]),
    "an adapter on the head": ("plain", [{"lora": {"rank": 4, "targets": ["lm_head", "q_proj"]}}]),
    "everything": ("tied", ["full"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_logits_beyond_a_chunk_and_the_gradient_is_the_plain_one(
    way: str,
    recipe: Callable[..., Loaded],
    fresh: Callable[..., PreTrainedModel],
    noise: Callable[[Any], None],
    distance: Callable[..., float],
    live_tensors: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of conversations whose answers are learned: many places carry no loss, and there is a tail chunk."""
    monkeypatch.setattr(chunks, "CHUNK", chunks.FEWEST * VOCABULARY)
    variant, adapters = WAYS[way]
    job = preflight(recipe(adapters, task={"packing": False}))
    model: Any = fresh(variant).requires_grad_(False)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    stack = attach(model, job.loaded.stack)
    if adapters != ["full"]:
        noise(stack.trainable())
    evaluator, remark = job.evaluator(stack)
    assert remark == ""
    batch = evaluator.task.collate(list(job.dataset.train), job.pad)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert supervised % chunks.FEWEST
    assert 2 * chunks.FEWEST < supervised < batch["labels"][:, 1:].numel()
    with live_tensors(width=VOCABULARY) as live:
        objective = evaluator.task.objective(model, batch)
        objective.total.backward()
    assert live.widest == chunks.FEWEST * VOCABULARY
    ours = _taken(stack.trainable())
    with live_tensors(width=VOCABULARY) as live:
        plain = model(**batch).loss * objective.weight
        plain.backward()
    assert live.widest == batch["labels"].numel() * VOCABULARY
    assert objective.total.item() == pytest.approx(plain.item(), rel=1e-5)
    assert distance(ours, _taken(stack.trainable())) <= 1e-5
    with live_tensors(width=VOCABULARY) as live:
        assert evaluator(model, list(job.dataset.train)).scores["loss"] > 0
    assert live.widest == chunks.FEWEST * VOCABULARY


def test_a_row_whose_logits_cannot_be_made_in_pieces_is_told(
    recipe: Callable[..., Loaded], fresh: Callable[..., PreTrainedModel]
) -> None:
    job = preflight(recipe(task={"packing": False}))
    model: Any = fresh()
    model.register_forward_hook(lambda module, args, output: output | {"logits": 2 * output.logits})
    stack = attach(model, job.loaded.stack)
    evaluator, remark = job.evaluator(stack)
    assert evaluator.task is job.loaded.task
    assert remark.startswith("all logits of a batch are made at once: ")
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    batch = evaluator.task.collate(list(job.dataset.train)[:4], job.pad)
    evaluator.task.objective(model, batch)
    kept = int((batch["labels"][:, 1:] != -100).any(0).sum())  # where any row has a target
    assert shapes == [(4, kept, 64)]
    assert kept < batch["labels"].shape[1] - 1


def _taken(trainable: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in trainable.items() if p.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    return found
