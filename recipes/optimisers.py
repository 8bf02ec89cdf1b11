"""Optimiser, parameter groups and schedule, from the rates of a stack."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from onegpu.adapters import Rate, RecipeError

from .schema import HIGHEST_RATE, Train

__all__ = ["Group", "groups_of", "lay_alike", "make_optimizer", "make_schedule", "unreached_peak", "warmup_steps"]

EIGHT_BIT_FROM = 4096  # elements; below, 8-bit state costs accuracy and saves nothing


@dataclass(frozen=True)
class Group:
    """Trainable tensors that are stepped alike."""

    rate: Rate
    names: tuple[str, ...]
    elements: int

    def row(self, learning_rate: float) -> dict[str, Any]:
        """For tables and the manifest."""
        return {
            "tensors": len(self.names),
            "elements": self.elements,
            "learning_rate": learning_rate * self.rate.multiplier,
            "weight_decay": self.rate.weight_decay,
            "example": self.names[0],
        }


def groups_of(trainable: Mapping[str, nn.Parameter], rates: Mapping[str, Rate]) -> list[Group]:
    """Equal rates form one group, in the order of their first tensor; every tensor is in exactly one."""
    assert trainable.keys() == rates.keys()
    by_rate: dict[Rate, list[str]] = {}
    for name, rate in rates.items():
        by_rate.setdefault(rate, []).append(name)
    return [Group(r, tuple(names), sum(trainable[n].numel() for n in names)) for r, names in by_rate.items()]


def make_optimizer(train: Train, groups: list[Group], trainable: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser with one parameter group per `Group`, in the same order.

    Raises:
        RecipeError: what adapters multiply the rate by makes it one that nothing could be trained with.
    """
    for group in groups:
        if not 0 < (rate := train.learning_rate * group.rate.multiplier) <= HIGHEST_RATE:
            raise RecipeError(
                f"the rate of {group.names[0]} comes to {rate:.1e}, which trains nothing: change `learning_rate`, or "
                "what multiplies it"
            )
    settings: list[dict[str, Any]] = [
        {
            "params": [trainable[name] for name in group.names],
            "names": list(group.names),
            "lr": train.learning_rate * group.rate.multiplier,
            "weight_decay": group.rate.weight_decay,
        }
        for group in groups
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=train.learning_rate)
    if train.optimizer == "adamw":
        # One pass over all tensors: a LoRA has hundreds of small ones, and each would take a dozen operations.
        # It goes through memory as it lies, without a look at strides (torch 2.13, CPU): see `lay_alike`.
        fused = all(parameter.is_contiguous() for parameter in trainable.values())
        return torch.optim.AdamW(settings, lr=train.learning_rate, fused=fused)
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(settings, lr=train.learning_rate, min_8bit_size=EIGHT_BIT_FROM)
    return optimizer


def lay_alike(parameters: Iterable[nn.Parameter]) -> None:
    """Lay gradients into memory as their tensors are, so that a fused step pairs them element by element."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def make_schedule(train: Train, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """transformers' schedule: one factor over time, applied to every group's own rate."""
    schedule: LRScheduler = get_scheduler(
        train.schedule, optimizer, num_warmup_steps=warmup_steps(train, steps), num_training_steps=steps
    )
    return schedule


def warmup_steps(train: Train, steps: int) -> int:
    """Warm-up in optimiser steps."""
    return train.warmup if isinstance(train.warmup, int) else round(train.warmup * steps)


def unreached_peak(settings: Train, steps: int) -> str:
    """What a warm-up does that is not over when the run is."""
    warm = warmup_steps(settings, steps)
    if not steps or warm < steps:
        return ""
    highest = settings.learning_rate * (steps - 1) / warm
    return (
        f"the warm-up of {warm:,} steps ends after the run of {steps:,}: the highest rate is {highest:.1e}, "
        f"and never the {settings.learning_rate:.1e} of train.learning_rate"
    )
