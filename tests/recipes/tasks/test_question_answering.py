import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from onegpu.adapters import DataError, RecipeError, attach
from onegpu.recipes.tasks import Reader, RowProblem
from onegpu.recipes.tasks.question_answering import QuestionAnswering, Span, Window

TASK = QuestionAnswering(data="rows.jsonl")
WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def _row(question: str, context: str, *answers: str, start: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"text": list(answers)}
    if start:
        found["answer_start"] = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": found}


def _rows() -> list[dict[str, Any]]:
    """Twelve questions about contexts of 5 to 60 words, each third without an answer."""
    draw = random.Random(0)
    rows = []
    for n in range(12):
        words = [draw.choice(WORDS) for _ in range(5 + 5 * n)]
        at = draw.randrange(len(words) - 2)
        context = " ".join(words)
        place = len(" ".join(words[:at])) + (at > 0)
        text = " ".join(words[at : at + 2])
        answers = {"text": [text], "answer_start": [place]} if n % 3 else {"text": [], "answer_start": []}
        rows.append({"question": f"w{n} ?", "context": context, "answers": answers})
    return rows


@pytest.fixture(scope="module")
def words() -> Reader:
    """Words as tokens, for examples of at most 24 of them."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIALS, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return Reader(tokenizer, 24)


@pytest.fixture
def model() -> BertForQuestionAnswering:
    """A tiny BERT that points, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=44,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    made = BertForQuestionAnswering(config)
    made.eval()
    return made


@pytest.fixture
def windows(words: Reader) -> list[Window]:
    """All windows of all rows."""
    return [w for n, row in enumerate(_rows()) for w in TASK.encode(n, row, words)]


def _outcomes(model: Any, windows: list[Window], size: int, task: QuestionAnswering = TASK) -> list[Span]:
    with torch.no_grad():
        chunks = [windows[i : i + size] for i in range(0, len(windows), size)]
        return [span for c in chunks for span in task.objective(model, task.collate(c, 0)).outcomes()]


# --- rows to windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "stride"), [(24, None), (24, 0), (12, 5), (13, 1), (200, 3)])
def test_windows_are_those_of_the_tokenizer_itself(words: Reader, limit: int, stride: int | None) -> None:
    task = QuestionAnswering(data="rows.jsonl", stride=stride)
    several = 0
    for number, row in enumerate(_rows()):
        theirs = words.tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=limit,
            stride=limit // 4 if stride is None else stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        labels = [_labels(theirs, i, row["answers"]) for i in range(len(theirs["input_ids"]))]
        if row["answers"]["text"] and not any(map(any, labels)):
            assert stride == 0  # else an answer of two words is whole in some window
            with pytest.raises(RowProblem, match="its answer is whole in no window: raise max_length or stride"):
                task.encode(number, row, replace(words, limit=limit))
            continue
        ours = task.encode(number, row, replace(words, limit=limit))
        assert [w.ids for w in ours] == theirs["input_ids"]
        assert [w.types for w in ours] == theirs["token_type_ids"]
        assert [w.labels for w in ours] == labels
        assert [w.number for w in ours] == list(range(len(ours)))
        several += len(ours) > 1
    assert several > 3 or limit == 200


def _labels(found: Any, index: int, answers: Mapping[str, Any]) -> list[int]:
    """Positions of an answer as transformers' own example for SQuAD finds them."""
    if not answers["text"]:
        return [0, 0]
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    offsets = found["offset_mapping"][index]
    context = [i for i, part in enumerate(found.sequence_ids(index)) if part == 1]
    first, last = context[0], context[-1]
    if not (offsets[first][0] <= begin and offsets[last][1] >= end):
        return [0, 0]
    while first < len(offsets) and offsets[first][0] <= begin:
        first += 1
    while offsets[last][1] >= end:
        last -= 1
    return [first - 1, last + 1]


def test_an_answer_is_in_some_window_and_nowhere_in_the_others(words: Reader, windows: list[Window]) -> None:
    by_row: dict[int, list[Window]] = {}
    for window in windows:
        by_row.setdefault(window.row, []).append(window)
    for number, row in enumerate(_rows()):
        texts = [_labelled(window) for window in by_row[number] if window.labels != [0, 0]]
        assert set(texts) == set(row["answers"]["text"])
        assert all(w.references == row["answers"]["text"] for w in by_row[number])
    assert any(w.labels == [0, 0] and w.references for w in windows)


def _labelled(window: Window) -> str:
    first, last = (label - window.first for label in window.labels)
    return window.text[window.starts[first] : window.ends[last]]


def test_an_answer_without_a_place_is_the_first_that_occurs(words: Reader) -> None:
    (window,) = TASK.encode(0, _row("w1 ?", "w2 w3 w2 w3", "w2", start=False), words)
    assert window.labels == [window.first] * 2


