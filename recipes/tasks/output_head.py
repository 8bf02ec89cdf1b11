"""What a model does between the hidden states of its last layer and its logits, so that it can be done in pieces.

    hidden (tokens, hidden) -> output embeddings -> · scale -> cap · tanh(· / cap) -> logits (tokens, vocabulary)

The output embeddings are the model's own module with whatever adapters put around it. A hook in front of it takes the
hidden states and hands on none of them, so the model itself makes no logits. What a model does behind the module is
tried, never guessed: `find_head` compares with the model's own logits, also for hidden states that are far larger than
real ones, where no soft cap could hide.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .contract import Batch

__all__ = ["Arithmetic", "OutputHead", "before_head", "find_head"]

CAPS = ("final_logit_softcapping", "logits_soft_cap", "logit_soft_cap")  # what configurations call a soft cap
SCALES = ("logit_scale", "logits_scaling", "output_multiplier")  # some multiply by it, others divide
TRIED = 16  # tokens of the example that is tried
STRETCH = (1.0, 16.0)  # by what its hidden states are multiplied
ROUNDING = 4  # units in the last place of the largest logit, by which two ways may differ


@dataclass(frozen=True)
class Arithmetic:
    """What happens to the output of a model's output embeddings."""

    scale: float = 1.0
    cap: float | None = None
    biased: bool = False  # `final_logits_bias` of the model is added

    def __call__(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        if self.biased and bias is not None:
            logits = logits + bias.reshape(-1)
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


@dataclass(frozen=True)
class OutputHead:
    """The output embeddings of one model, with all that follows: (..., hidden) -> (..., vocabulary)."""

    module: nn.Module  # as the model calls it, with adapters around it
    arithmetic: Arithmetic
    bias: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, arithmetic: Arithmetic) -> "OutputHead":
        """That of a model whose arithmetic is known."""
        module = _output_embeddings(model)
        assert module is not None, type(model)
        return cls(module, arithmetic, _bias(model))

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.arithmetic(self.module(hidden), self.bias)


def before_head(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:  # (batch, positions, hidden)
    """Run a model up to its output embeddings: what it hands to them, while they compute nothing."""
    module = _output_embeddings(model)
    assert module is not None, type(model)
    with _instead(module, lambda hidden: hidden[:, :0]) as seen:
        model(**inputs)
    (hidden,) = seen
    return hidden


def find_head(model: nn.Module, inputs: Batch) -> Arithmetic | str:
    """What a model does behind its output embeddings, or why it cannot be done in pieces.

    Call it in evaluation mode; nothing keeps a gradient.

    Args:
        inputs: of one example; its first tokens are tried.
    """
    module = _output_embeddings(model)
    if module is None:
        return "it has no output embeddings"
    device = next(model.parameters()).device
    short = {name: tensor[:1, :TRIED].to(device) for name, tensor in inputs.items()}
    try:
        with torch.no_grad():
            return _tried(model, module, short)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as cause:
        return f"it does not take hidden states in pieces: {cause}"


def _tried(model: nn.Module, module: nn.Module, inputs: Batch) -> Arithmetic | str:
    words = inputs.get("decoder_input_ids", inputs["input_ids"])
    hidden = before_head(model, inputs)
    if hidden.shape[:2] != words.shape:
        return "its output embeddings do not see the hidden state of each token"
    stretched = torch.cat([hidden[:, :4] * by for by in STRETCH], 1)
    with _instead(module, lambda _: stretched):
        theirs: Tensor = model(**inputs).logits
    raw, bias = module(stretched), _bias(model)
    if theirs.shape != raw.shape:
        return "its logits are not those of its output embeddings"
    fitting = (found for found in _candidates(model) if _alike(found(raw, bias), theirs))
    return next(fitting, "it changes what its output embeddings give in a way that is not known")


def _candidates(model: nn.Module) -> Iterator[Arithmetic]:
    """What the configuration lets expect, plain first."""
    scales, caps = _numbers(model, SCALES), _numbers(model, CAPS)
    both = [1.0, *scales, *(1 / scale for scale in scales)]
    biased = [False] if _bias(model) is None else [False, True]
    return (Arithmetic(*found) for found in product(both, [None, *caps], biased))


def _numbers(model: nn.Module, names: tuple[str, ...]) -> list[float]:
    config: Any = getattr(model, "config", None)
    configs = [config, config.get_text_config(decoder=True)]
    found = [getattr(one, name, None) for one in configs for name in names]
    return list(dict.fromkeys(float(value) for value in found if isinstance(value, (int, float)) and value))


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same up to rounding, for each stretch by itself: a larger one has larger logits."""
    rounding = max(1e-5, ROUNDING * torch.finfo(theirs.dtype).eps)

    def near(our: Tensor, their: Tensor) -> bool:
        largest = float(their.nan_to_num(posinf=0, neginf=0).abs().max())
        return torch.allclose(our.float(), their.float(), rtol=0, atol=rounding * largest, equal_nan=True)

    parts = len(STRETCH)
    return all(near(*pair) for pair in zip(ours.chunk(parts, 1), theirs.chunk(parts, 1), strict=True))


@contextmanager
def _instead(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Give a module something else than it is called with; collects what that was."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (change(args[0]), *args[1:])

    # Before the hooks of adapters: these work on what the module itself is given, here as later, in pieces.
    handle = module.register_forward_pre_hook(hook, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        found: nn.Module | None = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return found


def _bias(model: nn.Module) -> Tensor | None:
    """What BART and its kin add to their logits."""
    found = getattr(model, "final_logits_bias", None)
    return found if isinstance(found, Tensor) else None
