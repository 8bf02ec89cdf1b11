"""Adapters together: read their specifications, check that they compose, attach them, collect their rates."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import registry
from .contract import Adapter, Attachment, Context, Rate
from .errors import RecipeError, StackError
from .fingerprints import Fingerprint, fingerprint
from .frozen_linear import FrozenLinear
from .registry import ADAPTERS, Entry
from .structure import Layers, family, head_modules
from .validation import faults

__all__ = ["Named", "Spec", "Stack", "attach", "build", "check", "check_family", "get", "packed_as", "rates", "split"]

Spec = str | Mapping[str, Any] | Adapter


@dataclass(frozen=True)
class Named:
    """An adapter of a stack: its instance name, and where its class came from."""

    name: str
    adapter: Adapter
    entry: Entry | None  # None for a class that no distribution registers; it cannot be saved


def get(name: str) -> type[Adapter]:
    """The adapter class of that name (or `distribution:name`), imported now.

    Raises:
        PluginError: unknown, ambiguous, broken, or of another API level.
    """
    loaded: type[Adapter] = registry.load(registry.find(ADAPTERS, name), Adapter)
    return loaded


def build(specs: Sequence[Spec | Named]) -> tuple[Named, ...]:
    """Adapters from their specifications: `"nf4"`, `{"lora": {"rank": 8}}` or an instance.

    Raises:
        RecipeError: a configuration is wrong (all faults at once).
        StackError: two instances have one name.
        PluginError: a name cannot be resolved.
    """
    named = tuple(_build_one(index, spec) for index, spec in enumerate(specs))
    twice = [name for name, count in Counter(n.name for n in named).items() if count > 1]
    if twice:
        raise StackError(f"two adapters are called {twice[0]!r}; give one of them another `name`")
    return named


def _build_one(index: int, spec: Spec | Named) -> Named:
    if isinstance(spec, Named):
        return spec
    if isinstance(spec, Adapter):
        entry = registry.entry_of(ADAPTERS, type(spec))
        return Named(spec.name or (entry.name if entry else type(spec).__name__.lower()), spec, entry)
    name, config = split(spec, f"adapters[{index}]")
    entry = registry.find(ADAPTERS, name)
    loaded: type[Adapter] = registry.load(entry, Adapter)
    try:
        adapter = loaded.model_validate(config)
    except ValidationError as error:
        found = list(faults(error, loaded, (name,)))
        texts = [f"adapters[{index}].{'.'.join(map(str, f.path))}: {f.message}" for f in found]
        raise RecipeError("; ".join(texts), faults=found) from None
    return Named(adapter.name or entry.name, adapter, entry)


def split(spec: object, place: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a specification; `{"lora": null}` means the defaults.

    Raises:
        RecipeError: neither a name nor one name with its configuration.
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, config),) = spec.items()
        if isinstance(name, str) and (config is None or isinstance(config, Mapping)):
            return name, dict(config or {})
    raise RecipeError(f"{place}: write a name, or one name with its settings such as `lora: {{rank: 8}}`, not {spec!r}")


def check(stack: Sequence[Named], *, has_head: bool = False) -> None:
    """Refuse what cannot work, from declared capabilities alone, before any weight is read.

    Raises:
        StackError: with the reason.
    """
    quantisers = [n.name for n in stack if n.adapter.capabilities.quantises]
    if len(quantisers) > 1:
        raise StackError(f"a base is packed once: choose one of {' and '.join(quantisers)}")
    trainers = [n for n in stack if n.adapter.capabilities.trains]
    for n in trainers:
        if quantisers and not n.adapter.capabilities.quantised_bases:
            raise StackError(f"{n.name} trains what {quantisers[0]} has packed: leave one of them out")
        if not n.adapter.capabilities.base_frozen and len(trainers) > 1:
            others = " and ".join(t.name for t in trainers if t is not n)
            raise StackError(f"{n.name} trains the base itself, so {others} beside it has no fixed base to stand on")
    if not trainers and not has_head:
        raise StackError("nothing would be trained: add an adapter that trains something, such as lora")


def check_family(stack: Sequence[Named], model: nn.Module) -> None:
    """Refuse adapters that declare that they cannot work on this kind of model; needs no weights.

    Raises:
        StackError: with the reason.
    """
    capability, kind = family(model)
    for n in stack:
        if not getattr(n.adapter.capabilities, capability):
            raise StackError(f"{n.name} cannot work on {kind}{n.adapter.capabilities.because(capability)}")


@dataclass
class Stack:
    """Adapters attached to one model. Owns what is trainable and can be undone."""

    model: nn.Module  # what to call
    named: tuple[Named, ...]
    attachments: list[Attachment]
    layers: Layers
    heads: dict[str, nn.Parameter] = field(default_factory=dict)
    base: Fingerprint | None = None  # of the base as it was, where an adapter trains the base itself
    _undo: list[Any] = field(default_factory=list)
    _key: object = field(default_factory=object)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything the optimiser steps, by unique name: the adapters' tensors, then the heads'."""
        return {name: p for a in self.attachments for name, p in a.trainable().items()} | self.heads

    def rates(self, weight_decay: float = 0.0) -> dict[str, Rate]:
        """The rate of every trainable tensor, after each adapter of the stack had its say.

        Weight decay leaves out vectors (biases, norms), as usual.
        """
        roles = {name: role for a in self.attachments for name, role in a.roles().items()}
        found = {
            name: Rate(weight_decay=weight_decay if p.ndim > 1 else 0.0, role=roles.get(name, ""))
            for name, p in self.trainable().items()
        }
        for named in self.named:
            changed = named.adapter.rates(found, self.layers)
            if changed.keys() != found.keys():
                raise StackError(f"{named.name}: rates() must answer for exactly the trainable tensors it was given")
            found = changed
        return found

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base without its adapters (heads stay), for evaluation at step 0 or as a reference."""
        for attachment in self.attachments:
            attachment.enabled(False)
        try:
            yield
        finally:
            for attachment in self.attachments:
                attachment.enabled(True)

    def detach(self) -> None:
        """Take everything out again, last first. A frozen base is then what it was, bit for bit.

        Raises:
            StackError: it was detached before.
        """
        if self._key not in _ATTACHED.get(self.model, {}):
            raise StackError("this stack is not attached any more")
        for attachment in reversed(self.attachments):
            attachment.detach()
        for undo in reversed(self._undo):
            undo()
        del _ATTACHED[self.model][self._key]


# Which names and which tensors are attached to a model, by stack. It must not refer to the model, or both would stay.
_ATTACHED: "WeakKeyDictionary[nn.Module, dict[object, tuple[frozenset[str], frozenset[int]]]]" = WeakKeyDictionary()


def attach(
    model: nn.Module, specs: Sequence[Spec | Named], *, seed: int = 0, tokenizer: Any = None, fresh: bool = True
) -> Stack:
    """Freeze the base, free its heads, and attach adapters in order.

    Args:
        model: a transformers model, loaded by `load_base` or otherwise.
        specs: the stack; adapters of the loading stage are checked against the model, not applied.
        seed: of the adapters' random start.
        tokenizer: for adapters that start from text.
        fresh: False when saved values follow, so that a text to start from is not needed.

    Raises:
        StackError: the stack cannot work, on this model, or a name is attached already.
        RecipeError, TargetError, PluginError: a specification is wrong.
    """
    named = build(specs)
    check(named, has_head=bool(head_modules(model)))
    check_family(named, model)
    _check_model(model, named)
    stack = Stack(model, named, [], Layers.of(model))
    if not all(n.adapter.capabilities.base_frozen for n in named):
        stack.base = fingerprint(model)
    _free_heads_only(stack)
    for n in named:
        try:
            attachment = n.adapter.attach(
                model, Context(name=n.name, layers=stack.layers, seed=seed, tokenizer=tokenizer, fresh=fresh)
            )
        except BaseException:
            for done in reversed(stack.attachments):
                done.detach()
            for undo in reversed(stack._undo):
                undo()
            raise
        if attachment is not None:
            stack.attachments.append(attachment)
    _pass_gradients_through_checkpoints(stack)
    names = frozenset(n.name for n in named if n.adapter.capabilities.trains)
    _ATTACHED.setdefault(model, {})[stack._key] = (names, frozenset(map(id, stack.trainable().values())))
    return stack


def rates(stack: Stack, weight_decay: float = 0.0) -> dict[str, Rate]:
    """The rate of every trainable tensor of a stack, by name; the same as `stack.rates(...)`."""
    return stack.rates(weight_decay)


def packed_as(model: nn.Module) -> str | None:
    """How the base's linears are packed (`nf4`, ...), or None for a float base."""
    return next((m.packed.kind for m in model.modules() if isinstance(m, FrozenLinear)), None)