def test_spaces_around_an_answer_are_left_out_and_parts_of_words_point_to_the_word(words: Reader) -> None:
    (window,) = TASK.encode(0, _row("w1 ?", "w2 w10 w3", " w10 "), words)
    assert (_labelled(window), window.references) == ("w10", ["w10"])
    (window,) = TASK.encode(0, _row("w1 ?", "w2 w10 w3", "10"), words)
    assert (_labelled(window), window.references) == ("w10", ["10"])


def test_several_answers_are_all_references_and_the_first_is_taught(words: Reader) -> None:
    (window,) = TASK.encode(0, _row("w1 ?", "w2 w3 w4", "w4", "w3 w4"), words)
    assert (_labelled(window), window.references) == ("w4", ["w4", "w3 w4"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": " "}, "`question` is empty"),
        ({"context": 3}, "`context` is not a text"),
        ({"answers": None}, "`answers` must be"),
        ({"answers": ["w2"]}, "`answers` must be"),
        ({"answers": {"text": "w2", "answer_start": [0]}}, "`answers` must be"),
        ({"answers": {"text": ["w2"], "answer_start": []}}, "as many `text` as `answer_start`"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "an answer is no text, or empty"),
        ({"answers": {"text": [2], "answer_start": [0]}}, "an answer is no text, or empty"),
        ({"answers": {"text": ["w3"], "answer_start": [0]}}, "not where `answer_start` says"),
        ({"answers": {"text": ["w2"], "answer_start": ["0"]}}, "not where `answer_start` says"),
        ({"answers": {"text": ["w3"], "answer_start": [-2]}}, "not where `answer_start` says"),
        ({"answers": {"text": ["w9"]}}, "does not occur in its context"),
        ({"question": " ".join(["w1"] * 20), "context": " ".join(["w2"] * 20)}, "leaves no room for the context"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(words: Reader, change: dict[str, Any], told: str) -> None:
    with pytest.raises(RowProblem, match=told):
        TASK.encode(0, _row("w1 ?", "w2 w3", "w2") | change, words)


def test_an_answer_that_fits_in_no_window_is_not_taught_as_missing(words: Reader) -> None:
    context = " ".join(["w1"] * 40)
    with pytest.raises(RowProblem, match="whole in no window"):
        TASK.encode(0, _row("w1 ?", context, context[:-6]), words)


def test_what_the_tokenizer_drops_cannot_be_pointed_to(words: Reader) -> None:
    silent = copy.deepcopy(words.tokenizer)
    silent.backend_tokenizer.normalizer = normalizers.Replace("y", "")
    reader = replace(words, tokenizer=silent)
    with pytest.raises(RowProblem, match="makes nothing of the context"):
        TASK.encode(0, _row("w1", "yy y"), reader)
    with pytest.raises(RowProblem, match="makes nothing of the answer"):
        TASK.encode(0, _row("w1", "w2 y", "y"), reader)


def test_other_policies_than_windows(words: Reader) -> None:
    row = _rows()[-1]
    with pytest.raises(DataError, match=r"\d+ tokens, and max_length is 24: .*\(drop, window\)"):
        QuestionAnswering(data="rows.jsonl", too_long="error").encode(3, row, words)
    with pytest.raises(RowProblem, match="too long: above 24 tokens"):
        QuestionAnswering(data="rows.jsonl", too_long="drop").encode(3, row, words)


def test_a_slow_tokenizer_is_refused(words: Reader) -> None:
    TASK.check(words)
    with pytest.raises(RecipeError, match="only fast tokenizers"):
        TASK.check(replace(words, tokenizer=SimpleNamespace(is_fast=False)))


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_transformers(model: BertForQuestionAnswering, windows: list[Window]) -> None:
    whole = [w for w in windows if len(w.ids) == 24]  # transformers lets a window point to padding, so: none
    assert {tuple(w.labels) for w in whole} > {(0, 0)}
    batch = TASK.collate(whole, 0)
    objective = TASK.objective(model, batch)
    assert objective.weight == len(whole)
    (objective.total / objective.weight).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    start, end = batch["labels"].T
    theirs = model(**inputs, start_positions=start, end_positions=end)
    theirs.loss.backward()
    torch.testing.assert_close(objective.total / objective.weight, theirs.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)
    assert ours["bert.embeddings.token_type_embeddings.weight"][1].any()


def test_a_padded_batch_is_the_sum_of_its_windows_alone(model: BertForQuestionAnswering, windows: list[Window]) -> None:
    with torch.no_grad():
        alone = sum(
            model(
                input_ids=torch.tensor([w.ids]),
                token_type_ids=torch.tensor([w.types]),
                start_positions=torch.tensor([w.labels[0]]),
                end_positions=torch.tensor([w.labels[1]]),
            ).loss
            for w in windows
        )
        for size in (1, 2, 7, len(windows)):
            chunks = [TASK.collate(windows[i : i + size], 0) for i in range(0, len(windows), size)]
            objectives = [TASK.objective(model, chunk) for chunk in chunks]
            assert sum(o.weight for o in objectives) == len(windows)
            torch.testing.assert_close(sum(o.total for o in objectives), alone)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_is_found_among_all(model: BertForQuestionAnswering, windows: list[Window], longest: int) -> None:
    task = QuestionAnswering(data="rows.jsonl", answer_tokens=longest)
    spans = _outcomes(model, windows, 5, task)
    for window, span in zip(windows, spans, strict=True):
        with torch.no_grad():
            found = model(input_ids=torch.tensor([window.ids]), token_type_ids=torch.tensor([window.types]))
        start, end = found.start_logits[0].tolist(), found.end_logits[0].tolist()
        places = range(window.first, window.first + len(window.starts))
        scores = {(i, j): start[i] + end[j] for i, j in product(places, places) if i <= j < i + longest}
        best = max(scores, key=lambda place: scores[place])
        assert (span.row, span.number) == (window.row, window.number)
        assert (window.first + span.first, window.first + span.last) == best
        assert span.best == pytest.approx(scores[best], abs=1e-5)
        assert span.nowhere == pytest.approx(start[0] + end[0], abs=1e-5)


def test_scores_are_the_same_for_every_batch_size(
    model: BertForQuestionAnswering, windows: list[Window], words: Reader
) -> None:
    answers = TASK.answer(model, windows, words)
    found = [TASK.scores(_outcomes(model, windows, size), answers, words) for size in (1, 4, 100)]
    assert found[0] == found[1] == found[2]
    assert (found[0].keys() | {"loss"}) == TASK.measures().keys()
    assert next(iter(TASK.measures())) == "token_f1"


def _piece(row: int, number: int, text: str, *references: str) -> Window:
    places = [(i, i + 1) for i in range(len(text))]
    starts, ends = ([p[k] for p in places] for k in range(2))
    return Window(row, [], [0, 0], number=number, text=text, starts=starts, ends=ends, references=list(references))


def test_the_best_window_answers_and_the_least_sure_one_refuses(words: Reader) -> None:
    pieces = [_piece(0, 0, "abc", "b"), _piece(0, 1, "xyz", "b"), _piece(1, 0, "uvw")]
    spans = [Span(0, 0, 4.0, 5.0, 1, 1), Span(0, 1, 9.0, 3.0, 0, 2), Span(1, 0, 5.0, 2.0, 0, 1)]
    # Row 0: its best span scores 5, more than the lower of its two "no answer"; row 1 refuses.
    assert TASK.scores(spans, pieces, words) == {"exact_match": 1.0, "token_f1": 1.0}
    assert TASK.details(spans, pieces, words) == {
        "questions": {
            "answerable": {"answered": 1, "not answered": 0},
            "not answerable": {"answered": 0, "not answered": 1},
        }
    }
    eager = QuestionAnswering(data="rows.jsonl", null_threshold=3.0)  # 5 - 2 is not above it
    assert eager.scores(spans, pieces, words)["exact_match"] == 0.5
    # The order in which windows were batched does not matter.
    assert TASK.scores(spans[::-1], pieces, words) == TASK.scores(spans, pieces, words)


def test_where_every_question_has_an_answer_none_is_refused(words: Reader) -> None:
    pieces, spans = [_piece(0, 0, "abc", "b")], [Span(0, 0, 9.0, 1.0, 1, 1)]
    assert TASK.scores(spans, pieces, words)["exact_match"] == 1.0


def test_it_learns_where_answers_are_and_where_none_is(
    model: BertForQuestionAnswering, windows: list[Window], words: Reader
) -> None:
    stack = attach(model, ["full"])
    assert stack.heads.keys() == {"qa_outputs.weight", "qa_outputs.bias"}
    optimizer = torch.optim.AdamW(list(stack.trainable().values()), lr=3e-3)
    batch = TASK.collate(windows, 0)
    for _ in range(60):
        optimizer.zero_grad()
        TASK.objective(model, batch).total.backward()
        optimizer.step()
    scores = TASK.scores(_outcomes(model, windows, 8), TASK.answer(model, windows, words), words)
    assert scores == {"exact_match": 1.0, "token_f1": 1.0}
    row = _rows()[-1]
    assert TASK.demonstrate(model, words, row) == (row["question"], row["answers"]["text"][0])


def test_an_example_can_be_looked_at(words: Reader) -> None:
    (window,) = TASK.encode(0, _row("w1 ?", "w2 w3 w4", "w3"), words)
    assert TASK.explain(window, words) == [("[CLS] w1 [UNK] [SEP] w2", None), ("w3", "answer"), ("w4 [SEP]", None)]
    assert TASK.probe(window, 4) == {"input_ids": window.ids[:4]}
