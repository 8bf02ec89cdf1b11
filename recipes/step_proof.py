"""The step proof: everything that is declared to be trained was trained, over the first steps of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onegpu.adapters import ProofFailed, Stack

from .gradient_flow import GradientFlow, SharedTensors

__all__ = ["StepProof", "declared_trainable"]

JUDGED_STEPS = 3
LISTED = 3  # modules
WATCHED = 2**16  # elements of a tensor that are compared before and after a step
NO_GRADIENT = "had no gradient"
NONE_LEFT = "had a gradient of the loss, and none was left when the optimiser stepped (train.clip?)"


@dataclass
class StepProof:
    """Over the first steps whose rate is above zero: every declared tensor had a gradient, and moved.

    The gradient decides, for weight decay moves a tensor without any; that of the loss alone, for an adapter's own
    penalty reaches tensors that no output depends on. A tensor that its adapter says may rest in a step (LoRA's A while
    B is zero) is not judged by that step.

    Raises:
        ProofFailed: when it is made: what the optimiser steps is not what the adapters declare, or is frozen.
    """

    stack: Stack
    optimizer: Optimizer
    reduce: Callable[[Tensor], Tensor] = lambda total: total  # adds up over processes
    stepped: int = 0  # steps with a rate above zero
    judged: int = 0  # of these, those from the first on in which not everything rested
    proved: set[str] = field(default_factory=set)
    suspects: dict[str, str] = field(default_factory=dict)
    _before: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # numbers of rows, and what they held
    _from_loss: set[str] = field(default_factory=set)
    _had_gradient: dict[str, str] = field(default_factory=dict)  # what was wrong with it; nothing for a good one
    _resting: frozenset[str] = frozenset()  # in this step
    _rate: float = 0.0  # the highest of this step
    _judged: bool = False
    _flow: GradientFlow | None = None
    _shared: SharedTensors | None = None

    def __post_init__(self) -> None:
        declared_trainable(self.stack, self.optimizer)

    @property
    def pending(self) -> bool:
        """Whether more steps are to be watched."""
        return self.judged < JUDGED_STEPS and len(self.proved) < len(self.stack.trainable())

    def state(self) -> dict[str, Any]:
        """What was seen so far, for a checkpoint: a run that is resumed is judged as one in one go."""
        return {
            "stepped": self.stepped,
            "judged": self.judged,
            "proved": sorted(self.proved),
            "suspects": dict(self.suspects),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen before a checkpoint."""
        trainable = self.stack.trainable()
        self.stepped, self.judged = state["stepped"], state["judged"]
        self.proved = {name for name in state["proved"] if name in trainable}
        self.suspects = {name: why for name, why in state["suspects"].items() if name in trainable}

    @property
    def watches(self) -> bool:
        """Whether hooks look at modules while they run."""
        return any(watch is not None and watch.handles for watch in (self._flow, self._shared))

    def before_loss(self) -> None:
        """Watch modules that share a tensor; and, once something is suspected, those that may have cut it off."""
        if not self.pending:
            return
        if self._shared is None:
            self._shared = SharedTensors.of(self.stack.root, self.stack.trainable())
        if self._flow is None and self.suspects:
            self._flow = GradientFlow.of(self.stack.root, self.suspects)

    def after_loss(self) -> None:
        """Note what the loss gives a gradient to, before any adapter's own penalty adds to it."""
        if self.pending:
            trainable = self.stack.trainable()
            flags = torch.tensor([_any(p.grad) for p in trainable.values()], dtype=torch.float32)
            flags = self.reduce(flags.to(next(iter(trainable.values())).device))
            self._from_loss = {name for name, flag in zip(trainable, flags.tolist(), strict=True) if flag}

    def before_step(self, rate: float) -> None:
        """Look at gradients and values just before the optimiser steps; a rate of zero (warm-up) proves nothing."""
        self._before, self._had_gradient = {}, {}
        if not self.pending or rate == 0:
            return
        declared_trainable(self.stack, self.optimizer)
        self.stepped += 1
        self._rate = rate
        resting = frozenset[str]().union(*(a.may_rest() for a in self.stack.attachments))
        floors = {name: floor for a in self.stack.attachments for name, floor in a.gradient_floors().items()}
        for name, parameter in self.stack.trainable().items():
            lack = self._lack(name, parameter, floors.get(name, 0.0))
            if name in self.proved or (lack and name in resting):
                continue
            self._had_gradient[name] = lack
            if not lack:
                rows = _strongest(parameter)
                self._before[name] = rows, _rows(parameter)[rows]
        self._resting = resting
        self.judged += bool(self._had_gradient or self.proved)

    def _lack(self, name: str, parameter: nn.Parameter, floor: float) -> str:
        """What is wrong with a gradient; nothing where it is as it should be."""
        if not _any(parameter.grad):
            return NONE_LEFT if name in self._from_loss else NO_GRADIENT
        if name not in self._from_loss:
            return "had a gradient of its adapter's own penalty only"
        norm = parameter.grad.norm().item() if parameter.grad is not None else 0.0
        return f"had a gradient of {norm:.1e}, below the {floor:.1e} that its adapter declares" if norm < floor else ""

    def after_step(self) -> None:
        """Compare with what was seen before the step.

        Raises:
            ProofFailed: after the last judged step, a tensor never had a gradient, or never moved.
        """
        trainable = self.stack.trainable()
        for name, lack in self._had_gradient.items():
            if lack:
                self.suspects.setdefault(name, lack)
                continue
            rows, before = self._before[name]
            if not torch.equal(before, _rows(trainable[name])[rows]):
                self.proved.add(name)
                self.suspects.pop(name, None)
            elif name not in self._resting:
                self.suspects[name] = f"had a gradient and did not move at rates up to {self._rate:.1e}"
        self._before, self._had_gradient = {}, {}
        if not self.pending:
            self._judge()

    def _judge(self) -> None:
        if self._judged:
            return
        self._judged = True
        idle = self._shared.idle() if self._shared else {}
        told = [self._accused(), *(f"{path} does not depend on {name}, which it shares" for name, path in idle.items())]
        self.close()
        if faults := [text for text in told if text]:
            raise ProofFailed(f"step proof: {'; '.join(faults)}")

    def _accused(self) -> str:
        """Who is guilty, by module where the gradient was lost in one."""
        by_module: dict[str, list[str]] = {}
        for name, why in self.suspects.items():
            place = self._flow.culprit(name) if self._flow and why == NO_GRADIENT else name
            by_module.setdefault(place, []).append(name)
        if not by_module:
            return ""
        place, names = next(iter(by_module.items()))
        text = f"{names[0]} {self.suspects[names[0]]} in {self.judged} steps"
        if place != names[0]:
            text = f"no gradient comes through {place}: {text}"
        if len(names) > 1:
            text += f", and so {len(names) - 1} more of it"
        others = list(by_module)[1:]
        return (
            text
            + (f"; likewise {', '.join(others[:LISTED])}" if others else "")
            + (f" and {len(others) - LISTED} more" if len(others) > LISTED else "")
        )

    def close(self) -> None:
        """Watch no longer."""
        for watch in (self._flow, self._shared):
            if watch is not None:
                watch.close()

    def verdict(self) -> str:
        """One line for the report.

        Raises:
            ProofFailed: nothing was ever trained, or what is optimised at the end is not what the adapters declare.
        """
        declared_trainable(self.stack, self.optimizer)
        trainable = self.stack.trainable()
        self.close()
        if not self.judged and self.stepped >= JUDGED_STEPS:
            raise ProofFailed(
                f"step proof: nothing had a gradient in {self.stepped} steps: all of it may rest, and did"
            )
        if self.pending:
            return f"too short to judge: {self.judged} of {JUDGED_STEPS} steps with a rate above zero"
        exempt = len(trainable) - len(self.proved)
        return f"{len(self.proved)} tensors had a gradient and moved" + (f", {exempt} are exempt" if exempt else "")


