import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import normalizers, processors

from onegpu.adapters import DataError
from onegpu.recipes.tasks import Reader, RowProblem
from onegpu.recipes.tasks.chat import render
from onegpu.recipes.tasks.conversations import Conversation
from onegpu.recipes.tasks.pairs import Continued, continued, fitted, read_pair

IGNORED = -100
START, END = 0, 1  # <|im_start|> and <|im_end|>

MakeReader = Callable[..., Reader]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


QUESTION, GOOD, BAD = [_user("2 + 2?")], [_assistant("4")], [_assistant("5")]


@pytest.fixture
def reader_of(reader: Reader) -> MakeReader:
    """`reader_of(template, limit=20)`: the reader with another chat template."""

    def build(template: str | None = None, **changes: Any) -> Reader:
        tokenizer = copy.deepcopy(reader.tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        return replace(reader, tokenizer=tokenizer, **changes)

    return build


def _talk(messages: list[dict[str, str]]) -> Conversation:
    return Conversation(messages)


def _messages(row: dict[str, Any]) -> list[list[Any]]:
    """Of prompt, chosen and rejected."""
    found = [said for said in read_pair(row) if isinstance(said, Conversation)]
    assert len(found) == 3
    return [list(said.messages) for said in found]


def _supervised(found: Continued, reader: Reader) -> str:
    assert all(label in (IGNORED, token) for label, token in zip(found.labels, found.ids, strict=True))
    return str(reader.tokenizer.decode([label for label in found.labels if label != IGNORED]))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"prompt": "2 + 2?", "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"prompt": QUESTION, "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
        {"prompt": None, "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
    ],
)
def test_a_prompt_is_found_wherever_it_is_written(row: dict[str, Any]) -> None:
    assert _messages(row) == [QUESTION, GOOD, BAD]


def test_conversations_are_split_after_the_last_turn_that_both_have() -> None:
    shared = [*QUESTION, *GOOD, _user("Sure?")]
    longer = [_assistant("No"), _user("So?"), _assistant("5")]
    row = {"chosen": [*shared, _assistant("Yes")], "rejected": shared + longer}
    assert _messages(row) == [shared, [_assistant("Yes")], longer]


def test_texts_stay_texts() -> None:
    assert read_pair({"prompt": "Q", "chosen": "A", "rejected": "B"}) == ("Q", "A", "B")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A"}, 'no "rejected"'),
        ({"chosen": "A", "rejected": "B"}, 'no "prompt"'),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": " ", "rejected": "A"}, "`chosen` is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": 3}, "`rejected` is neither a text nor messages"),
        ({"prompt": "Q", "chosen": "A", "rejected": [{"role": "user"}]}, "`rejected` is neither a text nor messages"),
        (
            {"prompt": "Q", "chosen": "A", "rejected": []},
            "`rejected` is neither a text nor messages: `messages` is empty",
        ),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "`prompt` is empty"),
        ({"prompt": QUESTION, "chosen": "A", "rejected": "B"}, "all texts or all lists of messages"),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": "B"}, "all texts or all lists of messages"),
        ({"chosen": GOOD, "rejected": BAD}, "no first turn in common"),
        ({"prompt": "2 + 2?", "chosen": GOOD, "rejected": BAD}, "no first turn in common"),
        ({"prompt": "Why?", "chosen": QUESTION + GOOD, "rejected": QUESTION + BAD}, "is not what both conversations"),
        ({"chosen": QUESTION + GOOD, "rejected": QUESTION + GOOD}, "chosen and rejected are the same"),
    ],
)
def test_a_row_that_is_no_pair_is_a_problem(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        read_pair(row)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_messages_are_rendered_as_in_chat_and_end_with_the_turn(reader: Reader) -> None:
    prompt = [{"role": "system", "content": "Count."}, *QUESTION]
    found = continued(_talk(prompt), _talk(GOOD), reader)
    whole = render(reader.tokenizer, prompt + GOOD)
    assert found.ids == whole[:-1]  # without the line break that the template writes after the end of a turn
    assert found.ids[-1] == END
    assert found.ids[: found.start] == render(reader.tokenizer, prompt, prompt=True)
    assert _supervised(found, reader) == "4<|im_end|>"


def test_of_a_longer_completion_only_the_assistant_is_supervised(reader: Reader) -> None:
    found = continued(_talk(QUESTION), _talk([*BAD, _user("Sure?"), _assistant("No: 4")]), reader)
    assert _supervised(found, reader) == "5<|im_end|>No: 4<|im_end|>"
    assert found.start == len(render(reader.tokenizer, QUESTION, prompt=True))


def test_texts_are_tokenised_one_by_one_with_the_end_after_them(reader: Reader) -> None:
    found = continued("2 + 2 =", " 4", reader)
    assert reader.tokenizer.decode(found.ids) == "2 + 2 = 4<|im_end|>"
    assert found.ids[: found.start] == reader.tokenizer("2 + 2 =")["input_ids"]
    assert _supervised(found, reader) == " 4<|im_end|>"
    assert continued("2 + 2 =", " 4<|im_end|>", reader) == found


def test_texts_begin_once_where_the_tokenizer_writes_a_beginning(reader_of: MakeReader) -> None:
    reader = reader_of()
    reader.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", START), ("<|im_end|>", END)]
    )
    for prompt in ("Q", "<|im_start|>Q"):
        found = continued(prompt, " A", reader)
        assert reader.tokenizer.decode(found.ids) == "<|im_start|>Q A<|im_end|>"
        assert (found.start, found.lead) == (2, 1)


