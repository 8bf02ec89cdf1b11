"""The contract between onegpu and an adapter; all that a plugin author has to know.

An *adapter* is one change to how a base model is loaded, shaped or optimised. Its class is its strict, frozen
configuration; its methods are the verbs of that change, and each takes what the one before it returned, so that
adapters compose into a stack:

    load_options   before weights are read      int8, nf4, fp4
    attach         on the model in memory       lora, prefix, full
    rates          when the optimiser is built  layerwise-lr

Attaching gives an *attachment*: one live, named instance that owns everything about that instance. The suite in
`conformance.py` proves what an adapter declares.
"""

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .errors import StackError
from .registry import API
from .structure import Layers

__all__ = ["API", "SAFELY", "Adapter", "Attachment", "Capabilities", "Context", "Cost", "LoadOptions", "Rate"]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an adapter declares about itself. Read before weights are; never probed, but proved by the suite."""

    trains: bool = True  # adds or frees tensors; False for a change of loading or of rates
    base_frozen: bool = True  # the base's bytes are the same after training
    identity_at_start: bool = True  # a fresh one leaves the base's outputs as they are
    quantised_bases: bool = True  # works on a base whose linears are packed
    half_bases: bool = True  # works on a bf16 or fp16 base
    quantises: bool = False  # packs the linears of the base
    mergeable: bool = False  # can be folded into float weights
    peft_readable: bool = False  # stock PEFT can read what it saves
    encoders: bool = True  # works on a model that only encodes (BERT)
    decoders: bool = True  # works on a model that only decodes (Llama)
    encoder_decoder: bool = True  # works on a model with an encoder and a decoder
    checkpointing: bool = True  # gives the same gradients under gradient checkpointing
    packing: bool = True  # sequences packed into one row do not see each other
    row_by_row: bool = True  # what it gives for a row does not depend on the other rows of its batch
    devices: tuple[str, ...] = ("cpu", "cuda")  # kinds of device that it works on
    attentions: tuple[str, ...] | None = None  # transformers' implementations that it works with; None for any
    several: bool = True  # two instances work on one model
    planned: bool = True  # `cost` can tell from a model without weights
    reasons: Mapping[str, str] = field(default_factory=dict)  # capability -> why it is as it is, for messages

    def because(self, capability: str) -> str:
        """`: the reason`, where one is given."""
        return f": {self.reasons[capability]}" if capability in self.reasons else ""


# How weights are read, for every `from_pretrained`: a base is data. Left unsaid, transformers asks at the terminal
# whether a base's own code may run, and reads pickles where there are no safetensors.
SAFELY: Mapping[str, Any] = {"use_safetensors": True, "trust_remote_code": False}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the base is read. An adapter returns a changed copy (`dataclasses.replace`)."""

    dtype: torch.dtype  # of every base tensor that is not packed
    device: torch.device
    autocast: torch.dtype | None = None  # compute dtype where the base itself trains in `dtype`
    attention: str | None = None  # transformers' name of the implementation; None for the model's own; settled last
    quantization_config: object | None = None  # handed to transformers
    after_load: tuple[Callable[[nn.Module], None], ...] = ()  # run once on the model just read


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How one trainable tensor is stepped. Equal rates form one group of the optimiser."""

    multiplier: float = 1.0  # of the scheduled learning rate
    weight_decay: float = 0.0
    role: str = field(default="", compare=False)  # what the tensor is to its method, from `Attachment.roles`


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes that an adapter adds to a run, by kind."""

    weights: int = 0  # its own tensors, frozen ones too
    gradients: int = 0  # of what it trains, at one time
    optimizer: int = 0  # AdamW's two moments of what it trains


@dataclass(frozen=True, kw_only=True)
class Context:
    """What `attach` may need beside the model."""

    name: str  # of this instance
    layers: Layers
    seed: int = 0
    tokenizer: Any = None
    samples: Sequence[
        Mapping[str, Tensor]
    ] = ()  # a few batches as the model takes them, for a start that looks at data
    fresh: bool = True  # False when saved values follow: what it starts from does not matter then