def declared_trainable(stack: Stack, optimizer: Optimizer) -> None:
    """What requires a gradient, what the optimiser steps and what the adapters declare is the same set of tensors.

    Raises:
        ProofFailed: it is empty, or one of them differs; with the first tensor that shows it.
    """
    declared = stack.trainable()
    resting = frozenset[str]().union(*(a.may_rest() for a in stack.attachments))
    names = {id(parameter): name for name, parameter in declared.items()}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    everywhere = {id(p): (name, p) for model in (stack.model, stack.root) for name, p in model.named_parameters()}
    faults = {
        "is declared trainable by its adapter, and frozen (requires_grad is False)": [
            name for name, p in declared.items() if not p.requires_grad and name not in resting
        ],
        "is declared twice, under two names": [name for name, p in declared.items() if names[id(p)] != name],
        "is declared trainable, and the optimiser does not step it": [n for i, n in names.items() if i not in stepped],
        "requires a gradient, and no adapter declares it": [
            name for name, p in everywhere.values() if p.requires_grad and id(p) not in names
        ],
    }
    told = [f"{found[0]} {what}" + _more(found) for what, found in faults.items() if found]
    if not declared:
        told.append("nothing would be trained")
    if stepped - names.keys():
        told.append(f"the optimiser steps {len(stepped - names.keys())} tensors that no adapter declares (any more)")
    if told:
        raise ProofFailed(f"step proof: {'; '.join(told)}")


def _more(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _rows(tensor: Tensor) -> Tensor:
    """A tensor as rows, (rows, last dimension)."""
    return tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)


def _strongest(parameter: nn.Parameter) -> Tensor:
    """Numbers of the rows with the largest gradients; all of a small tensor. No copy fits beside a whole base."""
    assert parameter.grad is not None
    rows = _rows(parameter.grad)
    count = min(len(rows), max(1, WATCHED // rows.shape[1]))
    strongest: Tensor = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1).topk(count).indices
    return strongest
