import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BatchEncoding, PreTrainedModel

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes.tasks import Example, Reader, RowProblem
from onegpu.recipes.tasks.answering import Answer, AnswerExample
from onegpu.recipes.tasks.chat import Chat, answer, render

IGNORED = -100
START, END = 0, 1  # <|im_start|> and <|im_end|>, which is the padding too
CHAT = Chat(data="rows.jsonl")

Conversation = list[dict[str, str]]
Messages = Callable[..., Conversation]
MakeReader = Callable[..., Reader]


@pytest.fixture
def reader_of(reader: Reader) -> MakeReader:
    """`reader_of(template, limit=20)`: the reader with another chat template."""

    def build(template: str | None = None, **changes: Any) -> Reader:
        tokenizer = copy.deepcopy(reader.tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        return replace(reader, tokenizer=tokenizer, **changes)

    return build


@pytest.fixture
def model(chat_base: Path) -> PreTrainedModel:
    """The tiny chat base, float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(chat_base)


def _encode(messages: Sequence[Any], reader: Reader, **settings: Any) -> Example:
    (example,) = _pieces(messages, reader, **settings)
    return example


def _pieces(messages: Sequence[Any], reader: Reader, *, tools: Any = None, **settings: Any) -> Sequence[Example]:
    row = {"messages": messages} | ({} if tools is None else {"tools": tools})
    return Chat(data="rows.jsonl", **settings).encode(7, row, reader)


def _all(rows: Sequence[dict[str, Any]], reader: Reader, task: Chat = CHAT) -> list[Example]:
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


def _supervised(example: Example, reader: Reader) -> str:
    """The text that carries loss, as the model would have to write it."""
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.ids, strict=True))
    return str(reader.tokenizer.decode([label for label in example.labels if label != IGNORED]))


# --- which tokens are supervised --------------------------------------------------------------------------------------


def test_exactly_the_answers_and_the_ends_of_their_turns_are_supervised(messages: Messages, reader: Reader) -> None:
    talk = messages(("Hi", "Hello there."), ("Who?", "Me, ß – 你."), ("A", "B"))
    assert _supervised(_encode(talk, reader), reader) == "Hello there.<|im_end|>Me, ß – 你.<|im_end|>B<|im_end|>"


def test_only_the_last_answer_is_supervised_where_that_is_asked_for(messages: Messages, reader: Reader) -> None:
    talk = messages(("Hi", "Hello."), ("Who?", "Me."))
    example = _encode(talk, reader, supervise="last")
    assert _supervised(example, reader) == "Me.<|im_end|>"
    assert example.ids == _encode(talk, reader).ids


def test_a_system_prompt_is_read_and_not_supervised(messages: Messages, reader: Reader) -> None:
    example = _encode(messages(("Hi", "Hello."), system="Be kind."), reader)
    assert "Be kind." in reader.tokenizer.decode(example.ids)
    assert _supervised(example, reader) == "Hello.<|im_end|>"


def test_a_question_after_the_last_answer_is_not_supervised(messages: Messages, reader: Reader) -> None:
    talk = [*messages(("Hi", "Hello.")), {"role": "user", "content": "Bye"}]
    assert _supervised(_encode(talk, reader), reader) == "Hello.<|im_end|>"


def test_the_same_text_is_supervised_only_where_the_assistant_says_it(messages: Messages, reader: Reader) -> None:
    example = _encode(messages(("Same", "Same"), ("Same", "Same")), reader)
    text = [
        reader.tokenizer.decode([token])
        for token, label in zip(example.ids, example.labels, strict=True)
        if label == IGNORED
    ]
    assert "".join(text).count("Same") == 2
    assert _supervised(example, reader) == "Same<|im_end|>" * 2


@pytest.mark.parametrize("turn", [0, 1])
def test_the_prompt_of_a_chat_is_the_beginning_of_what_was_trained_on(
    messages: Messages, reader: Reader, turn: int
) -> None:
    talk = messages(("Hi", "Hello."), ("Who?", "Me."), system="Be kind.")
    ids = _encode(talk, reader).ids
    prompt = render(reader.tokenizer, talk[: 2 + 2 * turn], prompt=True)
    assert ids[: len(prompt)] == prompt
    assert reader.tokenizer.decode(ids[len(prompt) :]).startswith(talk[2 + 2 * turn]["content"])


def test_a_template_that_marks_answers_itself_makes_no_difference(messages: Messages, reader_of: MakeReader) -> None:
    plain = reader_of()
    marked = reader_of(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = messages(("Hi", "Hello."), ("Who?", "Me."))
    assert _encode(talk, marked) == _encode(talk, plain)
    own = marked.tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert [int(label != IGNORED) for label in _encode(talk, marked).labels] == own["assistant_masks"]


def test_every_token_but_the_first_can_be_supervised(messages: Messages, reader: Reader) -> None:
    example = _encode(messages(("Hi", "Hello."), system="Be kind."), reader, supervise="all")
    assert example.labels == [IGNORED, *example.ids[1:]]


def test_all_of_a_conversation_without_an_answer_can_be_supervised(reader: Reader) -> None:
    example = _encode([{"role": "user", "content": "Hi"}], reader, supervise="all")
    assert example.supervised == len(example.ids) - 1


class _Wrapping:
    """A tokenizer whose results are BatchEncodings of lists, as real ones give; `dict(...)` of them would differ."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, **options: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": list(self._inner(text, **options)["input_ids"])})


