import json
from typing import Any

import numpy
import pytest
from sklearn import metrics

from onegpu.adapters import DataError
from onegpu.recipes.metrics.classes import class_scores, confusion, several_scores

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ["red", "green", "blue", "never"]


def _three_classes(seed: int = 0) -> tuple[list[int], list[int]]:
    random = numpy.random.default_rng(seed)
    true = random.integers(0, 3, 60)
    return true.tolist(), numpy.where(random.random(60) < 0.6, true, random.integers(0, 3, 60)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_of_classes_are_those_of_scikit_learn(seed: int) -> None:
    true, predicted = _three_classes(seed)
    found = class_scores(true, predicted, NAMES)
    expected: dict[str, Any] = {
        "accuracy": metrics.accuracy_score(true, predicted),
        "macro_f1": metrics.f1_score(true, predicted, average="macro"),
        "micro_f1": metrics.f1_score(true, predicted, average="micro"),
        "macro_precision": metrics.precision_score(true, predicted, average="macro"),
        "macro_recall": metrics.recall_score(true, predicted, average="macro"),
        "matthews": metrics.matthews_corrcoef(true, predicted),
    }
    for name, score in (("precision", "precision_score"), ("recall", "recall_score"), ("f1", "f1_score")):
        values = getattr(metrics, score)(true, predicted, average=None)
        expected |= {f"{name}.{label}": value for label, value in zip(NAMES, values, strict=False)}
        expected[f"{name}.never"] = 0.0
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_scores_computed_by_hand() -> None:
    found = class_scores([0, 0, 0, 1], [0, 0, 1, 1], ["a", "b"])
    assert found == pytest.approx(
        {
            "accuracy": 3 / 4,
            "micro_f1": 3 / 4,
            "macro_precision": (1 + 1 / 2) / 2,
            "macro_recall": (2 / 3 + 1) / 2,
            "macro_f1": (4 / 5 + 2 / 3) / 2,
            "matthews": (2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5,
            "precision.a": 1,
            "recall.a": 2 / 3,
            "f1.a": 4 / 5,
            "precision.b": 1 / 2,
            "recall.b": 1,
            "f1.b": 2 / 3,
        }
    )


def test_macro_averages_are_over_the_classes_that_occur() -> None:
    found = class_scores([0, 0, 1], [0, 0, 2], NAMES)  # 1 is never predicted, 2 never true, 3 neither
    assert found["macro_f1"] == pytest.approx(1 / 3)
    assert found["precision.green"] == found["recall.blue"] == found["f1.never"] == 0.0


@pytest.mark.parametrize(("labels", "matthews"), [(["a"], 0.0), (["a", "b"], 0.0)])
def test_one_class_only_is_scored_quietly(labels: list[str], matthews: float) -> None:
    found = class_scores([0, 0], [0, 0], labels)
    assert (found["accuracy"], found["macro_f1"], found["matthews"]) == (1.0, 1.0, matthews)
    assert confusion([0, 0], [0, 0], labels)["a"]["a"] == 2


def test_as_many_classes_as_examples_are_scored_quietly() -> None:
    numbers = list(range(40))  # scikit-learn wonders about regression from 21 examples on
    assert class_scores(numbers, numbers, list(map(str, numbers)))["macro_f1"] == 1.0


def test_the_confusion_has_a_row_for_every_class() -> None:
    true, predicted = _three_classes()
    found = confusion(true, predicted, NAMES)
    expected = metrics.confusion_matrix(true, predicted, labels=range(4)).tolist()
    assert [list(row.values()) for row in found.values()] == expected
    assert list(found) == NAMES
    assert all(list(row) == NAMES for row in found.values())
    assert json.loads(json.dumps(found)) == found


def test_the_confusion_reads_true_before_predicted() -> None:
    assert confusion([0, 0], [1, 1], ["a", "b"]) == {"a": {"a": 0, "b": 2}, "b": {"a": 0, "b": 0}}


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_of_several_classes_are_those_of_scikit_learn(seed: int) -> None:
    random = numpy.random.default_rng(seed)
    true = random.integers(0, 2, (50, 4))
    predicted = numpy.where(random.random((50, 4)) < 0.7, true, 1 - true)
    true[:, 3] = predicted[:, 3] = 0
    found = several_scores(true.tolist(), predicted.tolist(), NAMES)
    quiet: dict[str, Any] = {"zero_division": 0.0}
    expected = {"subset_accuracy": metrics.accuracy_score(true, predicted)}
    for average in ("macro", "micro"):
        expected[f"{average}_f1"] = metrics.f1_score(true, predicted, average=average, **quiet)
        expected[f"{average}_precision"] = metrics.precision_score(true, predicted, average=average, **quiet)
        expected[f"{average}_recall"] = metrics.recall_score(true, predicted, average=average, **quiet)
    values = metrics.f1_score(true, predicted, average=None, **quiet)
    expected |= {f"f1.{name}": value for name, value in zip(NAMES, values, strict=True)}
    assert found == pytest.approx(expected, rel=1e-12)


def test_several_classes_computed_by_hand() -> None:
    # a: right twice; b: found once, missed once; c: claimed once, wrongly. Only the first example is right as a whole.
    found = several_scores([{0, 1}, {0, 1}, set()], [{0, 1}, {0}, {2}], ["a", "b", "c"])
    assert found == pytest.approx(
        {
            "subset_accuracy": 1 / 3,
            "micro_precision": 3 / 4,
            "micro_recall": 3 / 4,
            "micro_f1": 3 / 4,
            "macro_precision": 2 / 3,
            "macro_recall": (1 + 1 / 2) / 3,
            "macro_f1": (1 + 2 / 3) / 3,
            "f1.a": 1,
            "f1.b": 2 / 3,
            "f1.c": 0,
        }
    )


def test_a_set_of_classes_and_a_row_of_ones_say_the_same() -> None:
    sets, rows = [{0, 2}, frozenset[int](), {1}], [[1, 0, 1], [0, 0, 0], (False, True, False)]
    true = [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert several_scores(true, sets, NAMES[:3]) == several_scores(true, rows, NAMES[:3])


def test_no_class_anywhere_is_scored_quietly() -> None:
    found = several_scores([set(), set()], [[0, 0], [0, 0]], ["a", "b"])
    assert found.pop("subset_accuracy") == 1.0
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("true", "predicted", "labels", "told"),
    [
        ([], [], NAMES, "no classes to score"),
        ([0], [0, 1], NAMES, "2 predicted classes"),
        ([0], [4], NAMES, "class 4 has no name: there are 4"),
        ([-1], [0], NAMES, "class -1 has no name"),
        ([0], [0], ["a", "b", "a"], "two classes are called 'a'"),
    ],
)
@pytest.mark.parametrize("function", [class_scores, confusion])
def test_classes_that_cannot_be_scored(
    function: Any, true: list[int], predicted: list[int], labels: list[str], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        function(true, predicted, labels)


@pytest.mark.parametrize(
    ("true", "predicted", "labels", "told"),
    [
        ([], [], NAMES, "no examples to score"),
        ([{0}], [], NAMES, "0 predicted examples"),
        ([{0}], [{4}], NAMES, r"classes \[4\]: there are 4"),
        ([[1, 0]], [{0}], NAMES, r"classes \[1, 0\]: needed is a 0 or 1 for each of 4"),
        ([[2, 0]], [{0}], ["a", "b"], r"classes \[2, 0\]: needed is a 0 or 1"),
        ([{0}], [{0}], ["a"], "two classes to choose from"),
        ([{0}], [{0}], ["a", "a"], "two classes are called 'a'"),
    ],
)
def test_several_classes_that_cannot_be_scored(true: Any, predicted: Any, labels: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        several_scores(true, predicted, labels)
