"""What a model is made of: its linears, its layers in order, its heads.

Paths are *logical*: a wrapper that an adapter put around a module is looked through, so names stay those of the base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

from torch import Tensor, nn
from transformers import EncoderDecoderModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = [
    "NEW_MODULES",
    "Addition",
    "Layers",
    "Wrapper",
    "family",
    "head_modules",
    "inside",
    "linear_shape",
    "linears",
    "modules",
    "new_modules",
    "output_embeddings",
    "swap",
    "unwrap",
    "weight",
    "without_wrappers",
]

NEW_MODULES = "onegpu_new_modules"  # key of a model's configuration


class Wrapper(nn.Module):
    """A module that stands in for another one and holds it as `base`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = base.training  # a model fresh from its checkpoint is in evaluation mode

    @property
    def weight(self) -> Tensor:
        """The base's: models look at it from outside (a T5 asks for its dtype)."""
        found = self.base.weight
        assert isinstance(found, Tensor), type(found)
        return found


class Addition(nn.Module):
    """A module that an adapter hung beside the base's own ones; not part of the base."""


@singledispatch
def inside(module: object) -> nn.Module | None:
    """What a wrapper stands in for; None for any other module. Another library's wrappers register themselves."""
    return None


@inside.register
def _(module: Wrapper) -> nn.Module:
    return module.base


def unwrap(module: nn.Module) -> nn.Module:
    """The base's own module behind any wrappers."""
    while (inner := inside(module)) is not None:
        module = inner
    return module


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `model` with its logical path, outermost wrapper first seen; idle ones are left out."""
    idle = "encoder.pooler" if isinstance(unwrap(model), EncoderDecoderModel) else None  # nothing reads what it gives
    for name, child in unwrap(model).named_children():
        if not isinstance(child, Addition):
            path = f"{prefix}{name}"
            yield path, child
            below = modules(child, f"{path}.")
            yield from (found for found in below if idle is None or not found[0].startswith(idle))


def swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever in the model they sit."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """The model with our wrappers taken out for a while; whatever stands in a place afterwards, they go around it."""
    slots = []
    for parent in [m for m in model.modules() if not isinstance(m, Wrapper)]:
        for name, outermost in list(parent.named_children()):
            if isinstance(outermost, Wrapper):
                innermost = outermost
                while isinstance(innermost.base, Wrapper):
                    innermost = innermost.base
                slots.append((parent, name, outermost, innermost))
                setattr(parent, name, innermost.base)
    try:
        yield
    finally:
        for parent, name, outermost, innermost in slots:
            innermost.base = getattr(parent, name)
            setattr(parent, name, outermost)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of anything that multiplies by a matrix; None for any other module."""
    module = unwrap(module)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear, which stores its weight as (in, out)
        return module.nx, module.nf
    return None


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of the model, float or packed, by logical path."""
    return {path: module for path, module in modules(model) if linear_shape(module) is not None}


def output_embeddings(model: nn.Module) -> str | None:
    """Logical path of the layer that gives logits over the vocabulary, where there is one."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        output = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return next((path for path, module in modules(model) if unwrap(module) is output or module is output), None)


def family(model: nn.Module) -> tuple[Literal["encoders", "decoders", "encoder_decoder"], str]:
    """The capability that an adapter needs to work on this model, and the kind of model in words."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder", "a model with an encoder and a decoder"
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    return ("decoders", "a model that only decodes") if causal else ("encoders", "a model that only encodes")


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the task heads: what a model has beside its backbone and its output embeddings.

    A BERT classifier has ("classifier",), a Llama one ("score",), a causal language model none. A model that was
    composed of two has what was new in it.
    """
    if new := new_modules(model):
        return new
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return ()
    output = output_embeddings(model) or ""
    return tuple(
        name
        for name, child in model.named_children()
        if child is not model.base_model
        and not isinstance(child, Addition)
        and not output.startswith(name)
        and next(unwrap(child).parameters(), None) is not None
    )


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of modules inside the base that no checkpoint ever trained, such as the cross-attention of a composed one.

    The base's configuration lists them. They are trained and saved as heads are; what they give goes on into the base.
    """
    return tuple(getattr(getattr(model, "config", None), NEW_MODULES, ()))


@dataclass(frozen=True)
class Layers:
    """The layers of a model in order, and where a tensor stands among them."""

    stacks: tuple[tuple[str, int], ...]  # (path of a list of layers, how many it holds)
    embeddings: tuple[str, ...]  # paths of what lies before the layers

    @classmethod
    def of(cls, model: nn.Module) -> "Layers":
        """Read the layers off a model: its outermost lists of blocks, encoder before decoder."""
        lists = {path: module for path, module in modules(model) if isinstance(module, nn.ModuleList)}
        count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        stacks = {path: len(m) for path, m in lists.items() if len(m) == count} or {p: len(m) for p, m in lists.items()}
        outermost = {p: n for p, n in stacks.items() if not any(p.startswith(f"{q}.") for q in stacks)}
        ancestors = {p.rsplit(".", i)[0] for p in outermost for i in range(1, p.count(".") + 1)}
        return cls(tuple(outermost.items()), tuple(_embedding_paths(model, ancestors, set(outermost))))

    @property
    def count(self) -> int:
        """How many layers there are, encoder and decoder together."""
        return sum(length for _, length in self.stacks)

    def depth(self, tensor: str) -> int:
        """0 for the embeddings, 1 ... count for the layers, count + 1 for final norm and head."""
        below = 0
        for path, length in self.stacks:
            if tensor.startswith(f"{path}."):
                return below + int(tensor[len(path) + 1 :].split(".", 1)[0]) + 1
            below += length
        in_embeddings = any(tensor == path or tensor.startswith(f"{path}.") for path in self.embeddings)
        return 0 if in_embeddings else self.count + 1


def _embedding_paths(model: nn.Module, ancestors: set[str], stacks: set[str]) -> Iterator[str]:
    """Modules beside the layer lists that hold an embedding table (token, position), outermost first."""
    for path, module in modules(model):
        parent = path.rpartition(".")[0]
        beside = parent == "" or parent in ancestors
        if beside and path not in ancestors | stacks and any(isinstance(m, nn.Embedding) for m in module.modules()):
            yield path


def weight(linear: nn.Module) -> Tensor:
    """The float weight of an unpacked linear, (out, in) for nn.Linear and (in, out) for Conv1D."""
    base = unwrap(linear)
    assert isinstance(base, (nn.Linear, Conv1D)), type(base)
    return base.weight
