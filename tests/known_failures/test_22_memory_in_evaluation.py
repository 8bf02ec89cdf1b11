"""22. Memory ends in evaluation only.

Met: logits of the whole evaluation set are kept until the end; the evaluation batch is larger; caches of generation
stay.

Here: of each example some plain numbers are kept, and nothing of a vocabulary's width; evaluation uses the batches of
training.

Also: tests/recipes/test_evaluation.py
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.recipes import Loaded, preflight

VOCABULARY = 64


def _wide() -> int:
    """Tensors with as many columns as the vocabulary that are alive."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not isinstance(o, torch.nn.Parameter)]
    return sum(1 for tensor in alive if tensor.ndim > 1 and tensor.shape[-1] == VOCABULARY)


def test_nothing_as_wide_as_the_vocabulary_is_kept(
    recipe: Callable[..., Loaded], fresh: Callable[..., PreTrainedModel]
) -> None:
    job = preflight(recipe(task={"evaluation": 0.9}, train={"micro_batch": 1}))
    model: Any = fresh()
    stack = attach(model, ["lora"])
    widths: list[int] = []
    sizes: list[int] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        widths.append(_wide())
        sizes.append(len(kwargs["input_ids"]))

    evaluator, _ = job.evaluator(stack)  # tries the model first
    model.register_forward_hook(look, with_kwargs=True)
    gc.collect()
    before = _wide()
    evaluator(stack.model, list(job.dataset.evaluation))
    assert sizes == [1] * 9  # that of training
    assert max(widths) - before <= 3  # those of one batch, whatever went before
    gc.collect()
    assert _wide() == before
