import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from tokenizers import pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from onegpu.adapters import DataError, RecipeError, load_base
from onegpu.recipes.tasks import Batch, Example, Reader, RowProblem
from onegpu.recipes.tasks.classification import Classification, ClassificationExample

Row = dict[str, Any]

LABELS = ["money", "sports", "weather"]
WORDS = ["the", "cat", "wins", "a", "ball", "in", "the", "rain", "again"]
PAD = 0
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def _task(**settings: Any) -> Classification:
    return Classification(data="rows.jsonl", **settings)


TASK, SEVERAL, NUMBER = _task(), _task(predict="classes"), _task(predict="number")


@pytest.fixture
def words(class_base: Path) -> Reader:
    """What the tiny BERT reads texts with."""
    return Reader(AutoTokenizer.from_pretrained(class_base), 8, labels=LABELS)


@pytest.fixture
def paired(class_base: Path) -> Reader:
    """The same for pairs of texts, as BERT's own tokenizer has them: the second text is of type 1."""
    tokenizer = AutoTokenizer.from_pretrained(class_base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return Reader(tokenizer, 12, labels=LABELS)


def _bert(class_base: Path, outputs: int = 3, problem: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(class_base, num_labels=outputs, problem_type=problem)


@pytest.fixture
def model(class_base: Path) -> PreTrainedModel:
    """The tiny BERT with a head of three classes."""
    return _bert(class_base)


def _llama(outputs: int, problem: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"pad_token_id": PAD, "num_labels": outputs, "problem_type": problem})
    model: PreTrainedModel = LlamaForSequenceClassification(config).eval()
    return model


def _examples(task: Classification, rows: Sequence[Row], reader: Reader) -> list[Example]:
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


def _one(task: Classification, row: Row, reader: Reader) -> ClassificationExample:
    (example,) = task.encode(0, row, reader)
    return example


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert sum(grad.abs().max() > 1e-6 for grad in found.values()) > 10
    return found


def _assert_equal_loss(model: nn.Module, task: Classification, examples: list[Example], expected: Tensor) -> None:
    """The task's loss and every gradient are those of `expected`."""
    objective = task.objective(model, task.collate(examples, PAD))
    loss = objective.total / objective.weight
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    reference = _gradients(model, expected)
    for name, gradient in _gradients(model, loss).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_classes_are_sorted_whatever_the_order_of_the_rows(texts: list[Row]) -> None:
    assert TASK.labels(iter(texts)) == TASK.labels(texts[::-1]) == LABELS


@pytest.mark.parametrize(
    ("task", "rows", "told"),
    [
        (TASK, [{"text": "a", "label": 1}] * 3, "at least two classes, and every row says '1'"),
        (TASK, [{"text": "a", "label": "one"}], "at least two classes, and every row says 'one'"),
        (TASK, [{"text": "a", "label": ["one", "two"]}], "predict: classes"),
        (SEVERAL, [{"text": "a", "label": "one"}] * 2, "predict: class`"),
        (SEVERAL, [{"text": "a", "label": ["one"]}, {"text": "a", "label": []}], "every row says 'one'"),
    ],
)
def test_one_class_is_nothing_to_learn(task: Classification, rows: list[Row], told: str) -> None:
    with pytest.raises(DataError, match=told):
        task.labels(rows)


@pytest.mark.parametrize(
    ("values", "expected"), [((2, 10, 2), ["10", "2"]), ((True, False), ["False", "True"]), ((0.5, 1), ["0.5", "1"])]
)
def test_classes_may_be_numbers_or_truth_values(values: Sequence[Any], expected: list[str], words: Reader) -> None:
    rows = [{"text": "the cat", "label": value} for value in values]
    labels = TASK.labels(rows)
    assert labels == expected
    reader = replace(words, labels=labels)
    assert [_one(TASK, row, reader).labels for row in rows] == [[expected.index(str(value))] for value in values]


def test_a_text_is_read_with_the_special_tokens_of_the_base(words: Reader) -> None:
    (example,) = TASK.encode(3, {"text": "the cat", "label": "sports"}, words)
    assert words.tokenizer.decode(example.ids) == "[CLS] the cat [SEP]"
    assert (example.row, example.labels, example.supervised, example.types, example.cut) == (3, [1], 1, [], 0)


def test_several_classes_are_marked_each(words: Reader) -> None:
    rows: list[Row] = [{"text": "the", "label": label} for label in (["weather", "money"], [], ["sports", "sports"])]
    assert SEVERAL.labels(rows) == LABELS
    examples = _examples(SEVERAL, rows, words)
    assert [example.labels for example in examples] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert {example.supervised for example in examples} == {3}


def test_a_number_may_be_written_as_text_and_the_head_has_one_output(words: Reader) -> None:
    rows = [{"text": "the", "label": label} for label in (3, -0.5, "1e2")]
    labels = NUMBER.labels(rows)
    assert labels == ["number"]
    assert [_one(NUMBER, row, replace(words, labels=labels)).number for row in rows] == [3, -0.5, 100]


def test_types_of_tokens_tell_the_texts_of_a_pair(paired: Reader) -> None:
    example = _one(TASK, {"text": "the cat", "pair": "a dog wins", "label": "money"}, paired)
    assert paired.tokenizer.decode(example.ids) == "[CLS] the cat [SEP] a dog wins [SEP]"
    assert example.types == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        (TASK, {"text": "", "label": "money"}, "no text"),
        (TASK, {"text": "  ", "label": "money"}, "no text"),
        (TASK, {"text": None, "label": "money"}, "no text"),
        (TASK, {"text": 5, "label": "money"}, "no text"),
        (TASK, {"text": "the", "pair": " ", "label": "money"}, "no second text"),
        (TASK, {"text": "the", "pair": None, "label": "money"}, "no second text"),
        (TASK, {"text": "the", "label": "art"}, "its class 'art' is not among the training rows'"),
        (TASK, {"text": "the", "label": None}, "no label"),
        (TASK, {"text": "the", "label": ""}, "no label"),
        (TASK, {"text": "the", "label": math.nan}, "no label"),
        (TASK, {"text": "the", "label": {"a": 1}}, "no label"),
        (TASK, {"text": "the", "label": ["money"]}, "set `predict: classes`"),
        (SEVERAL, {"text": "the", "label": "money"}, "set `predict: class`"),
        (SEVERAL, {"text": "the", "label": ["money", None]}, "no class"),
        (SEVERAL, {"text": "the", "label": ["art"]}, "its class 'art' is not among"),
        (NUMBER, {"text": "the", "label": "many"}, "no number"),
        (NUMBER, {"text": "the", "label": None}, "no number"),
        (NUMBER, {"text": "the", "label": True}, "no number"),
        (NUMBER, {"text": "the", "label": math.inf}, "not finite"),
        (NUMBER, {"text": "the", "label": math.nan}, "not finite"),
        (NUMBER, {"text": "the", "label": 10**400}, "no number"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_problem_of_that_row(
    task: Classification, row: Row, told: str, words: Reader
) -> None:
    with pytest.raises(RowProblem, match=told):
        task.encode(0, row, words)


def test_a_text_without_tokens_is_a_problem_of_its_row(words: Reader) -> None:
    # As it is to BERT, a character without width is nothing.
    words.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    with pytest.raises(RowProblem, match="the tokenizer makes nothing"):
        TASK.encode(0, {"text": "\u200b", "label": "money"}, words)


# --- long texts -------------------------------------------------------------------------------------------------------

LONG = {"text": "the cat wins the ball in the rain again", "label": "sports"}


def test_a_long_text_is_an_error_unless_the_recipe_says_what_to_do(words: Reader) -> None:
    with pytest.raises(DataError, match=r"11 tokens, and max_length is 8.*\(drop, cut-left, cut-right\)"):
        TASK.encode(5, LONG, words)


def test_a_long_text_can_be_dropped(words: Reader) -> None:
    with pytest.raises(RowProblem, match="too long: above 8 tokens"):
        _task(too_long="drop").encode(5, LONG, words)


@pytest.mark.parametrize(
    ("side", "left"),
    [("cut-right", "[CLS] the cat wins the ball in [SEP]"), ("cut-left", "[CLS] the ball in the rain again [SEP]")],
)
def test_what_is_cut_is_counted_and_special_tokens_stay(side: Any, left: str, words: Reader) -> None:
    example = _one(_task(too_long=side), LONG, words)
    assert words.tokenizer.decode(example.ids) == left
    assert example.cut == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", range(5, 12))
@pytest.mark.parametrize("lengths", [(1, 9), (9, 1), (4, 4), (5, 4), (4, 5), (3, 8), (8, 3)])
def test_a_pair_is_cut_as_the_tokenizer_itself_would(
    lengths: tuple[int, int], limit: int, side: str, paired: Reader
) -> None:
    text, pair = (WORDS[:length] for length in lengths)
    row = {"text": " ".join(text), "pair": " ".join(pair), "label": "money"}
    before = paired.tokenizer.backend_tokenizer.to_str()
    example = _one(_task(too_long=f"cut-{side}"), row, replace(paired, limit=limit))
    assert paired.tokenizer.backend_tokenizer.to_str() == before  # it is fingerprinted, and shared
    paired.tokenizer.truncation_side = side
    expected = paired.tokenizer(row["text"], row["pair"], truncation="longest_first", max_length=limit)
    assert example.ids == expected["input_ids"]
    assert example.types == expected["token_type_ids"]
    assert example.cut == max(0, sum(lengths) + 3 - limit)


@pytest.mark.parametrize(("row", "limit"), [(LONG, 2), (LONG | {"pair": "the cat"}, 4)])
def test_a_limit_that_has_no_room_for_text_is_refused(row: Row, limit: int, paired: Reader) -> None:
    with pytest.raises(RecipeError, match="leave no room for a text"):
        _task(too_long="cut-right").encode(0, row, replace(paired, limit=limit))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["classes", "number"])
@pytest.mark.parametrize("setting", [{"label_smoothing": 0.1}, {"class_weight": "balanced"}])
def test_a_setting_that_would_be_ignored_is_refused(predict: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"`{next(iter(setting))}` is for `predict: class`"):
        _task(predict=predict, **setting)


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
def test_a_weight_is_positive(weight: float) -> None:
    with pytest.raises(ValidationError):
        _task(class_weight={"money": weight})


def test_balanced_weights_are_those_of_scikit_learn(texts: list[Row]) -> None:
    rows = [*texts, *texts[:1], {"text": "a", "label": None}]
    labels = [row["label"] for row in rows[:-1]]
    expected = compute_class_weight("balanced", classes=numpy.array(LABELS), y=labels)
    assert _task(class_weight="balanced").class_weights(iter(rows), LABELS) == pytest.approx(expected.tolist())
    assert len(set(expected)) > 1


def test_weights_may_be_given_for_some_classes(texts: list[Row]) -> None:
    assert _task(class_weight={"sports": 3}).class_weights(texts, LABELS) == [1.0, 3.0, 1.0]
    assert TASK.class_weights(texts, LABELS) is None


def test_a_weight_for_no_class_is_an_error(texts: list[Row]) -> None:
    with pytest.raises(RecipeError, match="no row is of class 'sport'; did you mean 'sports'"):
        _task(class_weight={"sport": 3}).class_weights(texts, LABELS)


def test_a_class_without_rows_cannot_be_balanced(texts: list[Row]) -> None:
    with pytest.raises(DataError, match="no row to train on is of class 'art'"):
        _task(class_weight="balanced").class_weights(texts, ["art", *LABELS])


def test_a_split_keeps_classes_in_proportion(texts: list[Row]) -> None:
    assert [TASK.stratum(row) for row in texts] == [row["label"] for row in texts]
    assert TASK.stratum({"text": "a", "label": None}) is None
    assert NUMBER.stratum({"text": "a", "label": 1.5}) is None


# --- losses -----------------------------------------------------------------------------------------------------------


def _rows(predict: str, texts: list[Row]) -> list[Row]:
    labels: dict[str, list[Any]] = {
        "class": [row["label"] for row in texts],
        "classes": [LABELS[: i % 4][-2:] for i in range(len(texts))],
        "number": [i / 3 - 1 for i in range(len(texts))],
    }
    return [row | {"label": label} for row, label in zip(texts, labels[predict], strict=True)]


TARGETS: dict[str, tuple[str, Callable[[Batch], Tensor]]] = {
    "class": ("single_label_classification", lambda batch: batch["labels"][:, 0]),
    "classes": ("multi_label_classification", lambda batch: batch["labels"].float()),
    "number": ("regression", lambda batch: batch["numbers"]),
}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("predict", TARGETS)
def test_losses_and_gradients_are_those_of_transformers_heads(
    predict: Any, family: str, class_base: Path, texts: list[Row], words: Reader
) -> None:
    problem, targets = TARGETS[predict]
    task, outputs = _task(predict=predict), 1 if predict == "number" else 3
    model = _bert(class_base, outputs, problem) if family == "bert" else _llama(outputs, problem)
    examples = _examples(task, _rows(predict, texts), words)
    batch = task.collate(examples, PAD)
    assert (batch["attention_mask"] == 0).any()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=targets(batch))
    _assert_equal_loss(model, task, examples, out.loss)


