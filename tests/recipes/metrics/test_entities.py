import numpy
import pytest
from seqeval import metrics

from onegpu.adapters import DataError
from onegpu.recipes.metrics.entities import as_bio, entity_scores, is_bio

pytestmark = pytest.mark.filterwarnings("error")

TAGS = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC-EVENT", "I-MISC-EVENT"]


def _sentences(random: numpy.random.Generator) -> list[list[str]]:
    return [random.choice(TAGS, length).tolist() for length in (1, 4, 9, 0, 12, 30, 7)]


@pytest.mark.parametrize("seed", range(4))
def test_the_scores_are_those_of_seqeval(seed: int) -> None:
    random = numpy.random.default_rng(seed)
    true = _sentences(random)
    predicted = [
        [tag if random.random() < 0.8 else other for tag, other in zip(*pair, strict=True)]
        for pair in zip(true, _sentences(random), strict=True)
    ]
    found = entity_scores(true, predicted)
    by_type = dict(zip(("LOC", "MISC-EVENT", "PER"), metrics.f1_score(true, predicted, average=None), strict=True))
    expected = {
        "precision": metrics.precision_score(true, predicted),
        "recall": metrics.recall_score(true, predicted),
        "f1": metrics.f1_score(true, predicted),
        "macro_f1": metrics.f1_score(true, predicted, average="macro"),
        "accuracy": metrics.accuracy_score(true, predicted),
        **{f"f1.{name}": value for name, value in by_type.items()},
    }
    assert 0 < expected["f1"] < 1
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_scores_computed_by_hand() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["O", "O"]]  # one right, one of the wrong type, one missed
    assert entity_scores(true, predicted) == pytest.approx(
        {
            "precision": 1 / 2,
            "recall": 1 / 3,
            "f1": 2 / 5,
            "macro_f1": 1 / 4,
            "accuracy": 4 / 6,
            "f1.LOC": 0,
            "f1.PER": 1 / 2,
        }
    )


def test_half_an_entity_is_not_found() -> None:
    found = entity_scores([("B-X", "I-X", "I-X")], [("B-X", "I-X", "O")])
    assert found["f1"] == 0.0
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_an_entity_ends_with_its_sentence() -> None:
    assert entity_scores([["B-X"], ["I-X"]], [["B-X"], ["B-X"]])["f1"] == 1.0


@pytest.mark.parametrize("sentence", [["O", "O"], ["O"]])
def test_no_entities_at_all_are_scored_quietly(sentence: list[str]) -> None:
    names = ("precision", "recall", "f1", "macro_f1")
    assert entity_scores([sentence], [sentence]) == {**dict.fromkeys(names, 0.0), "accuracy": 1.0}


@pytest.mark.parametrize(("true", "predicted"), [(["O", "O"], ["B-X", "O"]), (["B-X", "O"], ["O", "O"])])
def test_entities_on_one_side_only_are_scored_quietly(true: list[str], predicted: list[str]) -> None:
    found = entity_scores([true], [predicted])
    assert (found["f1"], found["macro_f1"], found["f1.X"], found["accuracy"]) == (0.0, 0.0, 0.0, 0.5)


def test_schemes_with_ends_and_singles_are_understood() -> None:
    assert entity_scores([["B-地名", "E-地名", "S-人名"]], [["B-地名", "I-地名", "B-人名"]])["f1"] == 1.0


@pytest.mark.parametrize(
    ("tags", "bio"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["S-LOC", "B-PER", "E-PER"], True),
        (["O", "PER"], False),
        (["O", "B-"], False),
        (["O", "B"], False),
        (["o"], False),
        (["O-PER"], False),
        (["O"], True),
    ],
)
def test_a_scheme_is_known_by_all_its_tags(tags: list[str], bio: bool) -> None:
    assert is_bio(tags) is bio


@pytest.mark.parametrize(
    ("plain", "bio"),
    [
        (["PER", "PER", "O", "LOC"], ["B-PER", "I-PER", "O", "B-LOC"]),
        (["PER", "LOC", "LOC", "LOC"], ["B-PER", "B-LOC", "I-LOC", "I-LOC"]),
        (["O", "O"], ["O", "O"]),
        ([], []),
    ],
)
def test_runs_of_plain_tags_become_entities(plain: list[str], bio: list[str]) -> None:
    assert as_bio(plain) == bio
    assert is_bio(as_bio(plain))


@pytest.mark.parametrize(
    ("true", "predicted", "told"),
    [
        ([], [], "no sentences to score"),
        ([[]], [[]], "no tags to score"),
        ([["O"]], [["O"], ["O"]], "2 predicted sentences"),
        ([["O"], ["O"]], [["O"], []], "sentence 1: 0 predicted tags, 1 true ones"),
        ([["O"]], [["PER"]], "sentence 0: 'PER' is neither 'O' nor"),
    ],
)
def test_what_cannot_be_scored_is_told(true: list[list[str]], predicted: list[list[str]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        entity_scores(true, predicted)
