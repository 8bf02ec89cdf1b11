"""One adapter under proof: what it is built from, how it is trained, and how results are compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attaching import attach
from ..contract import Adapter, Capabilities
from ..errors import StackError, TargetError
from ..specs import Spec, get
from ..stack import Stack
from . import tiny_models
from .tiny_models import FAMILIES, ROWS, Family, Precision

__all__ = [
    "SEED",
    "Case",
    "Declared",
    "Loop",
    "Snapshot",
    "adapters_only",
    "assert_close",
    "assert_equal",
    "carry",
    "case_of",
    "gradients",
    "objection",
    "trained",
]

SEED = 5  # not the default: what a load must restore should not come about by itself


class Declared(Exception):
    """The adapter declares that it cannot; carries the reason."""


@dataclass(frozen=True)
class Case:
    """An adapter with its settings, on one kind of tiny model.

    One that does not train itself is proved in a stack with `lora`.
    """

    adapter: str
    config: Mapping[str, Any]
    family: Family
    beside: tuple[str, ...] = ()  # adapters that it needs in front of it in a stack

    @cached_property
    def adapter_class(self) -> type[Adapter]:
        """Its class."""
        return get(self.adapter)

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""
        return self.adapter_class.capabilities

    def build(self) -> Adapter:
        """The adapter with its settings."""
        return self.adapter_class.model_validate(dict(self.config))

    def stack(self, *names: str, packed: str | None = None) -> list[Spec]:
        """It (once under each name) with what it needs in order to train.

        Args:
            packed: the adapter that packs the base, in place of one that it needs for that.
        """
        own: list[Spec] = [{self.adapter: {**self.config, "name": name}} for name in names]
        own = own or [{self.adapter: dict(self.config)}]
        first = [name for name in self.beside if not (packed and get(name).capabilities.quantises)]
        if not self.capabilities.trains:
            own = [*own, "lora"] if self.capabilities.quantises else ["lora", *own]
        return [*([packed] if packed else []), *first, *own]

    @property
    def packs(self) -> list[Spec]:
        """What of its stack packs the base."""
        specs: list[Spec] = [name for name in self.beside if get(name).capabilities.quantises]
        return [{self.adapter: dict(self.config)}] if self.capabilities.quantises else specs

    def load(self, *, precision: Precision = "fp32", packed: str | None = None) -> PreTrainedModel:
        """A fresh base, packed by another adapter where that is said."""
        return tiny_models.load(self.family, self.stack(packed=packed), precision=precision)

    def attach(self, model: nn.Module, *names: str, packed: str | None = None, seed: int = SEED) -> Stack:
        """Put it on a base that `load` gave."""
        return attach(model, self.stack(*names, packed=packed), seed=seed)

    def start(self, *, packed: str | None = None) -> Stack:
        """A fresh base with a fresh adapter."""
        return self.attach(self.load(packed=packed), packed=packed)

    def logits(self, model: nn.Module) -> Tensor:
        """Of all rows, padded."""
        return tiny_models.logits(model, tiny_models.batch(self.family))


def objection(case: Case) -> str | None:
    """Why an adapter refuses a kind of model, in its own words; None when it accepts it."""
    try:
        case.start()
    except (StackError, TargetError) as refusal:
        return str(refusal)
    return None


def case_of(adapter: str, config: Mapping[str, Any], beside: Sequence[str] = ()) -> Case:
    """The adapter on the first kind of model that it accepts. (At least one is demanded.)"""
    family = _first_accepted(adapter, json.dumps(config, sort_keys=True), tuple(beside))
    return Case(adapter, config, family, tuple(beside))


@cache
def _first_accepted(adapter: str, config: str, beside: tuple[str, ...]) -> Family:
    refusals = {}
    for family in FAMILIES:
        refusals[family] = objection(Case(adapter, json.loads(config), family, beside))
        if refusals[family] is None:
            return family
    raise AssertionError(f"{adapter} works on none of the tiny models: {refusals}")


class Loop:
    """The training loop of the recipes in short: a window of all rows per step, AdamW, every hook in its place."""

    def __init__(self, stack: Stack, family: Family, *, trained: Mapping[str, nn.Parameter] | None = None) -> None:
        self.stack, self.family, self.done = stack, family, 0
        trainable = stack.trainable() if trained is None else trained
        rates = stack.rates()
        self.optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": 0.01 * rates[name].multiplier} for name, p in trainable.items()], weight_decay=0.0
        )

    def backward(self) -> Tensor:
        """Up to where the gradient of the window is complete; returns the loss."""
        torch.manual_seed(self.done)
        self.stack.model.train()
        for attachment in self.stack.attachments:
            attachment.before_step(self.done)
        total = tiny_models.losses(self.stack.model, self.family)
        total.backward()
        weight = len(ROWS)
        for attachment in self.stack.attachments:
            if (penalty := attachment.penalty()) is not None:
                (penalty * weight).backward()
        for parameter in self.stack.trainable().values():
            if parameter.grad is not None:
                parameter.grad /= weight
        for attachment in self.stack.attachments:
            attachment.after_backward(self.done)
        return total.detach()

    def update(self) -> None:
        """The optimiser's step, and what follows it."""
        self.optimizer.step()
        for attachment in self.stack.attachments:
            attachment.after_step(self.done)
        self.optimizer.zero_grad()
        self.done += 1

    def run(self, steps: int) -> None:
        """Whole steps; the model is in evaluation mode afterwards, as it was read."""
        for _ in range(steps):
            self.backward()
            self.update()
        self.stack.model.eval()


