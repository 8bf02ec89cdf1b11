from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from onegpu.adapters import DataError
from onegpu.recipes import Loaded, preflight
from onegpu.recipes.tasks import Reader, RowProblem
from onegpu.recipes.tasks.classification import Classification

TASK = Classification(data="rows.jsonl")
LABELS = ["money", "sports", "weather"]


@pytest.fixture
def words(class_base: Path) -> Reader:
    """What the tiny BERT reads texts with."""
    return Reader(AutoTokenizer.from_pretrained(class_base), 8, labels=LABELS)


@pytest.fixture
def model(class_base: Path) -> PreTrainedModel:
    """The tiny BERT with a head of three classes."""
    torch.manual_seed(0)
    loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(class_base, num_labels=3)
    return loaded


def test_the_classes_are_sorted_whatever_the_order_of_the_rows(texts: list[dict[str, Any]]) -> None:
    assert TASK.labels(texts) == TASK.labels(texts[::-1]) == LABELS


@pytest.mark.parametrize("rows", [[{"text": "a", "label": 1}] * 3, [{"text": "a", "label": "one"}]])
def test_one_class_is_nothing_to_learn(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="at least two classes, and every row says"):
        TASK.labels(rows)


def test_classes_may_be_numbers(words: Reader) -> None:
    rows = [{"text": "the cat", "label": number} for number in (2, 10, 2)]
    labels = TASK.labels(rows)
    assert labels == ["10", "2"]
    assert TASK.encode(0, rows[0], replace(words, labels=labels)).labels == [1]


def test_a_text_is_read_with_the_special_tokens_of_the_base(words: Reader) -> None:
    example = TASK.encode(3, {"text": "the cat", "label": "sports"}, words)
    assert words.tokenizer.decode(example.ids) == "[CLS] the cat [SEP]"
    assert (example.row, example.labels, example.supervised) == (3, [1], 1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "", "label": "money"}, "no text"),
        ({"text": "  ", "label": "money"}, "no text"),
        ({"text": None, "label": "money"}, "no text"),
        ({"text": 5, "label": "money"}, "no text"),
        ({"text": "the", "label": "art"}, "its class 'art' is not among the training rows'"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_problem_of_that_row(row: dict[str, Any], told: str, words: Reader) -> None:
    with pytest.raises(RowProblem, match=told):
        TASK.encode(0, row, words)


LONG = {"text": "the cat wins the ball in the rain again", "label": "sports"}


def test_a_long_text_is_cut_to_its_first_tokens(words: Reader) -> None:
    ids = TASK.encode(0, LONG, words).ids
    assert words.tokenizer.decode(ids) == "[CLS] the cat wins the ball in [SEP]"


def test_a_long_text_can_be_an_error(words: Reader) -> None:
    task = Classification(data="rows.jsonl", too_long="error")
    with pytest.raises(DataError, match="row 5 has 11 tokens and max_length is 8"):
        task.encode(5, LONG, words)


def test_a_long_text_can_be_dropped(words: Reader) -> None:
    with pytest.raises(RowProblem, match="11 tokens, above 8"):
        Classification(data="rows.jsonl", too_long="drop").encode(5, LONG, words)


def test_the_objective_is_the_summed_cross_entropy_and_ignores_padding(
    model: PreTrainedModel, texts: list[dict[str, Any]], words: Reader
) -> None:
    examples = [TASK.encode(n, row, words) for n, row in enumerate(texts)]
    assert len({len(example.ids) for example in examples}) > 2
    objective = TASK.objective(model, TASK.collate(examples, 0))
    alone = [F.cross_entropy(model(input_ids=torch.tensor([e.ids])).logits, torch.tensor(e.labels)) for e in examples]
    assert objective.weight == 10
    assert objective.total.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-6)


def test_scores_are_those_of_scikit_learn(model: PreTrainedModel, texts: list[dict[str, Any]], words: Reader) -> None:
    examples = [TASK.encode(n, row, words) for n, row in enumerate(texts)]
    batch = TASK.collate(examples, 0)
    counts = TASK.objective(model, batch).counts
    assert sum(counts.values()) == 10
    true = [example.labels[0] for example in examples]
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1).tolist()
    assert TASK.scores(counts) == {
        "accuracy": pytest.approx(accuracy_score(true, said)),
        "macro_f1": pytest.approx(f1_score(true, said, average="macro", zero_division=0.0)),
    }


def test_a_classifier_has_nothing_to_say(model: PreTrainedModel, words: Reader) -> None:
    assert TASK.demonstrate(model, words, LONG) is None


def test_the_head_of_the_base_has_one_output_for_each_class(class_recipe: Callable[..., Loaded]) -> None:
    model = preflight(class_recipe()).load_base()
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.get_submodule("classifier").out_features == 3