def test_a_pair_is_read_by_the_model_with_its_types(class_base: Path, texts: list[Row], paired: Reader) -> None:
    model = _bert(class_base)
    rows = [row | {"pair": other["text"]} for row, other in zip(texts, texts[3:], strict=False)]
    examples = _examples(_task(too_long="cut-right"), rows, paired)
    encoded = paired.tokenizer(
        [row["text"] for row in rows],
        [row["pair"] for row in rows],
        truncation="longest_first",
        max_length=paired.limit,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    _assert_equal_loss(model, TASK, examples, model(**encoded, labels=labels).loss)
    without = model(encoded["input_ids"], encoded["attention_mask"], labels=labels).loss
    assert model(**encoded, labels=labels).loss.item() != pytest.approx(without.item(), rel=1e-3)


def test_a_model_without_types_is_given_none(texts: list[Row], paired: Reader) -> None:
    model = BertForSequenceClassification(BertConfig(**SIZES | {"type_vocab_size": 1, "num_labels": 3})).eval()
    examples = _examples(TASK, [row | {"pair": "the dog"} for row in texts], paired)
    batch = TASK.collate(examples, PAD)
    assert "token_type_ids" in batch
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"][:, 0])
    _assert_equal_loss(model, TASK, examples, expected.loss)


def test_a_decoder_reads_the_class_off_the_last_token_whatever_pads(texts: list[Row], words: Reader) -> None:
    model, examples = _llama(3), _examples(TASK, texts, words)
    whole = TASK.objective(model, TASK.collate(examples, pad=17))  # another padding than the model's own, 0
    alone = [TASK.objective(model, TASK.collate([example], pad=17)).total.item() for example in examples]
    assert whole.total.item() == pytest.approx(sum(alone), rel=1e-6)


def test_weighted_and_smoothed_losses_are_those_of_torch(
    model: PreTrainedModel, texts: list[Row], words: Reader
) -> None:
    weights = [0.5, 1.0, 4.0]
    for task in (_task(class_weight="balanced"), _task(label_smoothing=0.2)):
        weighted = task.class_weight is not None
        examples = _examples(task, texts, replace(words, class_weights=weights if weighted else None))
        batch = task.collate(examples, PAD)
        expected = F.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"][:, 0],
            weight=torch.tensor(weights) if weighted else None,
            label_smoothing=task.label_smoothing,
        )
        _assert_equal_loss(model, task, examples, expected)


