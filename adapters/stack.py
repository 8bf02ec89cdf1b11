"""Adapters that are attached to one model, as one: what they train, at which rates, switched, merged, taken out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from .contract import Adapter, Attachment, Rate
from .errors import StackError, nearest
from .fingerprints import Fingerprint
from .isolation import answerable
from .specs import Named
from .structure import Layers

__all__ = ["Present", "Stack", "present", "rates", "remember"]


@dataclass
class Stack:
    """Adapters attached to one model. Owns what is trainable and can be undone."""

    root: nn.Module  # the base that they are attached to
    named: tuple[Named, ...]
    attachments: list[Attachment]
    layers: Layers
    heads: dict[str, nn.Parameter] = field(default_factory=dict)
    base: Fingerprint | None = None  # of the base as it was, where an adapter trains the base itself
    base_mismatch: list[str] = field(default_factory=list)  # bases that its values were trained on, where others
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
        remember(self)

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
        trained = {parameter: parameter.detach().clone() for parameter in self.heads.values()}
        self._leave()
        for parameter, value in trained.items():  # of a merged model the trained head is a part
            parameter.data = value.to(parameter.dtype)

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


class Present(NamedTuple):
    """What a stack has on a model."""

    names: frozenset[str]
    tensors: frozenset[int]  # ids of what is trainable
    kinds: tuple[type[Adapter], ...]


# What is attached to a model, by stack. It must not refer to the model, or both would stay.
_ATTACHED: "WeakKeyDictionary[nn.Module, dict[object, Present]]" = WeakKeyDictionary()


def present(model: nn.Module) -> list[Present]:
    """What is attached to a model now, by stack."""
    return list(_ATTACHED.get(model, {}).values())


def remember(stack: Stack) -> None:
    """Note what a stack has on its model, so that the next one does not collide with it."""
    trainers = [n for n in stack.named if n.adapter.capabilities.trains]
    tensors = frozenset(map(id, stack.trainable().values()))
    kinds = tuple(type(n.adapter) for n in trainers)
    _ATTACHED.setdefault(stack.root, {})[stack._key] = Present(frozenset(n.name for n in trainers), tensors, kinds)


def rates(stack: Stack, weight_decay: float = 0.0) -> dict[str, Rate]:
    """The rate of every trainable tensor of a stack, by name; the same as `stack.rates(...)`."""
    return stack.rates(weight_decay)
