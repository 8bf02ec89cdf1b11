"""Evaluation that leaves no trace: sums over examples, independent of how they are batched."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .batches import micro_batches
from .tasks import Batch, Example, Task

__all__ = ["evaluate", "on_device"]


def evaluate(
    model: nn.Module, task: Task, examples: Sequence[Example], *, micro_batch: int, pad: int, autocast: torch.autocast
) -> dict[str, float]:
    """Loss and the task's scores over all examples; the model's mode and the random state are left as they were.

    Only sums and counts are kept, never logits, so memory does not grow with the number of examples.
    """
    device = next(model.parameters()).device
    total, weight = 0.0, 0.0
    counts: Counter[str] = Counter()
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(), autocast:
        for chunk in micro_batches(examples, micro_batch):
            objective = task.objective(model, on_device(task.collate(chunk, pad), device))
            total += objective.total.item()
            weight += objective.weight
            counts.update(objective.counts)
    for module in training:
        module.training = True
    return {"loss": total / weight, **task.scores(counts)}


def on_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    """A batch on the device that computes it."""
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