def test_with_both_a_smoothed_loss_counts_as_much_as_its_class(
    model: PreTrainedModel, texts: list[Row], words: Reader
) -> None:
    task, weights = _task(class_weight="balanced", label_smoothing=0.2), [0.5, 1.0, 4.0]
    found = [
        task.objective(model, task.collate([example], PAD))
        for example in _examples(task, texts, replace(words, class_weights=weights))
    ]
    plain = [
        _task(label_smoothing=0.2).objective(model, task.collate([example], PAD)).total.item()
        for example in _examples(task, texts, words)
    ]
    counted = [weights[LABELS.index(row["label"])] for row in texts]
    assert [objective.weight for objective in found] == counted
    assert [o.total.item() for o in found] == pytest.approx([w * p for w, p in zip(counted, plain, strict=True)])


@pytest.mark.parametrize(
    "task", [TASK, _task(class_weight="balanced", label_smoothing=0.1), SEVERAL, NUMBER], ids=lambda t: str(t.predict)
)
def test_a_split_into_batches_changes_neither_the_loss_nor_the_scores(
    task: Classification, class_base: Path, texts: list[Row], words: Reader
) -> None:
    model = _bert(class_base, 1 if task is NUMBER else 3).eval()
    reader = replace(words, class_weights=[0.3, 1.0, 4.0] if task.class_weight else None)
    examples = _examples(task, _rows(task.predict, texts), reader)
    found = []
    for size in (1, 2, 7, 10):
        chunks = [examples[i : i + size] for i in range(0, 10, size)]
        objectives = [task.objective(model, task.collate(chunk, PAD)) for chunk in chunks]
        outcomes = [outcome for objective in objectives for outcome in objective.outcomes()]
        totals = sum(o.total.item() for o in objectives), sum(o.weight for o in objectives)
        found.append((*totals, *task.scores(outcomes, (), reader).values()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn(model: PreTrainedModel, texts: list[Row], words: Reader) -> None:
    batch = TASK.collate(_examples(TASK, texts, words), PAD)
    outcomes = TASK.objective(model, batch).outcomes()
    true = [LABELS.index(row["label"]) for row in texts]
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1).tolist()
    assert outcomes == list(zip(true, said, strict=True))
    scores = TASK.scores(outcomes, (), words)
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, said))
    assert scores["macro_f1"] == pytest.approx(f1_score(true, said, average="macro", zero_division=0.0))
    counts = TASK.details(outcomes, (), words)["confusion"]
    assert counts["money"]["sports"] == sum(pair == (0, 1) for pair in outcomes)
    assert sum(count for row in counts.values() for count in row.values()) == 10


