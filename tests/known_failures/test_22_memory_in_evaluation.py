"""22. Memory ends in evaluation only.

Met: logits of the whole evaluation set are kept until the end; the evaluation batch is larger; caches of generation
stay.

Here: of each example some plain numbers are kept, and nothing of a vocabulary's width; evaluation uses the batches of
training.

Also: tests/recipes/test_evaluation.py
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.recipes import Loaded, preflight

VOCABULARY = 64
BATCHES, EVERY = 500, 50


def _wide() -> int:
    """Tensors with as many columns as the vocabulary that are alive."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not isinstance(o, torch.nn.Parameter)]
    floats = [tensor for tensor in alive if tensor.is_floating_point()]  # a packed row may have as many tokens
    return sum(1 for tensor in floats if tensor.ndim > 1 and tensor.shape[-1] == VOCABULARY)


def test_nothing_as_wide_as_the_vocabulary_is_kept(
    recipe: Callable[..., Loaded], fresh: Callable[..., PreTrainedModel]
) -> None:
    job = preflight(recipe(task={"evaluation": 0.9}, train={"micro_batch": 1}))
    model: Any = fresh()
    stack = attach(model, ["lora"])
    widths: list[int] = []
    sizes: list[int] = []
    resident: list[int] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if len(sizes) % EVERY == 0:
            widths.append(_wide())
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    evaluator, _ = job.evaluator(stack)  # tries the model first
    model.register_forward_hook(look, with_kwargs=True)
    gc.collect()
    before = _wide()
    evaluator(stack.model, (list(job.dataset.evaluation) * BATCHES)[:BATCHES])
    assert sizes == [1] * BATCHES  # that of training
    assert len(widths) == BATCHES // EVERY
    assert max(widths) - before <= 3  # those of one batch, whatever went before
    assert max(resident[1:]) - resident[1] <= 8 * 2**20
    gc.collect()
    assert _wide() == before
