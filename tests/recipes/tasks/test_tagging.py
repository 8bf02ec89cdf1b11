from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seqeval.metrics import f1_score
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes.tasks import Example, Reader, RowProblem
from onegpu.recipes.tasks.tagging import NOWHERE, Tagging, TaggingExample

Row = dict[str, Any]

IGNORED = -100
LABELS = ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = ["ada", "love", "##lace", "saw", "new", "york", "##shire", "and", "rome", "他", "在", "北", "京"]


def _task(**settings: Any) -> Tagging:
    return Tagging(data="rows.jsonl", **settings)


TASK, ALL = _task(), _task(supervise="all")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words and pieces of words as BERT has them."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *VOCABULARY])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def reader(tokenizer: PreTrainedTokenizerFast) -> Reader:
    """What the tiny models read rows with."""
    return Reader(tokenizer, 16, labels=LABELS)


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "num_labels": len(LABELS),
}


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny BERT with a head of five tags and without dropout."""
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


@pytest.fixture
def decoder() -> PreTrainedModel:
    """A tiny Llama with a head of five tags."""
    torch.manual_seed(0)
    model: PreTrainedModel = LlamaForTokenClassification(LlamaConfig(**SIZES)).eval()
    return model


def _row(*pairs: tuple[str, str]) -> Row:
    return {"tokens": [word for word, _ in pairs], "tags": [tag for _, tag in pairs]}


ADA = _row(("Ada", "B-PER"), ("Lovelace", "I-PER"), ("saw", "O"), ("Yorkshire", "B-LOC"))
LONG = _row(*[("ada", "B-PER"), ("lovelace", "I-PER"), ("and", "O"), ("new", "B-LOC"), ("yorkshire", "I-LOC")] * 6)
ROWS = [
    ADA,
    _row(("Rome", "B-LOC")),
    LONG,
    _row(("new", "B-LOC"), ("York", "I-LOC"), ("and", "O"), ("\u200b", "B-PER"), ("Rome", "B-LOC")),
    _row(("he", "O"), ("saw", "O")),
    _row(*zip("他在北京", ["B-PER", "O", "B-LOC", "I-LOC"], strict=True)),
    _row(("Lovelace", "B-PER"), ("saw", "O"), ("Ada", "B-PER")),
]


def _examples(task: Tagging, rows: Sequence[Row], reader: Reader) -> list[TaggingExample]:
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


def _one(task: Tagging, row: Row, reader: Reader) -> TaggingExample:
    (example,) = task.encode(0, row, reader)
    return example


# --- rows -------------------------------------------------------------------------------------------------------------


def test_tags_are_sorted_behind_the_one_for_nothing() -> None:
    broken = {"tokens": ["a"], "tags": ["X", "Y"]}
    assert TASK.labels(iter([*ROWS, broken])) == TASK.labels(ROWS[::-1]) == LABELS
    plain = [_row(("Ada", "noun"), ("saw", "Verb"), ("Rome", "noun"))]
    assert _task(scheme="plain").labels(plain) == ["Verb", "noun"]


def test_tags_may_be_numbers() -> None:
    assert _task(scheme="plain").labels([{"tokens": ["a", "b"], "tags": [3, 0]}]) == ["0", "3"]


@pytest.mark.parametrize(
    ("scheme", "tags", "told"),
    [
        ("bio", ["O", "PER"], "the tag 'PER' is neither 'O' nor begins with 'B-' or 'I-': set `scheme: plain`"),
        ("plain", ["O", "B-PER"], "all tags are BIO tags, such as 'B-PER': set `scheme: bio`"),
        ("bio", ["O", "O"], "at least two tags, and every word of every row says 'O'"),
        ("plain", ["noun", "noun"], "at least two tags, and every word of every row says 'noun'"),
        ("plain", ["O", "O"], "at least two tags, and every word of every row says 'O'"),
        ("bio", ["O"], "at least two tags, and every word of every row says nothing"),
    ],
)
def test_tags_that_cannot_be_learned_are_refused(scheme: Any, tags: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        _task(scheme=scheme).labels([{"tokens": ["a", "b"], "tags": tags}])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": "Ada", "tags": ["O"]}, "`tokens` is no list of words"),
        ({"tokens": [1], "tags": ["O"]}, "`tokens` is no list of words"),
        ({"tokens": None, "tags": ["O"]}, "`tokens` is no list of words"),
        ({"tokens": ["Ada"], "tags": "O"}, "`tags` is no list of tags"),
        ({"tokens": ["Ada"], "tags": [None]}, "`tags` is no list of tags"),
        ({"tokens": ["Ada"], "tags": ["O", "O"]}, "not as many tags as words"),
        ({"tokens": ["Ada"], "tags": ["B-ORG"]}, "its tag 'B-ORG' is not among the training rows'"),
        ({"tokens": ["\u200b", ""], "tags": ["O", "O"]}, "the tokenizer makes nothing"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_problem_of_that_row(row: Row, told: str, reader: Reader) -> None:
    with pytest.raises(RowProblem, match=told):
        TASK.encode(0, row, reader)


def test_a_tokenizer_that_knows_no_words_is_refused(reader: Reader) -> None:
    with pytest.raises(RecipeError, match="needs a fast tokenizer"):
        TASK.encode(0, ADA, replace(reader, tokenizer=SimpleNamespace(is_fast=False)))


# --- words and pieces -------------------------------------------------------------------------------------------------


def test_the_first_piece_of_a_word_has_its_tag(reader: Reader) -> None:
    example = _one(TASK, ADA, reader)
    assert reader.tokenizer.convert_ids_to_tokens(example.ids) == [
        *("[CLS]", "ada", "love", "##lace", "saw", "york", "##shire", "[SEP]")
    ]
    assert example.labels == [IGNORED, 2, 4, IGNORED, 0, 1, IGNORED, IGNORED]
    assert (example.words, example.places, example.tags) == ([0, 1, 2, 3], [1, 2, 4, 5], [2, 4, 0, 1])
    assert (example.supervised, example.cut) == (4, 0)


def test_all_pieces_of_a_word_can_have_its_tag(reader: Reader) -> None:
    example = _one(ALL, ADA, reader)
    assert example.labels == [IGNORED, 2, 4, 4, 0, 1, 1, IGNORED]
    assert example.places == _one(TASK, ADA, reader).places


def test_a_word_of_which_the_tokenizer_makes_nothing_keeps_its_tag(reader: Reader) -> None:
    example = _one(TASK, ROWS[3], reader)
    found = dict(zip(example.words, zip(example.places, example.tags, strict=True), strict=True))
    assert found == {0: (1, 1), 1: (2, 3), 2: (3, 0), 3: (NOWHERE, 2), 4: (4, 1)}
    assert example.supervised == 4


def test_chinese_is_tagged_by_characters(reader: Reader) -> None:
    example = _one(TASK, ROWS[5], reader)
    assert reader.tokenizer.convert_ids_to_tokens(example.ids) == ["[CLS]", *"他在北京", "[SEP]"]
    assert example.labels == [IGNORED, 2, 0, 1, 3, IGNORED]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["ada", "saw", "new", "york"], "ada saw new york"),
        (["他", "在", "北", "京"], "他在北京"),
        (["ada", "saw", "北", "京", "and"], "ada saw北京and"),
    ],
)
def test_a_tokenizer_of_bytes_reads_words_as_in_a_text(words: list[str], text: str) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(["ada saw new york"] * 9, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    inner.add_tokens(["他", "在", "北", "京"])
    bytewise = PreTrainedTokenizerFast(tokenizer_object=inner)
    example = _one(TASK, {"tokens": words, "tags": ["O"] * len(words)}, Reader(bytewise, 64, labels=LABELS))
    assert bytewise.decode(example.ids) == text
    assert example.words == list(range(len(words)))
    if text.isascii():  # where every token is within a word
        assert example.ids == bytewise(text)["input_ids"]
        assert len(example.ids) == len(words)


# --- long rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 4, 5, 7, 8, 12, 16, 40, 43, 44, 64])
def test_windows_judge_each_word_once_and_lose_nothing(limit: int, reader: Reader) -> None:
    reader = replace(reader, limit=limit)
    examples = _examples(TASK, [LONG], reader)
    assert (len(examples) == 1) == (limit >= 44)
    words = LONG["tokens"]
    assert sorted(word for example in examples for word in example.words) == list(range(len(words)))
    for example in examples:
        assert len(example.ids) <= limit
        tokens = reader.tokenizer.convert_ids_to_tokens(example.ids)
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
        for word, place, tag in zip(example.words, example.places, example.tags, strict=True):
            assert words[word].startswith(tokens[place])
            assert LABELS[tag] == LONG["tags"][word]
            assert example.labels[place] == tag
        assert example.supervised == len(example.words) > 0
    cut = sum(example.cut for example in examples)
    assert cut == (12 if limit == 3 else 0)  # one token of two in each of twelve words, where one has room


def test_a_word_is_judged_where_it_has_most_context(reader: Reader) -> None:
    row = _row(*[("ada", "O")] * 20)
    first, second = _examples(TASK, [row], replace(reader, limit=14))  # room for 12 words: 0-11 and 9-19
    assert (len(first.ids), len(second.ids)) == (14, 13)
    # Word 10 has one word after it in the first window and one before it in the second: there the first wins.
    assert first.words == [*range(11)]
    assert second.words == [*range(11, 20)]


def test_context_overlaps_by_a_quarter(reader: Reader) -> None:
    row = _row(*[("ada", "O")] * 100)
    examples = _examples(TASK, [row], replace(reader, limit=22))
    assert sum(len(example.ids) - 2 for example in examples) == 100 + 5 * (len(examples) - 1)


@pytest.mark.parametrize("lengths", [(1, 1, 9, 1), (9, 9, 9), (1, 9, 1, 9), (5, 4, 9, 1, 1, 1, 1, 1, 1, 9)])
def test_words_of_any_length_are_each_judged(lengths: Sequence[int], reader: Reader) -> None:
    row = _row(*[("love" + "lace" * (length - 1), "O") for length in lengths])
    examples = _examples(TASK, [row], replace(reader, limit=12))
    assert sorted(word for example in examples for word in example.words) == list(range(len(lengths)))
    assert all(len(example.ids) <= 12 for example in examples)


def test_a_long_row_can_be_an_error_or_dropped(reader: Reader) -> None:
    with pytest.raises(DataError, match=r"44 tokens, and max_length is 16.*\(drop, window\)"):
        _task(too_long="error").encode(5, LONG, reader)
    with pytest.raises(RowProblem, match="too long: above 16 tokens"):
        _task(too_long="drop").encode(5, LONG, reader)


def test_a_limit_that_has_no_room_for_a_word_is_refused(reader: Reader) -> None:
    with pytest.raises(RecipeError, match="leave no room for a word"):
        TASK.encode(0, ADA, replace(reader, limit=2))


# --- losses -----------------------------------------------------------------------------------------------------------


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert sum(grad.abs().max() > 1e-6 for grad in found.values()) > 10
    return found


@pytest.mark.parametrize("architecture", ["model", "decoder"])
@pytest.mark.parametrize("task", [TASK, ALL], ids=["first", "all"])
def test_loss_and_gradients_are_those_of_transformers_heads(
    task: Tagging, architecture: str, reader: Reader, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(architecture)
    batch = task.collate(_examples(task, ROWS, reader), 0)
    assert (batch["attention_mask"] == 0).any()
    objective = task.objective(model, batch)
    loss = objective.total / objective.weight
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = model(**inputs).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    reference = _gradients(model, expected)
    for name, gradient in _gradients(model, loss).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", [TASK, ALL], ids=["first", "all"])
def test_a_split_into_batches_changes_neither_the_loss_nor_the_scores(
    task: Tagging, model: PreTrainedModel, reader: Reader
) -> None:
    examples = _examples(task, ROWS, reader)
    found = []
    for size in (1, 2, 7, len(examples)):
        chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
        objectives = [task.objective(model, task.collate(chunk, 0)) for chunk in chunks]
        outcomes = [outcome for objective in objectives for outcome in objective.outcomes()]
        totals = {"total": sum(o.total.item() for o in objectives), "weight": sum(o.weight for o in objectives)}
        found.append(totals | task.scores(outcomes, (), reader))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert found[0]["weight"] == sum(example.supervised for example in examples)


# --- evaluation -------------------------------------------------------------------------------------------------------


def _outcomes(task: Tagging, model: PreTrainedModel, examples: Sequence[Example]) -> Sequence[Any]:
    return task.objective(model, task.collate(examples, 0)).outcomes()


@pytest.mark.parametrize("task", [TASK, ALL], ids=["first", "all"])
def test_scores_are_over_all_words_of_rows_in_any_order(task: Tagging, model: PreTrainedModel, reader: Reader) -> None:
    examples = _examples(task, ROWS, reader)
    scores = task.scores(_outcomes(task, model, examples[::-1]), (), reader)
    predicted = [["O"] * len(row["tokens"]) for row in ROWS]
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]  # (tokens, tags)
        for word, place in zip(example.words, example.places, strict=True):
            if place != NOWHERE:
                predicted[example.row][word] = LABELS[int(logits[place].argmax())]
    true = [row["tags"] for row in ROWS]
    assert scores["f1"] == pytest.approx(f1_score(true, predicted))
    assert 0 < scores["f1"] < 1
    right = [a == b for sides in zip(true, predicted, strict=True) for a, b in zip(*sides, strict=True)]
    assert len(right) == sum(len(row["tokens"]) for row in ROWS)
    assert scores["accuracy"] == pytest.approx(sum(right) / len(right))
    assert task.directions(reader.labels).keys() == {"loss", *scores}


def test_a_kind_of_entity_that_occurs_nowhere_has_a_score(reader: Reader) -> None:
    nothing = SimpleNamespace(row=0, words=[0], true=[0], predicted=[0])
    kinds = {tag[2:] for tag in LABELS if tag != "O"}
    scores = TASK.scores([nothing], (), reader)
    assert {scores[f"f1.{kind}"] for kind in kinds} == {0.0}


def test_perfect_predictions_miss_only_the_word_that_is_nothing(reader: Reader) -> None:
    outcomes = [
        SimpleNamespace(
            row=e.row,
            words=e.words,
            true=e.tags,
            predicted=[t if p >= 0 else p for t, p in zip(e.tags, e.places, strict=True)],
        )
        for e in _examples(TASK, ROWS, reader)
    ]
    scores = TASK.scores(outcomes, (), reader)
    assert scores["precision"] == 1.0
    assert scores["f1.PER"] < 1.0 == scores["f1.LOC"]


def test_windows_of_a_row_are_joined_in_the_order_of_its_words(reader: Reader) -> None:
    begin, inside = LABELS.index("B-PER"), LABELS.index("I-PER")
    later = SimpleNamespace(row=0, words=[1], true=[inside], predicted=[0])
    earlier = SimpleNamespace(row=0, words=[0], true=[begin], predicted=[begin])
    # Half of one name is found, which is nothing; in the other order there would be two names, and one of them found.
    assert TASK.scores([later, earlier], (), reader)["f1"] == 0.0


def test_runs_of_plain_tags_are_entities(reader: Reader) -> None:
    task = _task(scheme="plain")
    labels = ["O", "LOC", "PER"]
    rows = [_row(("Ada", "PER"), ("Lovelace", "PER"), ("saw", "O"), ("Rome", "LOC"))]
    (example,) = _examples(task, rows, replace(reader, labels=labels))
    half = SimpleNamespace(row=0, words=example.words, true=example.tags, predicted=[2, 0, 0, 1])
    scores = task.scores([half], (), replace(reader, labels=labels))
    assert scores["f1.PER"] == 0.0  # half of a name is not the name
    assert scores["f1.LOC"] == 1.0
    assert scores["accuracy"] == 0.75


def test_outcomes_are_plain_values(model: PreTrainedModel, reader: Reader) -> None:
    for outcome in _outcomes(TASK, model, _examples(TASK, ROWS, reader)):
        assert type(outcome.row) is int
        assert len(outcome.words) == len(outcome.true) == len(outcome.predicted)
        assert all(type(value) is int for values in outcome[1:] for value in values)