def test_several_classes_are_predicted_where_they_are_likelier_than_not(
    model: PreTrainedModel, texts: list[Row], words: Reader
) -> None:
    rows = _rows("classes", texts)
    batch = SEVERAL.collate(_examples(SEVERAL, rows, words), PAD)
    outcomes = SEVERAL.objective(model, batch).outcomes()
    chances = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.sigmoid()
    assert [[LABELS[i] for i in true] for true, _ in outcomes] == [row["label"] for row in rows]
    assert [said for _, said in outcomes] == [[i for i, p in enumerate(row) if p > 0.5] for row in chances.tolist()]
    true, said = ([[int(i in chosen) for i in range(3)] for chosen in side] for side in zip(*outcomes, strict=True))
    scores = SEVERAL.scores(outcomes, (), words)
    assert scores["micro_f1"] == pytest.approx(f1_score(true, said, average="micro"))
    assert SEVERAL.details(outcomes, (), words) == {}


def test_numbers_are_scored_by_how_near_they_are(words: Reader) -> None:
    scores = NUMBER.scores([(1.0, 2.0), (2.0, 2.5), (3.0, 4.0)], (), words)
    assert scores["mean_absolute_error"] == pytest.approx(2.5 / 3)
    assert scores["spearman"] == 1.0


@pytest.mark.parametrize("task", [TASK, SEVERAL, NUMBER], ids=lambda task: str(task.predict))
def test_the_scores_to_look_at_exist(task: Classification, class_base: Path, texts: list[Row], words: Reader) -> None:
    examples = _examples(task, _rows(task.predict, texts), words)
    objective = task.objective(_bert(class_base, 1 if task is NUMBER else 3), task.collate(examples, PAD))
    labels = ["number"] if task is NUMBER else words.labels
    found = task.directions(labels)
    assert task.measures().keys() < found.keys()
    assert found.keys() == {"loss", *task.scores(objective.outcomes(), (), words)}
    assert {name for name, way in found.items() if way == "lower"} <= {
        "loss",
        "mean_absolute_error",
        "mean_squared_error",
    }


def test_a_classifier_has_nothing_to_say(model: PreTrainedModel, words: Reader) -> None:
    assert TASK.demonstrate(model, words, LONG) is None


@pytest.mark.parametrize(("labels", "outputs"), [(LABELS, 3), (["number"], 1)])
def test_the_head_of_the_base_has_one_output_for_each_label(class_base: Path, labels: list[str], outputs: int) -> None:
    model = load_base(str(class_base), kind=TASK.model_kind(), labels=labels)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.get_submodule("classifier").out_features == outputs
