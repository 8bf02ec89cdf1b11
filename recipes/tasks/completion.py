"""`completion`: a causal language model that continues a prompt.

One row: {"prompt": "Translate to German: Good morning", "completion": "Guten Morgen"}

Prompt and completion become tokens separately, and their tokens are joined: so what is trained on begins with exactly
the tokens that the same prompt has at inference, whatever the completion is. (Tokenised as one text, the last token of
the prompt can depend on the first letter of the completion.) The space between them belongs to one of the two texts;
most tokenizers learned words with the space in front. The beginning token stands first, once, where the tokenizer
itself adds one; the end token is supervised.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from .answering import generate_texts
from .beginnings import check_begins
from .causal import CausalTask, answerable_examples, pieces
from .contract import IGNORED, Example, Reader, Row, TooLong
from .conversations import Conversation, assistant_spans, check_says_all
from .texts import around, end_of, read_text, token_ids

__all__ = ["Completion"]

POLICIES: tuple[TooLong, ...] = ("error", "drop", "cut-left", "cut-right")


class Completion(CausalTask):
    """Fine-tune on prompts and how they go on; loss on the completion and its end."""

    api = 1
    version: ClassVar[int] = 2
    needs = ("prompt", "completion")

    chat: bool = False
    """Render with the chat template: the prompt is the user's message, the completion the assistant's."""

    too_long: Literal["error", "drop", "cut-left", "cut-right"] = "error"
    """What to do above `max_length`; `cut-left` cuts the prompt first, `cut-right` the end of the completion."""

    def check(self, reader: Reader) -> None:
        """With `chat`, prompts are rendered by the chat template of the base."""
        if self.chat:
            check_says_all(reader.tokenizer)
            check_begins(reader.tokenizer)

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Example]:
        said = read_text(row, "completion")
        prompt = self._prompt(row, reader)
        own = self._completion(number, row, prompt, reader)
        ids, labels = [*prompt, *own], [*[IGNORED] * len(prompt), *own]
        found = pieces(number, ids, labels, reader, self.too_long, POLICIES)
        references = [said.strip()] if self.metrics else []
        return answerable_examples(number, found, reader, prompt=prompt if self.metrics else [], references=references)

    def _prompt(self, row: Row, reader: Reader) -> list[int]:
        """The tokens that an answer follows, in training and in generation."""
        text, tokenizer = read_text(row, "prompt"), reader.tokenizer
        if self.chat:
            return Conversation([{"role": "user", "content": text}]).ids(tokenizer, prompt=True)
        before, _ = around(tokenizer)
        ids = token_ids(tokenizer, text)
        return ids if ids[: len(before)] == before else [*before, *ids]

    def _completion(self, number: int, row: Row, prompt: Sequence[int], reader: Reader) -> list[int]:
        """The tokens of the completion, up to and including the one that ends it."""
        tokenizer = reader.tokenizer
        if not self.chat:
            end = end_of(tokenizer)
            ids = token_ids(tokenizer, row["completion"])
            return ids if ids[-1:] == [end] else [*ids, end]
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        talk = Conversation(turns)
        rendered = talk.ids(tokenizer)
        ((start, stop),) = assistant_spans(reader, talk, rendered, last_only=True)
        assert start == len(prompt)
        return rendered[start:stop]

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        prompt: Any = row["prompt"]
        return prompt, generate_texts(model, [self._prompt(row, reader)], reader, tokens=self.answer_tokens)[0]
