"""Proofs of a run: it trained what it says, nothing else changed, and what was saved is what was trained.

A failure ends the run with exit code 4 and a named culprit. (The data proof is in dataset.py, where rows are read.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.adapters import ProofFailed, Stack
from onegpu.adapters.fingerprints import Fingerprint, differences

from .evaluation import evaluating
from .tasks import Batch, Task

__all__ = ["Probe", "StepProof", "explain_non_finite", "frozen_base", "round_trip"]

JUDGED_STEPS = 3
LOGITS = ("logits", "start_logits", "end_logits")  # what the outputs of models are called
TOLERANCE = 1e-4  # of the largest logit; same machine and versions give 0


@dataclass
class StepProof:
    """Over the first steps whose rate is above zero: every declared tensor had a gradient, and moved.

    A tensor that its adapter says may rest in a step (LoRA's A while B is zero) is not judged by that step.
    """

    stack: Stack
    judged: int = 0
    proved: set[str] = field(default_factory=set)
    suspects: dict[str, str] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)
    _had_gradient: dict[str, bool] = field(default_factory=dict)

    @property
    def pending(self) -> bool:
        """Whether more steps are to be watched."""
        return self.judged < JUDGED_STEPS and len(self.proved) < len(self.stack.trainable())

    def before_step(self, rate: float) -> None:
        """Look at gradients and values just before the optimiser steps; a rate of zero (warm-up) proves nothing."""
        self._before, self._had_gradient = {}, {}
        if not self.pending or rate == 0:
            return
        self.judged += 1
        resting = frozenset[str]().union(*(a.may_rest() for a in self.stack.attachments))
        for name, parameter in self.stack.trainable().items():
            if name not in resting and name not in self.proved:
                self._before[name] = parameter.detach().clone()
                self._had_gradient[name] = parameter.grad is not None and bool(parameter.grad.any())

    def after_step(self) -> None:
        """Compare with what was seen before the step.

        Raises:
            ProofFailed: after the last judged step, a tensor never had a gradient, or never moved.
        """
        trainable = self.stack.trainable()
        for name, before in self._before.items():
            if not self._had_gradient[name]:
                self.suspects.setdefault(name, "had no gradient")
            elif torch.equal(before, trainable[name]):
                self.suspects[name] = "had a gradient and did not move"
            else:
                self.proved.add(name)
        guilty = [name for name in self.suspects if name not in self.proved]
        if self._before and not self.pending and guilty:
            raise ProofFailed(
                f"step proof: {guilty[0]} {self.suspects[guilty[0]]} in {self.judged} steps"
                + (f", and so {len(guilty) - 1} more" if len(guilty) > 1 else "")
            )
        self._before = {}

    def verdict(self) -> str:
        """One line for the report."""
        if self.pending:
            return f"too short to judge: {self.judged} of {JUDGED_STEPS} steps with a rate above zero"
        exempt = len(self.stack.trainable()) - len(self.proved)
        return f"{len(self.proved)} tensors had a gradient and moved" + (f", {exempt} are exempt" if exempt else "")


def frozen_base(stack: Stack, before: Fingerprint) -> None:
    """The base has the bytes it had before training, unless an adapter is declared to train it.

    Raises:
        ProofFailed: naming the first tensor that changed.
    """
    if all(named.adapter.capabilities.base_frozen for named in stack.named):
        faults, _ = differences(before, stack.root)
        if faults:
            raise ProofFailed(f"the base should be frozen, and it changed: {faults[0]}")


@dataclass(frozen=True)
class Probe:
    """A short input and the logits that the trained model gives for it."""

    inputs: dict[str, list[int]]
    logits: Tensor  # (..., outputs), float32, on the CPU

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Sequence[int]]) -> "Probe":
        """Run the model, in evaluation mode, on one short input (`Task.probe`)."""
        kept = {name: list(ids) for name, ids in inputs.items()}
        device = next(model.parameters()).device
        with evaluating(model):
            output = model(**{name: torch.tensor([ids], device=device) for name, ids in kept.items()})
        found = [output[name].float().cpu() for name in LOGITS if name in output]
        return cls(kept, torch.cat(found))

    def summary(self, error: float) -> dict[str, Any]:
        """For the manifest: enough to check a copy elsewhere."""
        last = self.logits.reshape(-1, self.logits.shape[-1])[-1]
        top = last.topk(min(8, len(last)))
        facts = {"top": top.indices.tolist(), "logits": top.values.tolist(), "round_trip_error": error}
        return {"inputs": self.inputs, **facts}


def round_trip(probe: Probe, reloaded: nn.Module) -> float:
    """The largest difference between the logits of the trained model and of the saved one on a fresh base.

    Raises:
        ProofFailed: they are not the same model.
    """
    again = Probe.of(reloaded, probe.inputs).logits
    error = (probe.logits - again).abs().max().item()
    if not error <= TOLERANCE * probe.logits.abs().max().item():
        raise ProofFailed(f"round trip: the saved adapter on a fresh base gives other logits (difference {error:.3g})")
    return error


def explain_non_finite(stack: Stack, task: Task, batch: Batch) -> str:
    """Name the first module whose output is not finite for a batch, for the message of a stopped run."""
    first: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [t for t in _flat(output) if isinstance(t, Tensor) and t.is_floating_point()]
            if not first and any(not torch.isfinite(t).all() for t in tensors):
                first.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in stack.model.named_modules() if name]
    try:
        with torch.no_grad():
            task.objective(stack.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"first in {first[0]}" if first else "first in the loss itself"


def first_bad_gradient(trainable: Mapping[str, nn.Parameter]) -> str | None:
    """The first tensor whose gradient is not finite."""
    bad = (name for name, p in trainable.items() if p.grad is not None and not torch.isfinite(p.grad).all())
    return next(bad, None)


def _flat(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]
