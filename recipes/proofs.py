"""Proofs of a run: nothing changed that should not, numbers are finite, and what was saved is what was trained.

A failure ends the run with exit code 4 and a named culprit. (That everything was trained is step_proof.py's to show;
the data proof is in dataset.py, where rows are read.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.adapters import ProofFailed, Stack
from onegpu.adapters.fingerprints import Fingerprint, base_tensors, fingerprint, tensor_digest

from .evaluation import evaluating, plainly
from .gradient_flow import GradientFlow, tensors_in
from .tasks import Batch, Task

__all__ = ["Probe", "Untrained", "explain_cut", "explain_non_finite", "frozen_base", "round_trip"]

LOGITS = ("logits", "start_logits", "end_logits")  # what the outputs of models are called
TOLERANCE = 1e-4  # of the largest logit; same machine and versions give 0


def frozen_base(stack: Stack, before: Fingerprint) -> None:
    """The base has the bytes it had before training, unless an adapter is declared to train it.

    Raises:
        ProofFailed: naming the first tensor that changed.
    """
    if not all(named.adapter.capabilities.base_frozen for named in stack.named):
        return
    now = fingerprint(stack.root)
    changed = [n for n in {**before.tensors, **now.tensors} if before.tensors.get(n) != now.tensors.get(n)]
    if changed:
        name = changed[0].partition("#")[0]  # one packed weight is several tensors
        raise ProofFailed(f"the base should be frozen, and it changed: {name} has other values")
    if before.config != now.config:
        raise ProofFailed("the base should be frozen, and it changed: its configuration differs")


@dataclass(frozen=True)
class Untrained:
    """What nobody trains beside the weights of the base: its buffers, and what adapters keep for themselves."""

    digests: Mapping[str, str]

    @classmethod
    def of(cls, stack: Stack) -> "Untrained":
        """As it is now."""
        return cls({name: tensor_digest(tensor) for name, tensor in _untrained(stack).items()})

    def check(self, stack: Stack) -> None:
        """Compare with what is there now, bit for bit.

        Raises:
            ProofFailed: naming the first tensor that changed, and that no adapter declares to change.
        """
        now, exempt = Untrained.of(stack).digests, frozenset[str]().union(*(a.may_change() for a in stack.attachments))
        for name, digest in self.digests.items():
            if now.get(name) != digest and name not in exempt:
                raise ProofFailed(f"{name} is trained by nobody, and it changed")


def _untrained(stack: Stack) -> dict[str, Tensor]:
    known = {id(t) for t in stack.trainable().values()} | {id(t) for _, t, _ in base_tensors(stack.root)}
    found: dict[str, Tensor] = {}
    for model in (stack.model, stack.root):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) not in known:
                known.add(id(tensor))
                found[name] = tensor
    return found


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
            tensors = [t for t in tensors_in(output) if t.is_floating_point()]
            if not first and any(not torch.isfinite(t).all() for t in tensors):
                first.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in stack.model.named_modules() if name]
    try:
        with torch.no_grad(), plainly(), task.at_work(stack.model):
            task.objective(stack.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"first in {first[0]}" if first else "first in the loss itself"


def explain_cut(stack: Stack, task: Task, batch: Batch) -> str:
    """Name the module behind which a loss depends on nothing that is trained, for the message of a stopped run."""
    trainable = stack.trainable()
    flow = GradientFlow.of(stack.root, trainable)
    try:
        with plainly(), task.at_work(stack.model):
            task.objective(stack.model, batch)
    finally:
        flow.close()
    return f"no gradient comes through {flow.culprit(next(iter(trainable)))}"


def first_bad_gradient(trainable: Mapping[str, nn.Parameter]) -> str | None:
    """The first tensor whose gradient is not finite."""
    bad = (name for name, p in trainable.items() if p.grad is not None and not torch.isfinite(p.grad).all())
    return next(bad, None)
