"""Adapters together: read their specifications, check that they compose, attach them, collect their rates."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import registry
from .contract import Adapter, Attachment, Context, Rate
from .errors import RecipeError, StackError, nearest
from .fingerprints import Fingerprint, fingerprint
from .frozen_linear import FrozenLinear
from .isolation import answerable
from .registry import ADAPTERS, Entry
from .structure import Addition, Layers, family, head_modules
from .validation import faults

__all__ = [
    "Named",
    "Spec",
    "Stack",
    "attach",
    "build",
    "check",
    "check_family",
    "get",
    "packed_as",
    "rates",
    "refuse_half",
    "split",
]

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
        with answerable(name, entry, "reading its settings", passing=ValidationError):
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
            why = n.adapter.capabilities.because("quantised_bases") or ": leave one of them out"
            raise StackError(f"{n.name} cannot work on what {quantisers[0]} has packed{why}")
        if not n.adapter.capabilities.base_frozen and len(trainers) > 1:
            others = " and ".join(t.name for t in trainers if t is not n)
            raise StackError(f"{n.name} trains the base itself, so {others} beside it has no fixed base to stand on")
    _refuse_several(stack)
    if not trainers and not has_head:
        raise StackError("nothing would be trained: add an adapter that trains something, such as lora")


def _refuse_several(stack: Sequence[Named], present: Iterable[type[Adapter]] = ()) -> None:
    """Refuse a second instance of an adapter that declares that a model can have one."""
    kinds = Counter([*present, *(type(n.adapter) for n in stack)])
    for n in reversed(stack):
        if kinds[type(n.adapter)] > 1 and not n.adapter.capabilities.several:
            why = n.adapter.capabilities.because("several")
            raise StackError(f"{n.name} would be the second of its kind, and a model can have one{why}")


def check_family(stack: Sequence[Named], model: nn.Module) -> None:
    """Refuse adapters that declare that they cannot work on this kind of model; needs no weights.

    Raises:
        StackError: with the reason.
    """
    capability, kind = family(model)
    for n in stack:
        if not getattr(n.adapter.capabilities, capability):
            raise StackError(f"{n.name} cannot work on {kind}{n.adapter.capabilities.because(capability)}")


def refuse_half(named: Named, dtype: torch.dtype) -> None:
    """Refuse an adapter that declares that it needs a float32 base.

    Raises:
        StackError: with the reason.
    """
    if dtype in (torch.bfloat16, torch.float16) and not named.adapter.capabilities.half_bases:
        short = str(dtype).removeprefix("torch.")
        why = named.adapter.capabilities.because("half_bases")
        raise StackError(f"{named.name} cannot work on a base in {short}{why}; load it in float32")


@dataclass
class Stack:
    """Adapters attached to one model. Owns what is trainable and can be undone."""

    root: nn.Module  # the base that they are attached to
    named: tuple[Named, ...]
    attachments: list[Attachment]
    layers: Layers
    heads: dict[str, nn.Parameter] = field(default_factory=dict)
    base: Fingerprint | None = None  # of the base as it was, where an adapter trains the base itself
    _off: set[str] = field(default_factory=set)  # names of those that are switched off
    _beside: dict[str, str] = field(default_factory=dict)  # instance -> child of the base that shows its tensors
    _undo: list[Any] = field(default_factory=list)
    _key: object = field(default_factory=object)

    @property
    def model(self) -> nn.Module:
        """What to call: the base itself, unless an adapter brought a wrapper of its own."""
        return next((a.model for a in reversed(self.attachments) if a.model is not self.root), self.root)

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
            with answerable(named.name, named.entry, "rates"):
                changed = named.adapter.rates(found, self.layers)
            if changed.keys() != found.keys():
                raise StackError(f"{named.name}: rates() must answer for exactly the trainable tensors it was given")
            found = changed
        return found

    def enable(self, *names: str) -> None:
        """Switch instances on again; all when none is named.

        Raises:
            StackError: there is no instance of that name.
        """
        self._switch(names, on=True)

    def disable(self, *names: str) -> None:
        """Switch instances off: the model is then what it would be without them. All when none is named.

        Raises:
            StackError: there is no instance of that name, or one that trains the base itself cannot be switched off.
        """
        self._switch(names, on=False)

    def _switch(self, names: Sequence[str], *, on: bool) -> None:
        for attachment in [self._attachment(name) for name in names] or self.attachments:
            attachment.enabled(on)
            (self._off.discard if on else self._off.add)(attachment.name)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base without its adapters (heads stay), for evaluation at step 0 or as a reference."""
        on = [a.name for a in self.attachments if a.name not in self._off]
        try:
            if on:
                self.disable(*on)
            yield
        finally:
            if on:
                self.enable(*on)

    def remove(self, name: str) -> None:
        """Take one instance out for good; the others, and heads, stay.

        Raises:
            StackError: there is no instance of that name, or it is the only one.
        """
        attachment = self._attachment(name)
        if len(self.attachments) == 1:
            raise StackError(f"{name!r} is the only adapter that is attached: detach the stack instead")
        attachment.detach()
        self._forget(attachment)
        _remember(self)

    def merge(self) -> None:
        """Fold every instance into the base's weights, last first; the stack is then detached, and the base another.

        Raises:
            StackError: one declares that it cannot be merged, and nothing has changed; or one cannot be merged into
                this base, and those behind it have been.
        """
        for n in self.named:
            if n.adapter.capabilities.trains and not n.adapter.capabilities.mergeable:
                raise StackError(
                    f"{n.name} cannot be merged into the base{n.adapter.capabilities.because('mergeable')}"
                )
        for attachment in reversed(self.attachments[:]):
            attachment.merge()
            self._forget(attachment)
        self._leave()

    def _forget(self, attachment: Attachment) -> None:
        self.attachments.remove(attachment)
        self.named = tuple(n for n in self.named if n.name != attachment.name)
        self._off.discard(attachment.name)
        if attachment.name in self._beside:
            delattr(self.root, self._beside.pop(attachment.name))

    def _leave(self) -> None:
        for undo in reversed(self._undo):
            undo()
        del _ATTACHED[self.root][self._key]

    def _attachment(self, name: str) -> Attachment:
        found = next((a for a in self.attachments if a.name == name), None)
        if found is None:
            raise StackError(f"no adapter {name!r} is attached{nearest(name, [a.name for a in self.attachments])}")
        return found

    def detach(self) -> None:
        """Take everything out again, last first. A frozen base is then what it was, bit for bit.

        Raises:
            StackError: it was detached before.
        """
        if self._key not in _ATTACHED.get(self.root, {}):
            raise StackError("this stack is not attached any more")
        for attachment in reversed(self.attachments):
            attachment.detach()
        for child in self._beside.values():
            delattr(self.root, child)
        self._beside.clear()
        self._leave()


