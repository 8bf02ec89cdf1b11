"""torch.compile of the layers that a model repeats: once for all of them, and where its numbers are the plain ones.

Only steps run compiled. Evaluations, generation and proofs run the modules as they are (`evaluating`): their inputs are
others than those of a step, and layers would be compiled anew for each kind.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onegpu.adapters import Stack
from onegpu.adapters.structure import modules

from .evaluation import plainly

__all__ = ["Compilation", "compile_layers"]

ROUNDING = 16  # units in the last place by which a gradient may differ, as a share of its norm
LEAST = 1e-4  # of it, in any precision: sums are taken in another order

Gradient = Callable[[Sequence[nn.Parameter]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Compilation:
    """Whether steps run compiled."""

    tried: bool = False
    fault: str = ""  # why they do not, although they should
    seconds: float = 0.0  # that it took

    @property
    def on(self) -> bool:
        return self.tried and not self.fault

    def __call__(self, *, watched: bool = False) -> AbstractContextManager[object]:
        """Run the block as steps are to be run; plainly while hooks watch modules, as a compiler passes over them."""
        if not self.tried:
            return nullcontext()
        if watched or not self.on:
            return plainly()
        stance: AbstractContextManager[object] = torch.compiler.set_stance("default")
        return stance

    def line(self) -> str:
        """What a run says of it; nothing where nobody asked for it."""
        if self.fault:
            return f"steps run without torch.compile: {self.fault}"
        return f"steps run compiled; compiling took {self.seconds:.0f} s" if self.on else ""


def compile_layers(stack: Stack, gradient: Gradient) -> Compilation:
    """Compile the layers of a stack's base, and compare a gradient with that of the plain layers.

    Args:
        gradient: of a batch over some parameters; of the same one at each call.
    """
    began = time.perf_counter()
    layers = list(_layers(stack))
    if not layers:
        return Compilation(tried=True, fault="the model has no list of layers")
    plain = _taken(stack, gradient)
    for layer in layers:
        # Dropout draws what it draws otherwise. One kernel serves all lengths.
        layer.compile(dynamic=True, options={"fallback_random": True})
    try:
        found = _taken(stack, gradient)
    except RuntimeError as cause:  # what torch says of a missing compiler, and of what it cannot compile
        told = [line for line in str(cause).splitlines() if line.strip() and not line.endswith("raised:")]
        return Compilation(tried=True, fault=next(iter(told), type(cause).__name__))
    return Compilation(tried=True, fault=_apart(stack, plain, found), seconds=time.perf_counter() - began)


def _layers(stack: Stack) -> Iterator[nn.Module]:
    found = dict(modules(stack.root))
    for path, length in stack.layers.stacks:
        yield from (found[f"{path}.{i}"] for i in range(length))


def _taken(stack: Stack, gradient: Gradient) -> list[Tensor | None]:
    """A gradient in training mode; mode and random numbers are afterwards what they were."""
    training = {module: module.training for module in stack.model.modules()}
    stack.model.train()
    try:
        with torch.random.fork_rng():
            return list(gradient([p for p in stack.trainable().values() if p.requires_grad]))
    finally:
        for module, mode in training.items():
            module.training = mode


def _apart(stack: Stack, plain: list[Tensor | None], found: list[Tensor | None]) -> str:
    """Why two gradients are not the same up to rounding; nothing where they are."""
    if [g is None for g in plain] != [g is None for g in found]:
        return "it gives other tensors a gradient"
    length = _norm([g for g in plain if g is not None])
    apart = _norm([a - b for a, b in zip(plain, found, strict=True) if a is not None and b is not None])
    eps = max(torch.finfo(p.dtype).eps for p in stack.root.parameters() if p.is_floating_point())
    share = apart / length if length else apart
    if share <= max(LEAST, ROUNDING * eps):
        return ""
    return f"it gives another gradient, by {share:.1e} of its norm"


def _norm(tensors: list[Tensor]) -> float:
    return float(nn.utils.get_total_norm(tensors))
