"""What every metric asks of its input: something to score, and as many predictions as true values."""

from collections.abc import Sequence
from typing import Any

from onegpu.adapters import DataError

__all__ = ["References", "check_pairs", "reference_lists"]

References = Sequence[str | Sequence[str]]
"""What each prediction is compared with: one text, or several of which the best counts."""


def check_pairs(true: Sequence[Any], predicted: Sequence[Any], *, what: str) -> None:
    """Check that there is something to score, and that both sides have the same length.

    Raises:
        DataError: they do not; a score of nothing would be neither 0 nor 1.
    """
    if len(true) != len(predicted):
        raise DataError(f"{len(predicted)} predicted {what} cannot be scored against {len(true)} true ones")
    if not len(true):
        raise DataError(f"no {what} to score")


def reference_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    """The references of each prediction as a list; one of no references stays empty.

    Raises:
        DataError: no predictions, or not as many lists of references.
    """
    check_pairs(references, predictions, what="texts")
    return [[one] if isinstance(one, str) else list(one) for one in references]
