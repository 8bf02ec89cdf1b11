"""Tokenised examples, kept on disk, mapped into memory; made anew as soon as anything they follow from has changed."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints, overload

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from ..tasks.contract import Example
from ..tokenizers import tokenizer_digest
from .kept import Facts, Kept, keep

__all__ = ["SUPERVISED", "Examples", "Unusable", "key_parts", "store_examples"]

KEEPING = 2  # raise it when the same key is to give another file
SIZE, SUPERVISED = "size", "supervised"  # columns beside the fields: what an example says of itself

Kind = TypeVar("Kind", bound=Example)

_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}


@dataclass(frozen=True)
class Unusable:
    """A row that gives no example, and why."""

    row: int
    reason: str


class Examples(Sequence[Kind], Generic[Kind]):
    """Examples by their place in the file, built as they are asked for, and what was counted while they were made."""

    def __init__(self, kind: type[Kind], kept: Kept) -> None:
        self.kind = kind
        self._kept = kept

    @property
    def rows(self) -> int:
        """How many rows they were made of: a long one may be several windows."""
        return len(np.unique(self.column("row")))

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return int(self._kept.facts["tokens"])

    @property
    def supervised(self) -> int:
        """Supervised tokens (or labels) of all examples."""
        return int(self._kept.facts["supervised"])

    @property
    def dropped(self) -> dict[str, list[int]]:
        """Why rows gave no example -> their numbers."""
        return {reason: list(numbers) for reason, numbers in self._kept.facts["dropped"].items()}

    @cached_property
    def lengths(self) -> np.ndarray:  # (examples,) int64
        """The size of each example, in tokens; the tokens themselves are not read."""
        return self.column(SIZE)

    def column(self, name: str) -> np.ndarray:  # (examples,)
        """One field of all examples, where that is a number: `row`, `cut`."""
        return np.concatenate([np.empty(0, np.int64), *(chunk.to_numpy() for chunk in self._kept.column(name))])

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, number: int) -> Kind: ...
    @overload
    def __getitem__(self, number: slice) -> list[Kind]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        return self._built(self._kept.row(number))

    def __iter__(self) -> Iterator[Kind]:
        return map(self._built, self._kept)

    def _built(self, fields: dict[str, Any]) -> Kind:
        del fields[SIZE], fields[SUPERVISED]
        return self.kind(**fields)


def key_parts(
    *,
    tokenizer: Any,
    task_name: str,
    task: BaseModel,
    masks: int,
    max_length: int,
    labels: Sequence[str] | None,
    rows: str,
    numbers: Sequence[int],
) -> dict[str, Any]:
    """All that the examples of a side follow from, as JSON.

    Args:
        tokenizer: of transformers.
        task: every one of its settings counts.
        masks: the version of the code that makes examples of this task.
        max_length: in tokens, as it was resolved.
        labels: names of the classes, in the order of the head's outputs.
        rows: fingerprint of the rows.
        numbers: which of them this side has.
    """
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "task": task_name,
        "settings": task.model_dump(mode="json"),
        "masks": masks,
        "max_length": max_length,
        "labels": None if labels is None else list(labels),
        "rows": rows,
        "numbers": hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers")},
    }


def store_examples(
    key: Mapping[str, Any], example_class: type[Kind], made: Iterable[Kind | Unusable]
) -> Examples[Kind]:
    """The examples kept under a key; `made` is asked for the first one only where they are not there, or damaged.

    Args:
        key: see `key_parts`; more may be added.
        example_class: a frozen dataclass; its fields are numbers, text, or lists of them.
        made: examples, and the rows that gave none.

    Raises:
        TypeError: a field of a type that cannot be kept.
    """
    schema = _schema(example_class)
    whole = {**key, "keeping": KEEPING, "fields": {field.name: str(field.type) for field in schema}}
    return Examples(example_class, keep("examples", whole, schema, _Making(made)))


def _schema(example_class: type[Example]) -> pa.Schema:
    hints = get_type_hints(example_class)
    fields = [field.name for field in dataclasses.fields(example_class)]
    types = {name: _arrow(hints[name], f"{example_class.__name__}.{name}") for name in fields}
    types |= {SIZE: pa.int64(), SUPERVISED: pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def _arrow(hint: Any, place: str) -> pa.DataType:
    if hint in _TYPES:
        return _TYPES[hint]
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        return pa.list_(pa.int32() if inner is int else _arrow(inner, place))  # tokens and labels fit; others overflow
    raise TypeError(f"{place}: {hint} cannot be kept; a field is int, float, bool, str, or a list of one of these")


class _Making:
    """One pass over what is made: what is kept, and what is counted on the way."""

    def __init__(self, made: Iterable[Example | Unusable]) -> None:
        self.made = made
        self.tokens = self.supervised = 0
        self.dropped: dict[str, list[int]] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        for one in self.made:
            if isinstance(one, Unusable):
                self.dropped.setdefault(one.reason, []).append(one.row)
                continue
            self.tokens += one.size
            self.supervised += one.supervised
            counted = {SIZE: one.size, SUPERVISED: one.supervised}
            yield {field.name: getattr(one, field.name) for field in dataclasses.fields(one)} | counted

    def facts(self) -> Facts:
        return {"tokens": self.tokens, "supervised": self.supervised, "dropped": self.dropped}