def test_a_tokenizer_that_returns_its_own_kind_of_mapping_gives_the_same(messages: Messages, reader: Reader) -> None:
    talk = messages(("Hi", "Hello."))
    assert _encode(talk, replace(reader, tokenizer=_Wrapping(reader.tokenizer))) == _encode(talk, reader)


# --- padding and ends -------------------------------------------------------------------------------------------------


def test_padding_is_masked_by_length_although_it_is_the_end_token(messages: Messages, reader: Reader) -> None:
    assert reader.tokenizer.pad_token_id == reader.tokenizer.eos_token_id == END
    examples = [_encode(messages(("Hi", text)), reader) for text in ("A", "A much longer answer", "Medium")]
    batch = CHAT.collate(examples, END)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, example in enumerate(examples):
        length = len(example.ids)
        assert batch["labels"][row].tolist() == example.labels + [IGNORED] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        last = int((batch["labels"][row] != IGNORED).nonzero()[-1])
        assert batch["labels"][row, last] == END


def test_the_first_token_is_never_a_label(messages: Messages, reader_of: MakeReader) -> None:
    # It has no prediction: counted as supervised, it would be in the weight and not in the sum.
    bare = reader_of(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    example = _encode(messages(("Hi", "abc")), bare, supervise="all")
    assert example.labels == [IGNORED, *example.ids[1:]]
    assert example.supervised == 3


# --- what is refused --------------------------------------------------------------------------------------------------


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_and_the_token_named(
    messages: Messages, reader_of: MakeReader
) -> None:
    reader = reader_of(THINKING)
    talk = messages(("Hi", "<think>hm</think>Hello."), ("Who?", "Me."))
    at = len(render(reader.tokenizer, talk[:1], prompt=True))
    with pytest.raises(
        DataError, match=rf"turn 1: .*not a prefix of the conversation from token {at} on .*'<th' became 'Hel'"
    ):
        _encode(talk, reader)


def test_a_template_that_opens_an_answer_otherwise_than_it_writes_one_is_refused(
    messages: Messages, reader_of: MakeReader
) -> None:
    opening = reader_of(reader_of().tokenizer.chat_template.replace("assistant\n{%", "assistant\n<think>{%"))
    with pytest.raises(DataError, match=r"turn 1: .*not a prefix of the conversation .*'<th' became 'Hel'"):
        _encode(messages(("Hi", "Hello.")), opening)


def test_the_last_turn_of_such_a_template_can_be_supervised(messages: Messages, reader_of: MakeReader) -> None:
    reader = reader_of(THINKING)
    talk = messages(("Hi", "<think>hm</think>Hello."), ("Who?", "<think>me</think>Me."))
    assert _supervised(_encode(talk, reader, supervise="last"), reader) == "<think>me</think>Me.<|im_end|>"


def test_a_template_that_ends_a_turn_without_a_stop_token_is_refused(messages: Messages, reader_of: MakeReader) -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(
        DataError, match=r"turn 1: .*stop token \('<\|im_end\|>'\), so the model would not learn to stop"
    ):
        _encode(messages(("Hi", "Hello.")), reader_of(plain))


def test_a_stop_token_of_the_generation_settings_counts(messages: Messages, reader: Reader) -> None:
    (newline,) = reader.tokenizer("\n", add_special_tokens=False)["input_ids"]
    example = _encode(messages(("Hi", "Hello.")), replace(reader, stops=frozenset({newline})))
    assert _supervised(example, reader) == "Hello.<|im_end|>\n"


def test_a_template_that_begins_twice_is_refused(messages: Messages, reader_of: MakeReader) -> None:
    with pytest.raises(DataError, match=r"begins with '<\|im_start\|>' twice"):
        _encode(messages(("Hi", "Hello.")), reader_of("{{ bos_token }}" + reader_of().tokenizer.chat_template))


def test_a_tokenizer_that_adds_a_beginning_adds_none_to_the_templates(
    messages: Messages, reader_of: MakeReader
) -> None:
    reader = reader_of()
    reader.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    assert reader.tokenizer("x")["input_ids"][0] == START  # it would
    ids = _encode(messages(("Hi", "Hello.")), reader).ids
    assert ids[0] == START
    assert ids[1] != START


def test_a_template_that_never_stops_is_refused_even_where_all_of_it_is_supervised(
    messages: Messages, reader_of: MakeReader
) -> None:
    endless = reader_of("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match="would not learn to stop"):
        _encode(messages(("Hi", "Hello.")), endless, supervise="all")


def test_a_base_without_a_chat_template_is_refused(messages: Messages, reader_of: MakeReader) -> None:
    reader = reader_of()
    reader.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        _encode(messages(("Hi", "Hello.")), reader)


@pytest.mark.parametrize(
    ("talk", "told"),
    [
        ([], "`messages` is empty"),
        ("Hello", "must be a list"),
        ([{"role": "user"}], "must be a list"),
        (["Hello"], "must be a list"),
        ([{"role": 7, "content": "Hi"}], "`role` is not a text"),
        ([{"role": "user", "content": 7}], "`content` is not a text"),
        ([{"role": "user", "content": None}], "`content` is not a text"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}], "the assistant is empty"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "`content` is not a text"),
        (None, "must be a list"),
        ([{"role": "user", "content": "Hi"}], "no assistant turn"),
        ([{"role": "assistant", "content": "Hi"}], "begins with the assistant"),
        (
            [
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hi"},
            ],
            "begins with the assistant",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_a_problem_of_that_row(talk: Any, told: str, reader: Reader) -> None:
    with pytest.raises(RowProblem, match=told):
        _encode(talk, reader)


def test_a_row_that_the_template_refuses_is_a_problem_of_that_row(messages: Messages, reader_of: MakeReader) -> None:
    reader = reader_of("{{ raise_exception('Roles must alternate\nreally') }}")
    with pytest.raises(RowProblem, match=r"the chat template refuses it: Roles must alternate$"):
        _encode(messages(("Hi", "Hello.")), reader)


# --- long conversations -----------------------------------------------------------------------------------------------


def test_a_long_conversation_is_an_error_unless_told_otherwise(messages: Messages, reader_of: MakeReader) -> None:
    talk = messages(("Hi", "Hello."))
    length = len(_encode(talk, reader_of()).ids)
    assert len(_encode(talk, reader_of(limit=length)).ids) == length
    with pytest.raises(DataError, match=rf"{length} tokens, and max_length is {length - 1}: raise max_length"):
        _encode(talk, reader_of(limit=length - 1))


def test_a_long_conversation_can_be_dropped(messages: Messages, reader_of: MakeReader) -> None:
    with pytest.raises(RowProblem, match=r"^too long: above 20 tokens$"):
        _encode(messages(("Hi", "Hello.")), reader_of(limit=20), too_long="drop")


def test_the_end_of_a_long_conversation_can_be_cut(messages: Messages, reader_of: MakeReader) -> None:
    talk = messages(("Hi", "Hello."))
    whole = _encode(talk, reader_of())
    limit = len(whole.ids) - 4
    cut = _encode(talk, reader_of(limit=limit), too_long="cut-right")
    assert (cut.ids, cut.labels, cut.cut) == (whole.ids[:limit], whole.labels[:limit], 4)


def test_the_beginning_of_a_long_conversation_can_be_cut_behind_its_first_token(
    messages: Messages, reader_of: MakeReader
) -> None:
    talk = messages(("Hi", "Hello."), ("Who?", "Me."))
    whole = _encode(talk, reader_of())
    cut = _encode(talk, reader_of(limit=20), too_long="cut-left")
    assert cut.ids == [START, *whole.ids[-19:]]
    assert cut.labels == [IGNORED, *whole.labels[-19:]]
    assert cut.cut == len(whole.ids) - 20


def test_a_cut_that_makes_a_supervised_token_the_first_takes_its_label(
    messages: Messages, reader_of: MakeReader
) -> None:
    bare = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    example = _encode(messages(("Hi", "abcdef")), reader_of(bare, limit=4), too_long="cut-left")
    assert example.labels == [IGNORED, *example.ids[1:]]
    assert example.supervised == 3


def test_the_windows_of_a_long_conversation_supervise_each_token_once(
    messages: Messages, reader_of: MakeReader
) -> None:
    talk = messages(("Hi", "A rather long answer"), ("Who?", "And another that is long"), ("So", "Yes"))
    whole = _encode(talk, reader_of())
    windows = _pieces(talk, reader_of(limit=24), too_long="window")
    assert len(windows) > 2
    assert all(len(window.ids) <= 24 and window.labels[0] == IGNORED and window.row == 7 for window in windows)
    said = [label for window in windows for label in window.labels if label != IGNORED]
    assert said == [label for label in whole.labels if label != IGNORED]


def test_a_cut_that_leaves_nothing_to_learn_is_a_problem_of_the_row(messages: Messages, reader_of: MakeReader) -> None:
    with pytest.raises(RowProblem, match="nothing supervised is left after cutting"):
        _encode(messages(("A question that is long", "Hello.")), reader_of(limit=10), too_long="cut-right")


# --- tools ------------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"town": "Bonn"}}}
KNOWS_TOOLS = (
    "{% if tools %}<|im_start|>tools{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}"
    "<call>{{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _calling(call: Any = CALL, **more: Any) -> list[Any]:
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [call], **more},
        {"role": "tool", "name": "sky", "content": "clear"},
        {"role": "assistant", "content": "No."},
    ]


def test_calls_of_tools_are_supervised_and_what_tools_say_is_not(reader_of: MakeReader) -> None:
    reader = reader_of(KNOWS_TOOLS)
    example = _encode(_calling(), reader, tools=TOOLS)
    assert _supervised(example, reader) == '<call>sky{"town": "Bonn"}<|im_end|>No.<|im_end|>'
    text = reader.tokenizer.decode(example.ids)
    assert text.startswith('<|im_start|>tools{"type": "function"')
    assert "<|im_start|>tool\nclear<|im_end|>" in text


@pytest.mark.parametrize(
    "messages",
    [
        _calling(content=None),
        _calling({"type": "function", "function": {"name": "sky", "arguments": '{"town": "Bonn"}'}}),
        _calling({"name": "sky", "arguments": {"town": "Bonn"}}),
        [{"tool_calls": None, "name": None, **message} for message in _calling()],
    ],
    ids=["no content", "arguments as JSON text", "without `function`", "a table's empty cells"],
)
def test_calls_may_be_written_as_people_write_them(messages: list[Any], reader_of: MakeReader) -> None:
    reader = reader_of(KNOWS_TOOLS)
    assert _encode(messages, reader, tools=TOOLS) == _encode(_calling(), reader, tools=TOOLS)


def test_tools_may_be_json_text(reader_of: MakeReader) -> None:
    reader = reader_of(KNOWS_TOOLS)
    assert _encode(_calling(), reader, tools=json.dumps(TOOLS)) == _encode(_calling(), reader, tools=TOOLS)


@pytest.mark.parametrize("tools", [None, [], ""])
def test_a_row_may_have_no_tools(messages: Messages, reader_of: MakeReader, tools: Any) -> None:
    talk = messages(("Hi", "Hello."))
    row = {"messages": talk, "tools": tools}
    (example,) = CHAT.encode(7, row, reader_of(KNOWS_TOOLS))
    assert example == _encode(talk, reader_of(KNOWS_TOOLS))


@pytest.mark.parametrize(
    ("messages", "tools", "told"),
    [
        (_calling({"function": {}}), TOOLS, "a tool call must be"),
        (_calling("sky()"), TOOLS, "a tool call must be"),
        (_calling({"name": "sky", "arguments": "town=Bonn"}), TOOLS, "not JSON"),
        (_calling({"name": "sky", "arguments": ["Bonn"]}), TOOLS, "not an object"),
        (_calling(), "sky", "`tools`: not JSON"),
        (_calling(), ["sky"], "`tools` must be a list"),
    ],
)
def test_a_row_with_broken_tools_is_a_problem_of_that_row(
    messages: list[Any], tools: Any, told: str, reader_of: MakeReader
) -> None:
    with pytest.raises(RowProblem, match=told):
        _encode(messages, reader_of(KNOWS_TOOLS), tools=tools)


def test_a_template_that_leaves_tools_out_is_refused(messages: Messages, reader: Reader) -> None:
    with pytest.raises(DataError, match="the chat template ignores `tools`"):
        _encode(messages(("Hi", "Hello.")), reader, tools=TOOLS)
    with pytest.raises(DataError, match="the chat template ignores `tool_calls`"):
        _encode(_calling(), reader)


# --- answers that are scored ------------------------------------------------------------------------------------------


def test_the_last_answer_is_generated_from_what_is_before_it(messages: Messages, reader: Reader) -> None:
    talk = messages(("Hi", "Hello."), ("Who?", " Me. "), system="Be kind.")
    example = _encode(talk, reader, metrics=["exact-match"])
    assert isinstance(example, AnswerExample)
    assert example.prompt == render(reader.tokenizer, talk[:-1], prompt=True)
    assert example.references == ["Me."]
    without = _encode(talk, reader)
    assert isinstance(without, AnswerExample)
    assert (without.prompt, without.references) == ([], [])


def test_a_call_is_scored_as_it_is_written(reader_of: MakeReader) -> None:
    example = _encode(_calling()[:2], reader_of(KNOWS_TOOLS), tools=TOOLS, metrics=["exact-match"])
    assert isinstance(example, AnswerExample)
    assert example.references == ['<call>sky{"town": "Bonn"}']


def test_a_row_in_windows_is_answered_once(messages: Messages, reader_of: MakeReader) -> None:
    talk = messages(("Hi", "A rather long answer"), ("Who?", "And another that is long"))
    windows = _pieces(talk, reader_of(limit=24), too_long="window", metrics=["exact-match"])
    assert len(windows) > 1
    prompts = [window.prompt for window in windows if isinstance(window, AnswerExample)]
    whole = render(reader_of().tokenizer, talk[:-1], prompt=True)
    assert prompts == [[]] * (len(windows) - 1) + [[START, *whole[-23:]]]


def test_scores_come_from_answers_and_tokens(messages: Messages, reader: Reader) -> None:
    task = Chat(data="rows.jsonl", metrics=["exact-match"])
    answers = [Answer("Me.", ["Me."]), Answer("You", ["Me."])]
    scores = task.scores([(1, 4, 4.0), (1, 4, 12.0)], answers, reader)
    assert scores == {"exact_match": 0.5, "token_accuracy": 0.25, "perplexity": pytest.approx(math.exp(2))}
    assert list(task.measures()) == ["exact_match", "loss", "token_accuracy", "perplexity"]
    assert set(task.measures()) == {"loss", *scores}
    assert task.details([], answers, reader)["answers"][1] == {"predicted": "You", "right": ["Me."]}
    assert task.details([], (), reader) == {}


# --- the objective ----------------------------------------------------------------------------------------------------


def _dense(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _WithoutChoice(nn.Module):
    """A model that gives all logits whether one wants them or not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("wrap", [lambda model: model, _WithoutChoice], ids=["chosen logits", "all logits"])
def test_the_objective_is_the_dense_cross_entropy(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    examples = _all(rows, reader)
    assert len({len(example.ids) for example in examples}) > 3
    batch = CHAT.collate(examples, END)
    expected = _dense(model, batch)
    expected_gradients = _gradients(model, expected)
    objective = CHAT.objective(wrap(model), batch)
    assert objective.weight == sum(example.supervised for example in examples)
    assert objective.total.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = _gradients(model, objective.total)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-5 * expected_gradients[name].norm(), name


def test_the_objective_is_the_same_whatever_fills_up_the_rows(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader
) -> None:
    examples = _all(rows, reader)
    totals = [CHAT.objective(model, CHAT.collate(examples, pad)).total.item() for pad in (END, 77)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


def test_low_precision_logits_are_widened_before_the_loss(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader
) -> None:
    batch = CHAT.collate(_all(rows[:1], reader), END)
    assert CHAT.objective(model.bfloat16(), batch).total.dtype == torch.float32


def test_tokens_that_the_model_would_have_said_are_counted(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader
) -> None:
    batch = CHAT.collate(_all(rows, reader), END)
    with torch.no_grad():
        said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
    targets = batch["labels"][:, 1:]
    right = int(((said == targets) & (targets != IGNORED)).sum())
    objective = CHAT.objective(model, batch)
    tokens = int((targets != IGNORED).sum())
    assert objective.outcomes() == [(right, tokens, pytest.approx(objective.total.item(), rel=1e-6))]
    scores = CHAT.scores(objective.outcomes(), (), reader)
    assert scores["token_accuracy"] == right / tokens
    assert scores["perplexity"] == pytest.approx(math.exp(objective.total.item() / tokens), rel=1e-6)


def test_the_objective_is_the_models_own_loss(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader
) -> None:
    batch = CHAT.collate(_all(rows, reader), END)
    own = model(**batch).loss
    expected = _gradients(model, own)
    objective = CHAT.objective(model, batch)
    assert objective.total.item() / objective.weight == pytest.approx(own.item(), rel=1e-6)
    for name, gradient in _gradients(model, objective.total / objective.weight).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_smoothed_labels_are_torchs_and_leave_the_perplexity_alone(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader
) -> None:
    batch = CHAT.collate(_all(rows, reader), END)
    smooth = Chat(data="rows.jsonl", label_smoothing=0.2).objective(model, batch)
    assert smooth.total.item() == pytest.approx(_dense(model, batch, label_smoothing=0.2).item(), rel=1e-6)
    assert smooth.total.item() != pytest.approx(_dense(model, batch).item(), rel=1e-3)
    assert smooth.outcomes() == CHAT.objective(model, batch).outcomes()


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_smoothing_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        Chat(data="rows.jsonl", label_smoothing=share)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_split_into_batches_changes_nothing(
    model: PreTrainedModel, rows: list[dict[str, Any]], reader: Reader, size: int
) -> None:
    examples = _all(rows, reader)
    whole = CHAT.objective(model, CHAT.collate(examples, END))
    parts = [
        CHAT.objective(model, CHAT.collate(examples[start : start + size], END))
        for start in range(0, len(examples), size)
    ]
    assert sum(part.weight for part in parts) == whole.weight
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    scores = CHAT.scores([outcome for part in parts for outcome in part.outcomes()], (), reader)
    assert scores == pytest.approx(CHAT.scores(whole.outcomes(), (), reader), rel=1e-6)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_leaves_the_mode_of_the_model_alone(
    model: PreTrainedModel, messages: Messages, reader: Reader
) -> None:
    for training in (True, False):
        model.train(training)
        answer(model, reader, messages(("Hi", "x"))[:1], 2)
        assert {module.training for module in model.modules()} == {training}


def test_an_answer_is_as_long_as_allowed_at_most(model: PreTrainedModel, messages: Messages, reader: Reader) -> None:
    text = answer(model, reader, messages(("Hi", "x"))[:1], 3)
    assert (
        len(reader.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 9
    )  # three tokens, of a broken character each


def test_a_demonstration_asks_the_last_question_of_a_row(
    model: PreTrainedModel, messages: Messages, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def note(model: Any, reader: Reader, before: Sequence[Any], tokens: int, *, tools: Any) -> str:
        asked.extend(before)
        return "said"

    monkeypatch.setattr("onegpu.recipes.tasks.chat.answer", note)
    talk = messages(("Hi", "Hello."), ("Who?", "Me."))
    assert CHAT.demonstrate(model, reader, {"messages": talk}) == ("Who?", "said")
    assert asked == talk[:3]


def test_an_overfitted_model_gives_the_trained_answers_and_stops_by_itself(
    model: PreTrainedModel, messages: Messages, reader: Reader
) -> None:
    talks = [messages(pair) for pair in (("a", "Yes."), ("b", "No!"), ("c", "Perhaps"), ("d", "7"))]
    task = Chat(data="rows.jsonl", metrics=["exact-match"], answer_tokens=40)
    examples = _all([{"messages": talk} for talk in talks], reader, task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        objective = task.objective(model, task.collate(examples, END))
        optimizer.zero_grad()
        (objective.total / objective.weight).backward()
        optimizer.step()
    assert task.answer_scores(task.answer(model, examples, reader)) == {"exact_match": 1.0}
    for talk in talks:
        assert answer(model, reader, talk[:1], 40) == talk[1]["content"]
        ids = torch.tensor([render(reader.tokenizer, talk[:1], prompt=True)])
        generate: Any = model.generate
        out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert out[0, -1] == END
        assert out.shape[1] - ids.shape[1] < 40


# --- what a template leaves out, and what a model would never get to say ----------------------------------------------

ONLY_TWO_SIDES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_out_what_others_say_is_refused(
    role: str, reader: Reader, reader_of: MakeReader, messages: Messages
) -> None:
    talk = messages(("Hi", "Hello."), ("Who?", "Me."))
    said = [{"role": role, "content": "Be kind."}]
    whole = [*said, *talk] if role == "system" else [*talk[:1], *said, *talk[1:]]
    assert "Be kind." in reader.tokenizer.decode(_encode(whole, reader).ids)
    with pytest.raises(DataError, match=f"the chat template leaves out what '{role}' says"):
        _encode(whole, reader_of(ONLY_TWO_SIDES))
    assert _encode(talk, reader_of(ONLY_TWO_SIDES)).ids


def test_the_text_that_a_template_says_by_default_is_not_left_out(reader_of: MakeReader, messages: Messages) -> None:
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    with_default = reader_of(default + str(reader_of().tokenizer.chat_template))
    talk = messages(("Hi", "Hello."))
    assert (
        _encode([{"role": "system", "content": "Be kind."}, *talk], with_default).ids == _encode(talk, with_default).ids
    )


def test_an_answer_that_the_model_would_stop_in_is_told(reader: Reader, messages: Messages) -> None:
    with pytest.raises(RowProblem, match=r"turn 3: the answer holds '<\|im_end\|>', at which the model stops"):
        _encode(messages(("Hi", "Hello."), ("Who?", "Me.<|im_end|> And you?")), reader)
    _encode(messages(("What is <|im_end|>?", "A token.")), reader)  # in a question it is no matter
