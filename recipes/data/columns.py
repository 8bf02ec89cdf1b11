"""From a row as it is to a row as a task wants it: `columns: {prompt: "Translate: {en}", completion: de}`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from onegpu.adapters import RecipeError
from onegpu.adapters.errors import nearest

from ..tasks.contract import RowProblem

__all__ = ["ColumnMap", "column_map"]


@dataclass(frozen=True)
class Template:
    """A text with columns in braces; (literal, column) pairs, the column of a last literal is None."""

    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        """The columns it reads."""
        return [column for _, column in self.parts if column is not None]

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text, numbers written as Python writes them.

        Raises:
            RowProblem: a value that is neither text nor a number.
        """
        return "".join(
            literal + ("" if column is None else _written(column, row[column])) for literal, column in self.parts
        )


@dataclass(frozen=True)
class ColumnMap:
    """What each column of the task is made from: a column of the data, or a template over its columns."""

    needed: Mapping[str, str | Template]
    optional: Mapping[str, str | Template]
    declared: frozenset[str]  # columns of the data that the recipe or the task insists on

    def map_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The needed columns, and the optional ones that the row has.

        Raises:
            RowProblem: a needed column is not there or null, a template's column is neither text nor a number.
        """
        for column in (column for made_from in self.needed.values() for column in _columns(made_from)):
            if column not in row:
                raise RowProblem(f"no column {column!r}")
            if row[column] is None:
                raise RowProblem(f"column {column!r} is null")
        present = {
            name: made_from
            for name, made_from in self.optional.items()
            if all(row.get(column) is not None for column in _columns(made_from))
        }
        return {name: _value(made_from, row) for name, made_from in (*self.needed.items(), *present.items())}


def column_map(columns: Mapping[str, str], *, needs: Sequence[str], optional: Sequence[str] = ()) -> ColumnMap:
    """Check what a recipe says under `columns:`; what it does not name is called as the task calls it.

    Raises:
        RecipeError: a column that the task does not have, a template that is more than names in braces.
    """
    valid = (*needs, *optional)
    for name in columns:
        if name not in valid:
            raise RecipeError(f"columns: the task has no column {name!r}{nearest(name, valid)}")
    made_from = {name: _parsed(name, columns.get(name, name)) for name in valid}
    declared = {column for name in valid if name in needs or name in columns for column in _columns(made_from[name])}
    return ColumnMap(
        {name: made_from[name] for name in needs}, {name: made_from[name] for name in optional}, frozenset(declared)
    )


def _columns(made_from: str | Template) -> list[str]:
    return [made_from] if isinstance(made_from, str) else made_from.columns


def _value(made_from: str | Template, row: Mapping[str, Any]) -> Any:
    return row[made_from] if isinstance(made_from, str) else made_from.fill(row)


def _parsed(name: str, made_from: str) -> str | Template:
    if "{" not in made_from and "}" not in made_from:
        return made_from
    told = f"columns: {name}: template {made_from!r}"
    try:
        parts = list(Formatter().parse(made_from))
    except ValueError as cause:
        raise RecipeError(f"{told}: {cause}; a brace that is meant as one is written twice") from None
    for _, column, form, conversion in parts:
        if column is not None and (not column or form or conversion or set(column) & set(".[]")):
            raise RecipeError(f"{told}: only names of columns may stand in braces, as in {{{column or 'text'}}}")
    return Template(tuple((literal, column) for literal, column, _, _ in parts))


def _written(column: str, value: Any) -> str:
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise RowProblem(f"column {column!r} is neither text nor a number: it cannot stand in a template")
