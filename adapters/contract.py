"""The contract between onegpu and an adapter; all that a plugin author has to know.

An *adapter* is one change to how a base model is loaded, shaped or optimised. Its class is its strict, frozen
configuration; its methods are the verbs of that change, and each takes what the one before it returned, so that
adapters compose into a stack:

    load_options   before weights are read      int8, nf4, fp4
    attach         on the model in memory       lora, prefix, full
    rates          when the optimiser is built  layerwise-lr

Attaching gives an *attachment*: one live, named instance that owns everything about that instance.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .errors import StackError
from .registry import API
from .structure import Layers

__all__ = ["API", "Adapter", "Attachment", "Capabilities", "Context", "LoadOptions", "Rate"]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an adapter declares about itself. Read before weights are; never probed."""

    trains: bool = True  # adds or frees tensors; False for a change of loading or of rates
    base_frozen: bool = True  # the base's bytes are the same after training
    identity_at_start: bool = True  # a fresh one leaves the base's outputs as they are
    quantised_bases: bool = True  # works on a base whose linears are packed
    quantises: bool = False  # packs the linears of the base
    mergeable: bool = False  # can be folded into float weights
    peft_readable: bool = False  # stock PEFT can read what it saves
    encoder_decoder: bool = True  # works on a model with an encoder and a decoder


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the base is read. An adapter returns a changed copy (`dataclasses.replace`)."""

    dtype: torch.dtype  # of every base tensor that is not packed
    device: torch.device
    autocast: torch.dtype | None = None  # compute dtype where the base itself trains in `dtype`
    quantization_config: object | None = None  # handed to transformers
    after_load: tuple[Callable[[nn.Module], None], ...] = ()  # run once on the model just read


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How one trainable tensor is stepped. Equal rates form one group of the optimiser."""

    multiplier: float = 1.0  # of the scheduled learning rate
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Context:
    """What `attach` may need beside the model."""

    name: str  # of this instance
    layers: Layers
    seed: int = 0
    tokenizer: Any = None
    fresh: bool = True  # False when saved values follow: what it starts from does not matter then


class Adapter(BaseModel, ABC):
    """Base class of all adapters: subclass it, add fields for the configuration, override the verbs that apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    api: ClassVar[int] = 0  # each adapter states the level it was written for
    capabilities: ClassVar[Capabilities] = Capabilities()

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Name of this instance; the adapter's own name when left out. Two of one kind need two names."""

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        """Change how weights are read. `keep`: modules that must stay as they are (heads, output embeddings)."""
        return options

    def check(self, skeleton: nn.Module) -> None:
        """Refuse what cannot work on this base, given the model without weights (on torch's meta device)."""

    def positions(self) -> int:
        """How many of the model's positions it occupies; the longest input shrinks by as many."""
        return 0

    def attach(self, model: nn.Module, context: Context) -> "Attachment | None":
        """Change the model in memory; None when this adapter does nothing at this stage."""
        return None

    def rates(self, rates: Mapping[str, Rate], layers: Layers) -> dict[str, Rate]:
        """Change the rates of the trainable tensors, given by name."""
        return dict(rates)


@dataclass
class Attachment:
    """One live instance on one model. The defaults make most of it empty: override what the method needs."""

    head_prefix: ClassVar[str] = "base_model.model."  # of head tensors beside this method's in a file of PEFT's

    name: str
    adapter: Adapter
    model: nn.Module  # what to call from now on; a method may need a wrapper of its own
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)  # trainable, by unique name

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that the optimiser steps: float32, named after their place in the model."""
        return self.parameters

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under the keys of the file."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a file whose keys, shapes and dtypes were found to match `tensors()`."""
        own = self.tensors()
        with torch.no_grad():
            for key, value in tensors.items():
                own[key].copy_(value)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the tensors, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state()` gave."""

    def enabled(self, on: bool) -> None:
        """Switch the instance off (the base alone) or on again."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Called before the window of optimiser step `step` (layer sampling)."""

    def after_backward(self, step: int) -> None:
        """Called once per window, when its gradient is complete (rank allocation)."""

    def penalty(self) -> Tensor | None:
        """The method's own term of the loss, once per optimiser step; None for none."""
        return None

    def may_rest(self) -> frozenset[str]:
        """Trainable tensors that need not have a gradient in the step to come: the step proof passes over them."""
        return frozenset()

    def merge(self) -> None:
        """Fold the change into the base's weights and detach."""
        raise StackError(f"{self.name}: this method cannot be merged into the base")

    def detach(self) -> None:
        """Take the change out again; a frozen base is then what it was, bit for bit."""
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """What the configuration came to on this model (matched targets, shapes); stored in the manifest."""
        return {}

    def peft_config(self) -> dict[str, Any] | None:
        """The configuration as stock PEFT reads it, non-default keys only; None where PEFT cannot."""
        return None
