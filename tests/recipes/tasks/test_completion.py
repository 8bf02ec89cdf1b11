import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onegpu.adapters import DataError
from onegpu.recipes.tasks import Example, Reader, RowProblem
from onegpu.recipes.tasks.answering import AnswerExample
from onegpu.recipes.tasks.chat import Chat, render
from onegpu.recipes.tasks.completion import Completion

IGNORED = -100
START, END = 0, 1
COMPLETION = Completion(data="rows.jsonl")
PAIRS = [("Good morning", " Guten Morgen"), ("One", " Eins"), ("See you tomorrow", " Bis morgen"), ("No", " Nein!")]


@pytest.fixture
def beginning(reader: Reader) -> Reader:
    """The reader with a tokenizer that puts its beginning token in front, as Llama's does."""
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    return replace(reader, tokenizer=tokenizer)


@pytest.fixture
def model(chat_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(chat_base)


def _encode(prompt: Any, completion: Any, reader: Reader, **settings: Any) -> AnswerExample:
    row = {"prompt": prompt, "completion": completion}
    (example,) = Completion(data="rows.jsonl", **settings).encode(7, row, reader)
    assert isinstance(example, AnswerExample)
    return example


def _all(reader: Reader, task: Completion = COMPLETION) -> list[Example]:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_completion_and_its_end_are_supervised(reader: Reader) -> None:
    example = _encode("Good morning:", " Guten Morgen", reader)
    assert reader.tokenizer.decode(example.ids) == "Good morning: Guten Morgen<|im_end|>"
    supervised = [label for label in example.labels if label != IGNORED]
    assert reader.tokenizer.decode(supervised) == " Guten Morgen<|im_end|>"
    assert example.labels[-len(supervised) :] == supervised == example.ids[-len(supervised) :]


def test_an_end_that_is_written_out_is_not_doubled(reader: Reader) -> None:
    assert _encode("Hi", " Yo<|im_end|>", reader) == _encode("Hi", " Yo", reader)


@pytest.mark.parametrize("prompt", ["Hi", "<|im_start|>Hi"])
def test_the_text_begins_once_where_the_tokenizer_begins_texts(prompt: str, beginning: Reader) -> None:
    ids = _encode(prompt, " Yo", beginning).ids
    assert ids[:2] == beginning.tokenizer("Hi")["input_ids"][:2]
    assert ids.count(START) == 1


def test_no_beginning_is_added_where_the_tokenizer_adds_none(reader: Reader) -> None:
    assert START not in _encode("Hi", " Yo", reader).ids


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_has_the_same_tokens_whatever_follows(beginning: Reader, chat: bool) -> None:
    task = {"chat": chat, "metrics": ["exact-match"]}
    first, second = (_encode("Hi", said, beginning, **task) for said in ("lo", "there and then"))
    assert first.prompt == second.prompt
    assert first.ids[: len(first.prompt)] == first.prompt == second.ids[: len(second.prompt)]
    assert set(first.labels[: len(first.prompt)]) == {IGNORED}
    assert (first.references, second.references) == (["lo"], ["there and then"])
    assert first.ids.count(START) == (1 if not chat else 2)  # the template begins each turn with it


def test_a_chat_is_what_the_task_chat_makes_of_it(reader: Reader) -> None:
    example = _encode("Hi", "Hello.", reader, chat=True)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (expected,) = Chat(data="rows.jsonl").encode(7, {"messages": talk}, reader)
    length = len(example.ids)
    assert (example.ids, example.labels) == (expected.ids[:length], expected.labels[:length])
    assert reader.tokenizer.decode(expected.ids[length:]) == "\n"  # after the end, and never supervised
    assert render(reader.tokenizer, talk[:1], prompt=True) == example.ids[: example.labels.count(IGNORED)]


def test_a_tokenizer_without_an_end_is_refused(reader: Reader) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token, so the model would not learn to stop"):
        _encode("Hi", " Yo", replace(reader, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("", "Yo", "`prompt` is empty"),
        (None, "Yo", "`prompt` is not a text"),
        ("Hi", " ", "`completion` is empty"),
        ("Hi", ["Yo"], "`completion` is not a text"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_a_row_without_its_texts_is_a_problem_of_that_row(
    prompt: Any, completion: Any, told: str, chat: bool, reader: Reader
) -> None:
    with pytest.raises(RowProblem, match=f"^{told}$"):
        _encode(prompt, completion, reader, chat=chat)


# --- long rows --------------------------------------------------------------------------------------------------------


def test_a_long_row_is_an_error_that_names_the_choices(reader: Reader) -> None:
    with pytest.raises(DataError, match=r"8 tokens, and max_length is 6.*\(drop, cut-left, cut-right\)"):
        _encode("Hello", "Yo", replace(reader, limit=6))


def test_a_long_row_can_be_dropped(reader: Reader) -> None:
    with pytest.raises(RowProblem, match="too long: above 6 tokens"):
        _encode("Hello", "Yo", replace(reader, limit=6), too_long="drop")


def test_a_long_row_can_be_cut_on_either_side(reader: Reader) -> None:
    left = _encode("Hello", "Yo", replace(reader, limit=6), too_long="cut-left")
    assert (reader.tokenizer.decode(left.ids), left.supervised, left.cut) == ("lloYo<|im_end|>", 3, 2)
    right = _encode("Hello", "Yo", replace(reader, limit=6), too_long="cut-right")
    assert (reader.tokenizer.decode(right.ids), right.supervised, right.cut) == ("HelloY", 1, 2)


def test_the_beginning_stays_when_the_left_is_cut(beginning: Reader) -> None:
    example = _encode("Hello", "Yo", replace(beginning, limit=6), too_long="cut-left")
    assert beginning.tokenizer.decode(example.ids) == "<|im_start|>loYo<|im_end|>"


def test_a_prompt_that_leaves_no_room_for_its_completion_is_a_problem_of_the_row(reader: Reader) -> None:
    with pytest.raises(RowProblem, match="nothing supervised is left after cutting"):
        _encode("Hello there", "Yo", replace(reader, limit=6), too_long="cut-right")


def test_windows_make_no_sense_for_completions() -> None:
    with pytest.raises(ValueError, match="too_long"):
        Completion(data="rows.jsonl", too_long="window")  # type: ignore[arg-type]


# --- loss and scores --------------------------------------------------------------------------------------------------


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_objective_is_the_models_own_loss(model: PreTrainedModel, reader: Reader) -> None:
    batch = COMPLETION.collate(_all(reader), END)
    own = model(**batch).loss
    expected = _gradients(model, own)
    objective = COMPLETION.objective(model, batch)
    assert objective.weight == sum(len(completion.encode()) + 1 for _, completion in PAIRS)
    assert objective.total.item() / objective.weight == pytest.approx(own.item(), rel=1e-6)
    for name, gradient in _gradients(model, objective.total / objective.weight).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_the_measures_are_scores(model: PreTrainedModel, reader: Reader) -> None:
    task = Completion(data="rows.jsonl", metrics=["chrf", "token-f1"], answer_tokens=3)
    examples = _all(reader, task)
    objective = task.objective(model, task.collate(examples, END))
    scores = task.scores(objective.outcomes(), task.answer(model, examples, reader), reader)
    assert set(task.measures()) == {"loss", *scores}
    assert next(iter(task.measures())) == "chrf"
    assert scores["perplexity"] == pytest.approx(math.exp(objective.total.item() / objective.weight), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_scores_are_the_same_for_every_batch_size(
    model: PreTrainedModel, reader: Reader, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = _all(reader) * 2
    chunks: Sequence[list[Example]] = [examples[start : start + size] for start in range(0, len(examples), size)]
    parts = [COMPLETION.objective(model, COMPLETION.collate(chunk, END)) for chunk in chunks]
    whole = COMPLETION.objective(model, COMPLETION.collate(examples, END))
    assert sum(part.weight for part in parts) == whole.weight
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    scores = COMPLETION.scores([o for part in parts for o in part.outcomes()], (), reader)
    assert scores == pytest.approx(COMPLETION.scores(whole.outcomes(), (), reader), rel=1e-6)


@pytest.mark.parametrize("chat", [False, True])
def test_an_overfitted_model_completes_its_prompts_and_stops(
    model: PreTrainedModel, beginning: Reader, chat: bool
) -> None:
    task = Completion(data="rows.jsonl", chat=chat, metrics=["exact-match", "bleu"], answer_tokens=30)
    examples = _all(beginning, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        objective = task.objective(model, task.collate(examples, END))
        optimizer.zero_grad()
        (objective.total / objective.weight).backward()
        optimizer.step()
    scores = task.answer_scores(task.answer(model, examples, beginning))
    assert scores["exact_match"] == 1.0
    row = {"prompt": "See you tomorrow", "completion": " Bis morgen"}
    assert task.demonstrate(model, beginning, row) == ("See you tomorrow", "Bis morgen")


def test_a_setting_that_nothing_would_read_is_refused(reader: Reader) -> None:
    build: Callable[..., Completion] = Completion
    with pytest.raises(ValueError, match="`bleu_tokeniser` is for `metrics: \\[bleu\\]`"):
        build(data="rows.jsonl", bleu_tokeniser="zh", metrics=["chrf"])
    assert build(data="rows.jsonl", bleu_tokeniser="zh", metrics=["bleu"]).bleu_tokeniser == "zh"