class Adapter(BaseModel, ABC):
    """Base class of all adapters: subclass it, add fields for the configuration, override the verbs that apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    api: ClassVar[int] = 0  # each adapter states the level it was written for
    capabilities: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class whose capabilities cannot be read from it: it would fail in the middle of a run."""
        super().__pydantic_init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "capabilities", None), Capabilities):
            raise TypeError(f"{cls.__name__}: declare `capabilities: ClassVar[Capabilities] = Capabilities(...)`")

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Name of this instance; the adapter's own name when left out. Two of one kind need two names."""

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        """Change how weights are read. `keep`: modules that must stay as they are (heads, output embeddings)."""
        return options

    def check(self, skeleton: nn.Module) -> None:
        """Refuse what cannot work on this base, given the model without weights (on torch's meta device)."""

    def aims(self, skeleton: nn.Module) -> Mapping[str, Sequence[str]]:
        """What each entry of its targets means: entry -> paths of modules; nothing for one that has no such setting."""
        return {}

    def positions(self) -> int:
        """How many of the model's positions it occupies; the longest input shrinks by as many."""
        return 0

    def attach(self, model: nn.Module, context: Context) -> "Attachment | None":
        """Change the model in memory; None when this adapter does nothing at this stage."""
        return None

    def rates(self, rates: Mapping[str, Rate], layers: Layers) -> dict[str, Rate]:
        """Change the rates of the trainable tensors, given by name."""
        return dict(rates)

    def cost(self, skeleton: nn.Module) -> Cost:
        """What it adds to a run, found by attaching it to the model without weights.

        Raises:
            StackError: it cannot be told without weights.
        """
        if not self.capabilities.planned:
            name = self.name or type(self).__name__
            raise StackError(f"what {name} costs cannot be told without weights{self.capabilities.because('planned')}")
        before = {id(tensor) for tensor in (*skeleton.parameters(), *skeleton.buffers())}
        context = Context(name=self.name or "adapter", layers=Layers.of(skeleton), fresh=False)
        attachment = self.attach(skeleton, context)
        if attachment is None:
            return Cost()
        trained = list(attachment.trainable().values())
        live = {id(t): t for t in (*skeleton.parameters(), *skeleton.buffers(), *trained)}
        elements = sum(parameter.numel() for parameter in trained)
        weights = sum(tensor.nbytes for key, tensor in live.items() if key not in before)
        attachment.detach()
        return Cost(weights=weights, gradients=4 * elements, optimizer=8 * elements)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], targets: Sequence[str]) -> "Adapter | None":
        """This adapter from a configuration that stock PEFT wrote; None when it cannot do what that says.

        Args:
            config: keys of PEFT's that differ from their defaults.
            targets: full paths of the modules that PEFT's `target_modules` mean on the model.
        """
        return None


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

    def roles(self) -> dict[str, str]:
        """What a trainable tensor is to its method (`A`, `B`, ...), for adapters that treat roles differently."""
        return {}

    def enabled(self, on: bool) -> None:
        """Switch the instance off (the base alone) or on again."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Called before the window of optimiser step `step` (layer sampling)."""

    def after_backward(self, step: int) -> None:
        """Called once per window, when its gradient is complete."""

    def after_step(self, step: int) -> None:
        """Called when the optimiser has stepped and the gradient is still there (rank allocation)."""

    def penalty(self) -> Tensor | None:
        """The method's own term of the loss, once per optimiser step; None for none."""
        return None

    def may_rest(self) -> frozenset[str]:
        """Trainable tensors that need not have a gradient in the step to come: the step proof passes over them."""
        return frozenset()

    def may_change(self) -> frozenset[str]:
        """Buffers and frozen tensors of its own that change in training, by their names in `model`; no other may."""
        return frozenset()

    def gradient_floors(self) -> Mapping[str, float]:
        """Norms that the gradient of a tensor must reach in the step proof, by name; above zero where left out."""
        return {}

    def merge(self) -> None:
        """Fold the change into the base's weights and detach."""
        why = self.adapter.capabilities.because("mergeable")
        raise StackError(f"{self.name}: this method cannot be merged into the base{why}")

    def detach(self) -> None:
        """Take the change out again; a frozen base is then what it was, bit for bit."""
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """What the configuration came to on this model (matched targets, shapes); stored in the manifest."""
        return {}

    def peft_config(self) -> dict[str, Any] | None:
        """The configuration as stock PEFT reads it, non-default keys only; None where PEFT cannot."""
        return None