def test_a_tokenizer_without_an_end_is_refused_for_texts(reader_of: MakeReader) -> None:
    reader = reader_of()
    reader.tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        continued("Q", "A", reader)


def test_a_prompt_without_tokens_predicts_nothing(reader_of: MakeReader) -> None:
    reader = reader_of()
    reader.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(RowProblem, match="the prompt has no tokens"):
        continued(" ", "A", reader)


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        (_talk(QUESTION + GOOD), _talk(BAD), "the prompt ends with the assistant"),
        (_talk(QUESTION), _talk([_user("What?")]), "does not begin with the assistant"),
        (_talk(QUESTION), _talk([]), "does not begin with the assistant"),
        (_talk(QUESTION), "4", "both texts or both lists"),
    ],
)
def test_a_completion_that_answers_nothing_is_a_problem(
    reader: Reader, prompt: Any, completion: Any, reason: str
) -> None:
    with pytest.raises(RowProblem, match=reason):
        continued(prompt, completion, reader)


def test_a_template_that_opens_answers_in_another_way_is_refused(reader_of: MakeReader) -> None:
    thinking = reader_of(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    with pytest.raises(DataError, match="turn 1: the rendered prompt is not a prefix"):
        continued(_talk(QUESTION), _talk(GOOD), thinking)


def test_a_template_that_never_ends_a_turn_is_refused(reader_of: MakeReader) -> None:
    endless = reader_of(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="turn 1: the chat template does not end an answer"):
        continued(_talk(QUESTION), _talk(GOOD), endless)


def test_tools_are_offered_in_the_prompt(reader_of: MakeReader) -> None:
    knows = reader_of(
        "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}"
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "tools": [{"function": {"name": "add"}}]}
    prompt, chosen, _ = read_pair(row)
    ids = continued(prompt, chosen, knows).ids
    assert knows.tokenizer.decode(ids) == "add;user:2 + 2?<|im_end|>assistant:4<|im_end|>"


# --- lengths ----------------------------------------------------------------------------------------------------------


def _both(reader: Reader) -> list[Continued]:
    return [continued("A prompt of many words", completion, reader) for completion in (" yes", " certainly not")]


def test_what_fits_is_left_alone(reader: Reader) -> None:
    both = _both(reader)
    assert fitted(both, replace(reader, limit=len(both[1].ids)), "error") == (both, 0)


def test_the_same_part_of_the_prompt_is_cut_from_both(reader: Reader) -> None:
    both = _both(reader)
    cut, lost = fitted(both, replace(reader, limit=len(both[1].ids) - 9), "cut-left")
    assert lost == 9
    assert [reader.tokenizer.decode(one.ids) for one in cut] == [
        "of many words yes<|im_end|>",
        "of many words certainly not<|im_end|>",
    ]
    assert [_supervised(one, reader) for one in cut] == [" yes<|im_end|>", " certainly not<|im_end|>"]
    assert [one.start for one in cut] == [13, 13]


def test_a_beginning_stays_when_the_prompt_is_cut(reader: Reader) -> None:
    found = continued("<|im_start|>A prompt", " yes", reader)
    (cut,), lost = fitted([found], replace(reader, limit=len(found.ids) - 2), "cut-left")
    assert (lost, reader.tokenizer.decode(cut.ids)) == (2, "<|im_start|>prompt yes<|im_end|>")


def test_too_long_is_an_error_or_drops_the_row(reader: Reader) -> None:
    short = replace(reader, limit=30)
    with pytest.raises(DataError, match=r"37 tokens, and max_length is 30: .* \(drop, cut-left\)"):
        fitted(_both(reader), short, "error")
    with pytest.raises(RowProblem, match="too long: above 30 tokens"):
        fitted(_both(reader), short, "drop")


def test_a_prompt_is_never_cut_away_whole(reader: Reader) -> None:
    longest = len(" certainly not") + 1
    (_, cut), _ = fitted(_both(reader), replace(reader, limit=longest + 1), "cut-left")
    assert reader.tokenizer.decode(cut.ids) == "s certainly not<|im_end|>"
    with pytest.raises(RowProblem, match="no room for a prompt"):
        fitted(_both(reader), replace(reader, limit=longest), "cut-left")
