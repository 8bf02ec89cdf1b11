"""What a stack is to be: specifications read into adapters, and refused where they cannot work together."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from . import registry
from .contract import Adapter
from .errors import RecipeError, StackError, brief
from .isolation import answerable
from .registry import ADAPTERS, Entry
from .validation import faults

__all__ = ["Named", "Spec", "build", "check", "get", "refuse_several", "split"]

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
    raise RecipeError(
        f"{place}: write a name, or one name with its settings such as `lora: {{rank: 8}}`, not {brief(spec)}"
    )


def check(stack: Sequence[Named], *, has_head: bool = False) -> None:
    """Refuse what cannot work, from declared capabilities alone, before any weight is read.

    Raises:
        StackError: with every reason.
    """
    found = [*_together(stack, has_head=has_head)]
    try:
        refuse_several(stack)
    except StackError as error:
        found.append(str(error))
    if found:
        raise StackError("; ".join(found))


def _together(stack: Sequence[Named], *, has_head: bool) -> Iterator[str]:
    """What the adapters of a stack declare that rules out others of it."""
    quantisers = [n.name for n in stack if n.adapter.capabilities.quantises]
    if len(quantisers) > 1:
        yield f"a base is packed once: choose one of {' and '.join(quantisers)}"
    trainers = [n for n in stack if n.adapter.capabilities.trains]
    for n in trainers:
        if quantisers and not n.adapter.capabilities.quantised_bases:
            why = n.adapter.capabilities.because("quantised_bases") or ": leave one of them out"
            yield f"{n.name} cannot work on what {quantisers[0]} has packed{why}"
        if not n.adapter.capabilities.base_frozen and len(trainers) > 1:
            others = " and ".join(t.name for t in trainers if t is not n)
            yield f"{n.name} trains the base itself, so {others} beside it has no fixed base to stand on"
    if not trainers and not has_head:
        yield "nothing would be trained: add an adapter that trains something, such as lora"


def refuse_several(stack: Sequence[Named], present: Iterable[type[Adapter]] = ()) -> None:
    """Refuse a second instance of an adapter that declares that a model can have one."""
    kinds = Counter([*present, *(type(n.adapter) for n in stack)])
    for n in reversed(stack):
        if kinds[type(n.adapter)] > 1 and not n.adapter.capabilities.several:
            why = n.adapter.capabilities.because("several")
            raise StackError(f"{n.name} would be the second of its kind, and a model can have one{why}")