class _Present(NamedTuple):
    """What a stack has on a model."""

    names: frozenset[str]
    tensors: frozenset[int]  # ids of what is trainable
    kinds: tuple[type[Adapter], ...]


# What is attached to a model, by stack. It must not refer to the model, or both would stay.
_ATTACHED: "WeakKeyDictionary[nn.Module, dict[object, _Present]]" = WeakKeyDictionary()


def _remember(stack: Stack) -> None:
    trainers = [n for n in stack.named if n.adapter.capabilities.trains]
    tensors = frozenset(map(id, stack.trainable().values()))
    present = _Present(frozenset(n.name for n in trainers), tensors, tuple(type(n.adapter) for n in trainers))
    _ATTACHED.setdefault(stack.root, {})[stack._key] = present


def attach(
    model: nn.Module,
    specs: Sequence[Spec | Named],
    *,
    seed: int = 0,
    tokenizer: Any = None,
    samples: Sequence[Mapping[str, Tensor]] = (),
    fresh: bool = True,
) -> Stack:
    """Freeze the base, free its heads, and attach adapters in order.

    Args:
        model: a transformers model, loaded by `load_base` or otherwise.
        specs: the stack; adapters of the loading stage are checked against the model, not applied.
        seed: of the adapters' random start.
        tokenizer: for adapters that start from text.
        samples: a few batches as the model takes them, for adapters that start from data.
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
            context = Context(
                name=n.name, layers=stack.layers, seed=seed, tokenizer=tokenizer, samples=samples, fresh=fresh
            )
            with answerable(n.name, n.entry, "attach"):
                attachment = n.adapter.attach(model, context)
        except BaseException:
            for done in reversed(stack.attachments):
                done.detach()
            for undo in reversed(stack._undo):
                undo()
            raise
        if attachment is not None:
            stack.attachments.append(attachment)
    _pass_gradients_through_checkpoints(stack)
    _show_beside(stack)
    _remember(stack)
    return stack


def rates(stack: Stack, weight_decay: float = 0.0) -> dict[str, Rate]:
    """The rate of every trainable tensor of a stack, by name; the same as `stack.rates(...)`."""
    return stack.rates(weight_decay)


def packed_as(model: nn.Module) -> str | None:
    """How the base's linears are packed (`nf4`, ...), or None for a float base."""
    return next((m.packed.kind for m in model.modules() if isinstance(m, FrozenLinear)), None)


def _check_model(model: nn.Module, named: Sequence[Named]) -> None:
    attached = _ATTACHED.get(model, {}).values()
    present = frozenset[str]().union(*(p.names for p in attached))
    _refuse_several(named, [kind for p in attached for kind in p.kinds])
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
        checkpoints = isinstance(model, PreTrainedModel) and model.is_activation_checkpointing
        if checkpoints and not capabilities.checkpointing:
            why = capabilities.because("checkpointing")
            raise StackError(f"{n.name} cannot work under gradient checkpointing{why}")
        refuse_half(n, next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))


def _free_heads_only(stack: Stack) -> None:
    """Freeze the base; make heads trainable in float32, fed in float32 whatever the base computes in."""
    model = stack.root
    taken = frozenset[int]().union(*(p.tensors for p in _ATTACHED.get(model, {}).values()))
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


def _show_beside(stack: Stack) -> None:
    """Put tensors that an adapter keeps beside the model into it.

    A Trainer finds what it optimises, clips and zeroes in `model.parameters()`; others would never be trained, or
    their gradients would add up from step to step.
    """
    for attachment in stack.attachments:
        inside = {id(p) for p in stack.root.parameters()}
        beside = [p for p in attachment.trainable().values() if id(p) not in inside]
        if beside:
            shown = Addition()
            shown.tensors = nn.ParameterList(beside)
            child = stack._beside[attachment.name] = f"beside_{attachment.name}"
            stack.root.add_module(child, shown.train(stack.root.training))


def _pass_gradients_through_checkpoints(stack: Stack) -> None:
    """Let the embeddings' output require gradients while checkpointing is on.

    A reentrant checkpoint drops the gradient of every tensor inside when none of its inputs requires one, and over
    frozen embeddings none does: the adapter would silently not be trained.
    """
    model = stack.root
    if not isinstance(model, PreTrainedModel):
        return

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and model.is_activation_checkpointing and not output.requires_grad:
            output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require)
    stack._undo.append(handle.remove)
