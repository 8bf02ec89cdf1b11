"""What the targets of a stack come to on a base: which entry means how many modules, and what is trained there."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .contract import Context
from .errors import OnegpuError
from .isolation import answerable
from .specs import Named
from .structure import Layers, modules

__all__ = ["Target", "count_targets"]


@dataclass(frozen=True)
class Target:
    """One entry of the targets of one adapter; or all that it changes, where it has no such setting."""

    adapter: str  # name of the instance
    entry: str
    kinds: Mapping[str, int]  # last part of the path of a module -> how many of those
    parameters: int | None  # that are trained there; None where only weights could tell

    @property
    def modules(self) -> int:
        """How many modules there are in all."""
        return sum(self.kinds.values())


def count_targets(skeleton: PreTrainedModel, stack: Sequence[Named], tokenizer: Any = None) -> list[Target]:
    """The table, from a model without weights; each adapter is attached to a copy of it.

    Raises:
        TargetError, PluginError: a target of an adapter means nothing on this base.
    """
    trainers = [named for named in stack if named.adapter.capabilities.trains]
    return [row for named in trainers for row in _rows(skeleton, named, tokenizer)]


def _rows(skeleton: PreTrainedModel, named: Named, tokenizer: Any) -> list[Target]:
    with answerable(named.name, named.entry, "aims"):
        aims = named.adapter.aims(skeleton)
    try:
        trained = _trained(copy.deepcopy(skeleton), named, tokenizer)
    except OnegpuError:
        trained = None  # it was found to fit by its own `check`; what it says now is for who attaches it to weights
    if not aims:
        return [_row(named, "(all it changes)", list(trained or ()), trained)] if trained is None or trained else []
    return [_row(named, entry, paths, trained) for entry, paths in aims.items()]


def _trained(skeleton: PreTrainedModel, named: Named, tokenizer: Any) -> Counter[str] | None:
    """Modules of the base that an adapter trains something at -> how many parameters; None where weights decide."""
    if not named.adapter.capabilities.planned:
        return None
    paths = {path for path, _ in modules(skeleton)}
    context = Context(name=named.name, layers=Layers.of(skeleton), tokenizer=tokenizer, fresh=False)
    found = Counter[str]()
    with answerable(named.name, named.entry, "attach"):
        attachment = named.adapter.attach(skeleton, context)
    if attachment is None:
        return found
    for name, parameter in attachment.trainable().items():
        ends = (name[:end] for end in range(len(name), 0, -1) if end == len(name) or name[end] == ".")
        found[next((path for path in ends if path in paths), name)] += parameter.numel()
    return found


def _row(named: Named, entry: str, paths: Sequence[str], trained: Mapping[str, int] | None) -> Target:
    kinds = Counter(path.rpartition(".")[2] for path in paths)
    parameters = None if trained is None else sum(trained.get(path, 0) for path in paths)
    return Target(named.name, entry, dict(kinds.most_common()), parameters)
