"""A text begins once; what is trained on is what is asked with; everything said is in it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoModelForCausalLM

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes import Loaded, preflight
from onegpu.recipes.data.dataset import encode, gather
from onegpu.recipes.showing import data_report, lengths_line, report_lines
from onegpu.recipes.tasks import Reader, RowProblem, Task, answering
from onegpu.recipes.tasks.beginnings import begin_token, refuse_second_beginning
from onegpu.recipes.tasks.chat import Chat, answer
from onegpu.recipes.tasks.completion import Completion
from onegpu.recipes.tasks.conversations import check_says_all
from onegpu.recipes.tasks.preference import Preference

START = 0
ONCE = (  # as Llama 3 has it: the beginning of the whole conversation, in the template
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Row = dict[str, Any]


@pytest.fixture
def beginning(reader: Reader) -> Reader:
    """A reader whose tokenizer writes a beginning, as its template does."""
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.chat_template = ONCE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    return replace(reader, tokenizer=tokenizer)


def _talk(*said: str) -> Row:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


TASKS_AND_ROWS: list[tuple[Task, Row]] = [
    (Chat(data="d", metrics=["exact-match"]), _talk("Hi", "Hello.", "Who?", "Me.")),
    (Completion(data="d", metrics=["exact-match"]), {"prompt": "Hi ", "completion": "you"}),
    (Completion(data="d", chat=True, metrics=["exact-match"]), {"prompt": "Hi", "completion": "you"}),
]


@pytest.mark.parametrize(("task", "row"), TASKS_AND_ROWS, ids=["chat", "completion", "completion in chat"])
def test_training_and_every_way_to_generate_use_the_same_tokens_and_one_beginning(
    task: Any, row: Row, beginning: Reader, chat_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def generate(model: Any, prompts: list[list[int]], *others: Any) -> list[list[int]]:
        asked.extend(list(prompt) for prompt in prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(answering, "_generate", generate)
    model = AutoModelForCausalLM.from_pretrained(chat_base)
    (example,) = task.encode(0, row, beginning)
    task.answer(model, [example], beginning)
    task.demonstrate(model, beginning, row)
    if isinstance(task, Chat):
        answer(model, beginning, row["messages"][:3], 5)  # what `onegpu chat` calls
    assert len(asked) == (3 if isinstance(task, Chat) else 2)
    for prompt in asked:
        assert prompt == example.ids[: len(prompt)]
        assert example.labels[len(prompt)] != -100  # the answer begins right behind it
        assert example.labels[len(prompt) - 1] == -100
    assert example.ids.count(START) == 1
    assert example.ids[0] == START


def test_a_tokenizer_that_begins_nothing_has_no_such_token(reader: Reader, beginning: Reader) -> None:
    assert begin_token(reader.tokenizer) is None
    assert begin_token(beginning.tokenizer) == START
    beginning.tokenizer.chat_template = None
    assert begin_token(beginning.tokenizer) == START


def test_a_template_that_begins_each_turn_may(beginning: Reader, reader: Reader) -> None:
    beginning.tokenizer.chat_template = reader.tokenizer.chat_template  # ChatML, whose turns begin with this token
    assert begin_token(beginning.tokenizer) is None


@pytest.mark.parametrize(("ids", "at"), [([0, 5, 0, 6], 2), ([0, 0, 5], 1), ([5, 0], 1)])
def test_a_beginning_inside_is_refused_with_its_place(ids: Sequence[int], at: int, beginning: Reader) -> None:
    with pytest.raises(RowProblem, match=rf"'<\|im_start\|>', with which a text begins, .* \(at token {at}\)"):
        refuse_second_beginning([ids], START, beginning.tokenizer)
    refuse_second_beginning([[0, 5, 6], [5, 6]], START, beginning.tokenizer)


def test_a_row_that_holds_the_begin_token_as_text_is_listed(
    chat_recipe: Callable[..., Loaded], jsonl: Callable[..., Path], beginning: Reader
) -> None:
    rows = [_talk(f"{i}?", f"{i}!") for i in range(30)]
    rows[7] = _talk("what does <|im_start|> mean?", "a beginning")
    loaded = chat_recipe(task={"data": str(jsonl(rows, "these.jsonl"))})
    dataset = encode(loaded, gather(loaded), beginning)
    ((reason, places),) = dataset.dropped.items()
    assert "with which a text begins" in reason
    assert places == ["these.jsonl:8"]


def test_a_template_that_leaves_the_beginning_out_is_refused(beginning: Reader) -> None:
    Chat(data="d").check(beginning)
    beginning.tokenizer.chat_template = ONCE.removeprefix("{{ bos_token }}")
    told = r"begins texts with '<\|im_start\|>', and its chat template leaves that out"
    for task in (Chat(data="d"), Completion(data="d", chat=True)):
        with pytest.raises(RecipeError, match=told):
            task.check(beginning)
    said = {which: [{"role": "assistant", "content": which}] for which in ("chosen", "rejected")}
    pair = {"prompt": _talk("Hi")["messages"]} | said
    with pytest.raises(RecipeError, match=told):
        Preference(data="d").encode(0, pair, beginning)
    texts = {"prompt": "Hi ", "chosen": "you", "rejected": "no"}
    (example,) = Preference(data="d").encode(0, texts, beginning)  # uses no template
    assert example.ids[0] == START
    Completion(data="d").check(beginning)


def test_where_nothing_begins_texts_a_template_need_not(reader: Reader) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.chat_template = ONCE.removeprefix("{{ bos_token }}")
    Chat(data="d").check(replace(reader, tokenizer=tokenizer))


# --- everything said, and not everything supervised -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}", "what the user says"),
        ("{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
         "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}", "what the assistant says"),
    ],
    ids=["question", "answer"],
)  # fmt: skip
def test_a_template_that_leaves_something_out_is_refused(template: str, told: str, reader: Reader) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=told):
        check_says_all(tokenizer)
    for task in (Chat(data="d"), Completion(data="d", chat=True)):
        with pytest.raises(RecipeError, match=told):
            task.check(replace(reader, tokenizer=tokenizer))
    Completion(data="d").check(replace(reader, tokenizer=tokenizer))  # uses no template


def test_a_template_under_which_everything_would_be_supervised_is_refused(reader: Reader) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    answers = "{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + answers + "{% endfor %}"
    with pytest.raises(DataError, match="writes nothing before the answer, so all would be supervised"):
        Chat(data="d").encode(0, _talk("Hi", "Hello."), replace(reader, tokenizer=tokenizer))


# --- how much is supervised -------------------------------------------------------------------------------------------


def test_how_many_tokens_are_supervised_is_counted_by_example(
    chat_recipe: Callable[..., Loaded], jsonl: Callable[..., Path]
) -> None:
    # Bytes are tokens, and each answer ends with one more.
    rows = [_talk("?", "a" * n) for n in (1, 2, 2, 3, 6, 7, 7, 8, 30, 40)]
    job = preflight(chat_recipe(task={"data": str(jsonl(rows, "these.jsonl")), "evaluation": "none"}))
    report = job.dataset.report()
    assert report["supervised_histogram"] == {"2-3": 3, "4-7": 2, "8-15": 3, "16-31": 1, "32-63": 1}
    assert [report[f"supervised_{name}"] for name in ("p50", "p95", "max")] == [8, 41, 41]
    assert sum(report["supervised_histogram"].values()) == report["train_examples"]
    assert lengths_line(report).endswith("; supervised 8 in the middle, 95 % up to 41, most 41")
    lines = dict(report_lines(data_report(job, 0)))
    assert lines["supervised"] == "tokens: examples - 2-3: 3, 4-7: 2, 8-15: 3, 16-31: 1, 32-63: 1"


def test_of_a_class_there_is_nothing_to_count(class_recipe: Callable[..., Loaded]) -> None:
    report = preflight(class_recipe()).dataset.report()
    assert report["supervised_histogram"] == {"1": 10}
    assert "supervised" not in lengths_line(report)
