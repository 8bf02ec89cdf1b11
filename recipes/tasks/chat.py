"""`chat`: a causal language model on conversations.

One row: {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]}

With tools: {"messages": [{"role": "user", "content": "Is it raining?"},
                          {"role": "assistant", "tool_calls": [{"function": {"name": "sky", "arguments": {}}}]},
                          {"role": "tool", "name": "sky", "content": "clear"},
                          {"role": "assistant", "content": "No."}],
             "tools": [{"type": "function", "function": {"name": "sky", "description": "...", "parameters": {...}}}]}

Supervision is found by prefix difference: what a turn of the assistant adds to the rendered conversation before it is
supervised, up to and including the token that ends the turn. Positions decide, never token ids or marker strings, so
it works with any chat template, and where the padding token is the end token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from onegpu.adapters import DataError

from .answering import generate_texts
from .beginnings import check_begins
from .causal import CausalTask, answerable_examples, pieces
from .contract import IGNORED, Example, Reader, Row, TooLong
from .conversations import (
    Conversation,
    Message,
    Span,
    assistant_spans,
    assistant_turns,
    check_says_all,
    check_template,
    read_conversation,
    render,
)

__all__ = ["Chat", "answer", "render"]

POLICIES: tuple[TooLong, ...] = ("error", "drop", "cut-left", "cut-right", "window")


class Chat(CausalTask):
    """Fine-tune on conversations; loss on what the assistant says."""

    api = 1
    version: ClassVar[int] = 3
    needs = ("messages",)
    optional = ("tools",)

    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Every turn of the assistant, only the last one, or every token but the first."""

    too_long: TooLong = "error"
    """What to do with a conversation above `max_length`."""

    def check(self, reader: Reader) -> None:
        """Conversations are rendered by the chat template of the base."""
        check_says_all(reader.tokenizer)
        check_begins(reader.tokenizer)

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Example]:
        talk = read_conversation(row)
        check_template(reader.tokenizer, talk)
        ids = talk.ids(reader.tokenizer)
        spans = self._spans(number, talk, ids, reader)
        labels = list(ids) if self.supervise == "all" else [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        found = pieces(number, ids, labels, reader, self.too_long, POLICIES)
        start, end = spans[-1] if self.metrics else (0, 1)
        # The reference is what the model would have to write: some templates change an answer, or add to it.
        right = reader.tokenizer.decode(ids[start : end - 1], skip_special_tokens=True).strip()
        references = [right] if self.metrics else []
        return answerable_examples(number, found, reader, prompt=ids[:start], references=references)

    def _spans(self, number: int, talk: Conversation, ids: Sequence[int], reader: Reader) -> list[Span]:
        """Where the assistant's turns are, as far as anybody asks."""
        if self.supervise == "all" and not self.metrics:
            if not reader.stops.intersection(ids):
                stops = reader.tokenizer.decode(sorted(reader.stops))
                raise DataError(
                    f"the chat template writes no stop token ({stops!r}), so the model would not learn to stop"
                )
            return []
        return assistant_spans(reader, talk, ids, last_only=self.supervise != "assistant")

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        talk = read_conversation(row)
        before = talk.messages[: assistant_turns(talk)[-1]]
        question = next((str(m["content"]) for m in reversed(before) if m["role"] == "user"), "")
        return question, answer(model, reader, before, self.answer_tokens, tools=talk.tools)


def answer(
    model: Any,
    reader: Reader,
    messages: Sequence[Message],
    tokens: int,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The model's greedy answer to a conversation."""
    prompt = render(reader.tokenizer, messages, prompt=True, tools=tools)
    return generate_texts(model, [prompt], reader, tokens=tokens)[0]
