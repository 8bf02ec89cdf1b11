"""torch.compile of the layers that a model repeats: once for all of them, and where its numbers are the plain ones.

Only steps run compiled. Evaluations, generation and proofs run the modules as they are (`evaluating`): their inputs are
others than those of a step, and layers would be compiled anew for each kind.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.adapters import Stack
from onegpu.adapters.structure import modules

from .evaluation import plainly
from .tasks import Example

__all__ = ["Compilation", "Watched", "compile_layers", "tried_on", "watching"]

ROUNDING = 16  # units in the last place by which an output or a gradient may differ, as a share of its norm
TRIED = 512  # tokens
LEAST = 1e-4  # of it, in any precision: sums are taken in another order


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


@dataclass
class Watched:
    """What came out of the last layers, and the gradient of that along a direction which is always the same.

    Not the gradient of the loss: where that is a difference of nearly equal terms, as with preferences, little is left
    of it but rounding.
    """

    output: Tensor | None = None  # (batch, positions, hidden)
    gradient: tuple[Tensor | None, ...] = ()

    def look_back(self, stack: Stack) -> None:
        """Find the gradient, of all that is trained."""
        if self.output is None or not self.output.requires_grad:  # what is trained stands behind the layers
            return
        along = torch.randn(self.output.shape, generator=torch.Generator().manual_seed(0))
        along = along.to(self.output) / self.output.shape[1] ** 0.5  # gradients of fp16 do not overflow
        trained = [p for p in stack.trainable().values() if p.requires_grad]
        self.gradient = torch.autograd.grad(self.output, trained, along, allow_unused=True)


@contextmanager
def watching(stack: Stack) -> Iterator[Watched]:
    """See inside the block what the module gives that holds the layers; of an encoder and a decoder, the decoder."""
    watched = Watched()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        watched.output = output[0]

    holders = [path.rpartition(".")[0] for path, _ in stack.layers.stacks]
    holder = dict(modules(stack.root))[holders[-1]] if any(holders) else stack.root
    handle = holder.register_forward_hook(hook)
    try:
        yield watched
    finally:
        handle.remove()


def tried_on(window: Sequence[Example], cut: Callable[[Sequence[Example]], list[list[Example]]]) -> Sequence[Example]:
    """The shortest examples of a window, up to 512 tokens; two where a pass has several, as one is a case of its own.

    Args:
        cut: cuts examples into passes; what is tried is never more than one.
    """
    examples = sorted(window, key=lambda example: example.size)
    ends = itertools.accumulate(example.size for example in examples)
    return cut(examples[: max(2, sum(end <= TRIED for end in ends))])[0]


def compile_layers(stack: Stack, step: Callable[[], Watched], dtype: torch.dtype) -> Compilation:
    """Compile the layers of a stack's base, and compare what they give with what the plain layers do.

    Args:
        step: what is to be compiled, watched; over the same batch at each call. Both ways keep its activations, so it
            should be a small one.
        dtype: what it is computed in.
    """
    began = time.perf_counter()
    layers = list(_layers(stack))
    if not layers:
        return Compilation(tried=True, fault="the model has no list of layers")
    plain = _in_training(stack, step)
    try:
        _compile(layers)
        found = _in_training(stack, step)
    except (RuntimeError, ImportError) as cause:  # what torch says of a missing compiler, and of what it cannot compile
        told = [line for line in str(cause).splitlines() if line.strip() and not line.endswith("raised:")]
        return Compilation(tried=True, fault=next(iter(told), type(cause).__name__))
    return Compilation(tried=True, fault=_apart(plain, found, dtype), seconds=time.perf_counter() - began)


def _compile(layers: Sequence[nn.Module]) -> None:
    from .partitioning import Partitioner  # parts of torch that may move: no reason to stop runs that do not compile

    # Dropout draws what it draws otherwise. Options that are not the same object would be compiled for anew.
    options = {"fallback_random": True, "custom_partitioner_fn": Partitioner()}
    for layer in layers:
        layer.compile(dynamic=True, options=options)  # one kernel serves all lengths


def _layers(stack: Stack) -> Iterator[nn.Module]:
    found = dict(modules(stack.root))
    for path, length in stack.layers.stacks:
        yield from (found[f"{path}.{i}"] for i in range(length))


def _in_training(stack: Stack, step: Callable[[], Watched]) -> Watched:
    """A step in training mode; mode and random numbers are afterwards what they were."""
    training = {module: module.training for module in stack.model.modules()}
    stack.model.train()
    try:
        with torch.random.fork_rng():
            return step()
    finally:
        for module, mode in training.items():
            module.training = mode


def _apart(plain: Watched, found: Watched, dtype: torch.dtype) -> str:
    """Why two steps are not the same up to rounding; nothing where they are."""
    if plain.output is None or found.output is None or not plain.output.numel():
        return "nothing comes out of the layers that could be compared"
    if [g is None for g in plain.gradient] != [g is None for g in found.gradient]:
        return "it gives other tensors a gradient"
    rounding = max(LEAST, ROUNDING * torch.finfo(dtype).eps)
    compared = {"output": ([plain.output], [found.output]), "gradient": (plain.gradient, found.gradient)}
    for what, (one, other) in compared.items():
        share = _difference(one, other)
        if not share <= rounding:  # nor where it is not a number
            return f"it gives another {what}, by {share:.1e} of its norm"
    return ""


def _difference(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """Norm of the difference of two lists of tensors, as a share of the norm of the first."""
    pairs = [
        (a.detach().float(), b.detach().float())
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    length, apart = (
        float(nn.utils.get_total_norm(tensors)) for tensors in ([a for a, _ in pairs], [a - b for a, b in pairs])
    )
    return apart / length if length else apart