def trained(case: Case, stack: Stack, steps: int = 2) -> Stack:
    """The stack after a few steps."""
    Loop(stack, case.family).run(steps)
    return stack


def adapters_only(stack: Stack) -> dict[str, nn.Parameter]:
    """What the adapters train, without the heads."""
    return {name: p for a in stack.attachments for name, p in a.trainable().items()}


def carry(source: Stack, target: Stack) -> None:
    """Give one stack the values and the state of another one with the same names."""
    own = target.trainable()
    with torch.no_grad():
        for name, parameter in source.trainable().items():
            own[name].copy_(parameter)
    for theirs, ours in zip(source.attachments, target.attachments, strict=True):
        ours.load_state(json.loads(json.dumps(theirs.state())))


def gradients(stack: Stack, family: Family, sizes: Sequence[int] = (len(ROWS),)) -> dict[str, Tensor]:
    """Gradients of the sum of all losses, computed in passes of so many rows."""
    trainable = stack.trainable()
    stack.model.train()
    for parameter in trainable.values():
        parameter.grad = None
    torch.manual_seed(0)
    begin = 0
    for size in sizes:
        total = tiny_models.losses(stack.model, family, ROWS[begin : begin + size])
        total.backward()
        begin += size
    stack.model.eval()
    found = {name: p.grad.detach().clone() for name, p in trainable.items() if p.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    return found


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Bit for bit."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype} instead of {theirs.dtype}"
    assert torch.equal(ours, theirs), f"{what} (largest difference {_largest(ours, theirs):.3g})"


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Two sets of tensors, taken as one vector each: the norm of the difference against the norm."""
    missing = sorted(ours.keys() ^ theirs.keys())
    assert not missing, f"{what}: only one of the two has {missing[0]}"
    norm = sum(float(t.double().square().sum()) for t in theirs.values()) ** 0.5
    assert norm > 0, f"{what}: everything is zero, so that equality would say nothing"
    apart = {name: float((ours[name].double() - theirs[name].double()).norm()) for name in theirs}
    share = sum(value**2 for value in apart.values()) ** 0.5 / norm
    worst = max(apart, key=lambda name: apart[name])
    assert share <= tolerance, (
        f"{what}: they differ by {share:.2g} of their norm ({tolerance:g} is allowed), most in {worst}"
    )


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.detach().double()).abs().max())


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that attaching and detaching must leave as it was."""

    modules: dict[str, str]  # path -> type, hooks, attributes
    tensors: dict[str, Tensor]
    config: str

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Take it now; tensors are copied."""
        config = getattr(model, "config", None)
        text = json.dumps(config.to_dict(), sort_keys=True, default=str) if config is not None else ""
        return cls(
            {path: _describe(module) for path, module in model.named_modules()},
            {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())},
            text + str(getattr(config, "_attn_implementation", "")),
        )

    def differences(self, now: nn.Module) -> list[str]:
        """What is not as it was, modules first."""
        after = Snapshot.of(now)
        found = [
            f"module {path or 'at the top'} was {self.modules.get(path, 'not there')}"
            f" and is {after.modules.get(path, 'not there')}"
            for path in sorted(self.modules.keys() | after.modules.keys())
            if self.modules.get(path) != after.modules.get(path)
        ]
        found += [f"tensor {name} was added or lost" for name in sorted(self.tensors.keys() ^ after.tensors.keys())]
        found += [
            f"tensor {name} has other values or another dtype"
            for name in sorted(self.tensors.keys() & after.tensors.keys())
            if not _same(self.tensors[name], after.tensors[name])
        ]
        return found + (["the model's configuration differs"] if self.config != after.config else [])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _describe(module: nn.Module) -> str:
    state = vars(module)
    hooks = {name: len(value) for name, value in state.items() if name.endswith("_hooks") and value}
    own = sorted(name for name in state if name in ("forward", "__call__"))  # replaced on the instance
    return (
        type(module).__qualname__
        + "".join(f", {n} of {name}" for name, n in hooks.items())
        + "".join(f", its own {name}" for name in own)
    )