def _check_model(model: nn.Module, named: Sequence[Named]) -> None:
    present = frozenset().union(*(names for names, _ in _ATTACHED.get(model, {}).values()))
    for n in named:
        capabilities = n.adapter.capabilities
        if present and not capabilities.base_frozen:
            raise StackError(
                f"{n.name} trains the base itself, and {min(present)!r} is attached to it: detach that first"
            )
        if n.name in present:
            raise StackError(f"{n.name!r} is attached to this model already; detach it, or give the new one a `name`")
        if capabilities.quantises and packed_as(model) is None:
            raise StackError(
                f"{n.name} packs weights while they are read; load the model with load_base(..., [{n.name!r}])"
            )
        if not capabilities.quantised_bases and packed_as(model) is not None:
            why = capabilities.because("quantised_bases")
            raise StackError(f"{n.name} cannot work on a base packed as {packed_as(model)}{why}")


def _free_heads_only(stack: Stack) -> None:
    """Freeze the base; make heads trainable in float32, fed in float32 whatever the base computes in."""
    model = stack.model
    taken = frozenset().union(*(tensors for _, tensors in _ATTACHED.get(model, {}).values()))
    for parameter in model.parameters():
        if id(parameter) not in taken:
            parameter.requires_grad_(False)
    for name in head_modules(model):
        head = model.get_submodule(name)
        if any(id(p) in taken for p in head.parameters()):
            continue  # an earlier stack owns it
        dtypes = {parameter: (parameter.dtype, parameter.detach().clone()) for parameter in head.parameters()}
        for tensor_name, parameter in head.named_parameters(prefix=name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            stack.heads[tensor_name] = parameter
        handle = head.register_forward_pre_hook(_floats_as_float32, with_kwargs=True)
        stack._undo.append(lambda handle=handle, dtypes=dtypes: _restore_head(handle, dtypes))


def _restore_head(handle: Any, dtypes: dict[nn.Parameter, tuple[torch.dtype, Tensor]]) -> None:
    handle.remove()
    for parameter, (_, original) in dtypes.items():
        parameter.data = original
        parameter.requires_grad_(False)


def _floats_as_float32(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _pass_gradients_through_checkpoints(stack: Stack) -> None:
    """Let the embeddings' output require gradients while checkpointing is on.

    A reentrant checkpoint drops the gradient of every tensor inside when none of its inputs requires one, and over
    frozen embeddings none does: the adapter would silently not be trained.
    """
    model = stack.model
    if not isinstance(model, PreTrainedModel):
        return

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and model.is_activation_checkpointing and not output.requires_grad:
            output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require)
    stack._undo.append(handle.remove)
