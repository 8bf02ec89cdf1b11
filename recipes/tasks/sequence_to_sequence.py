"""`sequence-to-sequence`: a text from a text, by an encoder-decoder: translation, summaries.

One row: {"source": "Save As...", "target": "Speichern unter..."}

The encoder reads the source as its tokenizer writes it. The labels are the target's tokens and the end token; what the
decoder is given are the labels, shifted by one as the model itself shifts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field
from torch import nn

from onegpu.adapters import DataError, RecipeError

from .answering import Answer, AnswerExample, AnsweringTask, answers_to, generate_texts, text_measures
from .contract import (
    IGNORED,
    Batch,
    Direction,
    Example,
    Objective,
    Predictions,
    Reader,
    Row,
    RowProblem,
    TooLong,
    attention_mask,
    model_inputs,
    padded,
)
from .lengths import refuse_too_long
from .texts import around, read_text, token_ids
from .tokens import TokenTask, own_logits, token_objective, token_scores

__all__ = ["Pair", "SequenceToSequence"]


POLICIES: Sequence[TooLong] = ("error", "drop", "cut-left", "cut-right")


@dataclass(frozen=True)
class Pair(AnswerExample):
    """`ids` are the source's tokens, which are answered; `labels` the target's."""

    @property
    def size(self) -> int:
        return len(self.ids) + len(self.labels)


class SequenceToSequence(TokenTask, AnsweringTask):
    """Fine-tune an encoder-decoder (T5, BART, two encoders) to write the target where it reads the source."""

    api = 1
    kind = "sequence-to-sequence"
    example = Pair
    needs = ("source", "target")

    too_long: Literal["error", "drop", "cut-left", "cut-right"] = "error"
    """What to do with a source above `max_length`, or a target above `max_target_length`."""

    max_target_length: int | None = Field(default=None, ge=2)
    """Longest target in tokens, its end included; as the source when left out."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567, section 7)."""

    def measures(self) -> dict[str, Direction]:
        return text_measures(self.metrics) | {"loss": "lower", "token_accuracy": "higher", "perplexity": "lower"}

    def check(self, reader: Reader) -> None:
        if _end(reader.tokenizer) is None:
            raise RecipeError("the base's tokenizer has no end token, so the model would not learn to stop")

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Pair]:
        target = read_text(row, "target")
        ids, cut = self._source_ids(number, read_text(row, "source"), reader)
        labels, cut_target = self._target_ids(number, target, reader)
        return [Pair(number, ids, labels, cut + cut_target, references=[target.strip()])]

    def _source_ids(self, number: int, text: str, reader: Reader) -> tuple[list[int], int]:
        """The tokens that the encoder reads, and how many were cut."""
        before, after = around(reader.tokenizer)
        found = token_ids(reader.tokenizer, text)
        room = reader.limit - len(before) - len(after)
        refuse_too_long(len(found) - room + reader.limit, reader.limit, self.too_long, POLICIES)
        kept = self._kept(found, room)
        return [*before, *kept, *after], len(found) - len(kept)

    def _target_ids(self, number: int, text: str, reader: Reader) -> tuple[list[int], int]:
        """The tokens that the decoder is to write, its end token last, and how many were cut."""
        before, found, after = _target(reader.tokenizer, text)
        limit = self.max_target_length or reader.limit
        room = limit - len(before) - len(after)
        if len(found) > room and self.too_long == "error":
            raise DataError(
                f"its target has {len(found) - room + limit} tokens, and max_target_length is {limit}: "
                "raise it, or set `too_long` (drop, cut-left, cut-right)"
            )
        if len(found) > room and self.too_long == "drop":
            raise RowProblem(f"target too long: above {limit} tokens")
        kept = self._kept(found, room)
        return [*before, *kept, *after], len(found) - len(kept)

    def _kept(self, ids: list[int], room: int) -> list[int]:
        if room < 1:
            raise RecipeError("the length leaves no room beside the special tokens: raise it")
        return ids[-room:] if self.too_long == "cut-left" else ids[:room]

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return {
            "input_ids": padded([e.ids for e in examples], pad),
            "attention_mask": attention_mask(examples),
            "labels": padded([e.labels for e in examples], IGNORED),
        }

    def reads(self, model: nn.Module, batch: Batch) -> Batch:
        """The decoder needs no mask of its own: it looks to the left only, where no padding is."""
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise RecipeError(f"{type(model).__name__} does not say where its decoder starts, so it cannot be trained")
        return model_inputs(batch) | {"decoder_input_ids": shift(batch["labels"])}

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        return own_logits(model, batch | self.reads(model, batch), self._arithmetic)

    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """Summed cross-entropy of the target's tokens, in float32; the weight is how many there are."""
        return token_objective(found, self.label_smoothing)

    def answer(self, model: nn.Module, examples: Sequence[Example], reader: Reader) -> Sequence[Answer]:
        if not self.metrics:
            return ()
        pairs = cast(Sequence[Pair], examples)
        return answers_to(model, pairs, reader, tokens=self.answer_tokens, encoder=True)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        return self.answer_scores(answers) | token_scores(outcomes)

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        (pair,) = self.encode(0, row, reader)
        (said,) = generate_texts(model, [pair.ids], reader, tokens=self.answer_tokens)
        return str(row["source"]), said

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        return [(reader.tokenizer.decode(example.ids), None), (reader.tokenizer.decode(example.labels), "")]

    def probe(self, example: Example, tokens: int) -> dict[str, list[int]]:
        return {"input_ids": example.ids[:tokens], "decoder_input_ids": example.labels[:tokens]}


def _target(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """What comes before a target (a language's token, <s>), its own tokens, and what ends it.

    A decoder made of a BERT starts at [CLS]: a label [CLS] would make it start twice.
    """
    found: list[int] = tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer(text_target=text, verbose=False)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(found)] == found), 0)
    before, after = whole[:start], whole[start + len(found) :]
    if before == [tokenizer.cls_token_id] and tokenizer.bos_token_id is None:
        before = []
    end = _end(tokenizer)
    assert end is not None  # see `check`
    return before, found, after if end in after else [*after, end]


def _end(tokenizer: Any) -> int | None:
    """The token that ends a text; BERT's has another name."""
    end: int | None = tokenizer.eos_token_id
    return tokenizer.sep_token_id if end is None else end
