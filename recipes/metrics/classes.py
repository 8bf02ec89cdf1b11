"""Scores of classes, by scikit-learn: one class per example, or several.

A class that is never predicted, or never true, has a precision, recall or F1 of 0.0 where it would be 0/0.
"""

from collections import Counter
from collections.abc import Sequence, Set
from itertools import chain
from typing import Any

from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

from onegpu.adapters import DataError

from .pairs import check_pairs

__all__ = ["Chosen", "class_scores", "confusion", "score_names", "several_scores"]

SCORES = ("precision", "recall", "f1")

Chosen = Set[int] | Sequence[int]
"""The classes of one example: a set of their numbers, or one 0 or 1 per class."""


def class_scores(true: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, float]:
    """Scores where every example has one class.

    Macro averages are over the classes that occur, in `true` or in `predicted`, as scikit-learn's are; the others are
    listed, with 0.0.

    Args:
        true: the number of each example's class, from 0; its name is `labels[number]`.
        predicted: the same, as predicted.
        labels: names of the classes.

    Returns:
        accuracy, macro_f1, micro_f1, macro_precision, macro_recall (0 to 1), matthews (-1 to 1, 0.0 where undefined),
        and for each class precision.NAME, recall.NAME, f1.NAME.

    Raises:
        DataError: nothing to score, unequal lengths, a number without a name, two classes of one name.
    """
    _check_classes(true, predicted, labels)
    macro = _averaged(true, predicted, "macro")
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": macro["f1"],
        "micro_f1": _averaged(true, predicted, "micro")["f1"],
        "macro_precision": macro["precision"],
        "macro_recall": macro["recall"],
        "matthews": _matthews(true, predicted),
        **_by_class(true, predicted, labels),
    }


def score_names(labels: Sequence[str], *, several: bool) -> list[str]:
    """The names of `class_scores`, or of `several_scores`."""
    if several:
        averages = [f"{average}_{score}" for average in ("macro", "micro") for score in SCORES]
        return ["subset_accuracy", *averages, *(f"f1.{name}" for name in labels)]
    averages = ["macro_f1", "micro_f1", "macro_precision", "macro_recall"]
    return ["accuracy", *averages, "matthews", *(f"{score}.{name}" for name in labels for score in SCORES)]


def confusion(true: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each true class (outer name) was predicted as each class (inner name), zeros included.

    Raises:
        DataError: as `class_scores`.
    """
    _check_classes(true, predicted, labels)
    counts = Counter(zip(true, predicted, strict=True))
    names = list(enumerate(labels))
    return {name: {other: counts[row, column] for column, other in names} for row, name in names}


def several_scores(true: Sequence[Chosen], predicted: Sequence[Chosen], labels: Sequence[str]) -> dict[str, float]:
    """Scores where an example may have any number of classes, none included.

    Macro averages are over all classes, as scikit-learn's are here: one that never occurs counts as 0.0.

    Args:
        true: the classes of each example.
        predicted: the same, as predicted.
        labels: names of the classes.

    Returns:
        subset_accuracy (the share of examples with exactly the true classes), macro_f1, micro_f1, macro_precision,
        macro_recall, micro_precision, micro_recall, and f1.NAME for each class; all from 0 to 1.

    Raises:
        DataError: nothing to score, unequal lengths, fewer than two classes, two of one name, an example that names
            another class or has not one 0 or 1 per class.
    """
    check_pairs(true, predicted, what="examples")
    _check_names(labels)
    if len(labels) < 2:
        raise DataError("several classes per example need two classes to choose from; for yes or no, score two classes")
    true_rows = [_row(chosen, labels) for chosen in true]
    predicted_rows = [_row(chosen, labels) for chosen in predicted]
    macro, micro = (_averaged(true_rows, predicted_rows, average) for average in ("macro", "micro"))
    per_class = _by_class(true_rows, predicted_rows, labels)
    return {
        "subset_accuracy": float(accuracy_score(true_rows, predicted_rows)),
        **{f"macro_{name}": value for name, value in macro.items()},
        **{f"micro_{name}": value for name, value in micro.items()},
        **{name: value for name, value in per_class.items() if name.startswith("f1.")},
    }


def _matthews(true: Sequence[int], predicted: Sequence[int]) -> float:
    if len({*true, *predicted}) < 2:  # 0/0; scikit-learn's 0.0 comes with a warning
        return 0.0
    return float(matthews_corrcoef(true, predicted))


def _averaged(true: Any, predicted: Any, average: str) -> dict[str, float]:
    scores = precision_recall_fscore_support(true, predicted, average=average, zero_division=0.0)
    return {name: float(score) for name, score in zip(SCORES, scores[:3], strict=True)}


def _by_class(true: Any, predicted: Any, labels: Sequence[str]) -> dict[str, float]:
    numbers = range(len(labels))
    scores = precision_recall_fscore_support(true, predicted, labels=numbers, average=None, zero_division=0.0)
    columns = dict(zip(SCORES, scores[:3], strict=True))
    return {
        f"{score}.{name}": float(column[number])
        for number, name in enumerate(labels)
        for score, column in columns.items()
    }


def _check_classes(true: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> None:
    check_pairs(true, predicted, what="classes")
    _check_names(labels)
    unnamed = sorted(set(chain(true, predicted)) - set(range(len(labels))))
    if unnamed:
        raise DataError(f"class {unnamed[0]} has no name: there are {len(labels)}, counted from 0")


def _check_names(labels: Sequence[str]) -> None:
    twice = [name for name, count in Counter(labels).items() if count > 1]
    if twice:
        raise DataError(f"two classes are called {twice[0]!r}: their scores could not be told apart")


def _row(chosen: Chosen, labels: Sequence[str]) -> list[int]:
    """One 0 or 1 per class: scikit-learn knows no other form."""
    numbers = range(len(labels))
    if isinstance(chosen, Set):
        if chosen - set(numbers):
            raise DataError(f"classes {sorted(chosen)}: there are {len(labels)}, counted from 0")
        return [int(number in chosen) for number in numbers]
    if len(chosen) != len(labels) or not set(chosen) <= {0, 1}:
        raise DataError(f"classes {list(chosen)}: needed is a 0 or 1 for each of {len(labels)}")
    return [int(value) for value in chosen]
