"""Scoring by generation: the model answers held-out prompts, greedily, and texts are compared.

Prompts are sorted by length and answered in batches of a fixed size, so the scores do not depend on how an evaluation
is batched otherwise. A decoder's prompts are padded on the left, an encoder's inputs on the right; transformers counts
positions from the attention mask, so padding moves nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import GenerationConfig

from ..evaluation import evaluating
from .contract import Direction, Example, PredictiveTask, Reader

__all__ = [
    "Answer",
    "AnswerExample",
    "AnsweringTask",
    "Metric",
    "Tokeniser",
    "answers_to",
    "generate_texts",
    "prompt_within",
    "text_measures",
    "text_scores",
]

Metric = Literal["exact-match", "token-f1", "bleu", "chrf", "rouge"]
Tokeniser = Literal["13a", "zh", "char"]

TOGETHER = 16  # prompts per batch of generation; fixed, so that scores do not depend on the evaluation's batches
SHOWN = 5  # answers in an evaluation's details
SCORES: dict[Metric, tuple[str, ...]] = {
    "exact-match": ("exact_match",),
    "token-f1": ("token_f1",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rougeL", "rouge1", "rouge2"),
}


@dataclass(frozen=True)
class AnswerExample(Example):
    """An example that can be answered: only one window of a row has a prompt, so a row is answered once."""

    prompt: list[int] = field(default_factory=list)  # tokens that the answer follows; none: not answered
    references: list[str] = field(default_factory=list)  # the right answers


@dataclass(frozen=True)
class Answer:
    """What the model said, and what would have been right."""

    prediction: str
    references: Sequence[str]


class AnsweringTask(PredictiveTask):
    """A task that may also be scored by what the model generates."""

    example = AnswerExample

    metrics: list[Metric] = []
    """Scores of generated answers; an evaluation generates only where one is named."""

    answer_tokens: int = Field(default=64, ge=1)
    """Longest generated answer."""

    bleu_tokeniser: Tokeniser = "13a"
    """How `bleu` finds words: at spaces, for Chinese, or every character."""

    @model_validator(mode="after")
    def _reads_tokeniser(self) -> Self:
        if self.bleu_tokeniser != "13a" and "bleu" not in self.metrics:
            raise ValueError("`bleu_tokeniser` is for `metrics: [bleu]`; without it, it would be ignored")
        return self

    def answer(self, model: nn.Module, examples: Sequence[Example], reader: Reader) -> Sequence[Answer]:
        if not self.metrics:
            return ()
        return answers_to(model, cast(Sequence[AnswerExample], examples), reader, tokens=self.answer_tokens)

    def answer_scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Scores of `answer`; none where no metric is named."""
        return text_scores(self.metrics, answers, tokeniser=self.bleu_tokeniser)

    def details(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, Any]:
        """The first answers, for people to look at."""
        shown = [{"predicted": a.prediction, "right": list(a.references)} for a in answers[:SHOWN]]
        return {"answers": shown} if shown else {}


# --- generation -------------------------------------------------------------------------------------------------------


def answers_to(
    model: nn.Module, examples: Sequence[AnswerExample], reader: Reader, *, tokens: int, encoder: bool = False
) -> list[Answer]:
    """The model's greedy answers to the examples that have a prompt, in their order.

    Args:
        encoder: the prompts are the examples' `ids`, which an encoder-decoder's encoder reads.
    """
    asked = [example for example in examples if encoder or example.prompt]
    said = generate_texts(model, [e.ids if encoder else e.prompt for e in asked], reader, tokens=tokens)
    return [Answer(text, example.references) for text, example in zip(said, asked, strict=True)]


def generate_texts(model: nn.Module, prompts: Sequence[Sequence[int]], reader: Reader, *, tokens: int) -> list[str]:
    """What the model says after each prompt (decoder), or about each input (encoder-decoder); greedily, stripped.

    An answer ends at a stop token, after so many tokens, or where the model has no positions left.
    """
    said = [""] * len(prompts)
    with evaluating(model):
        for room, chosen in _batches(model, prompts, tokens):
            answers = _generate(model, [prompts[i] for i in chosen], reader, room)
            for i, ids in zip(chosen, answers, strict=True):
                said[i] = reader.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return said


def _batches(model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Prompts that are answered together, as their numbers, and how many tokens each answer may have."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike in length: hardly any padding
    positions = _positions(model)
    roomy = [i for i in order if len(prompts[i]) + tokens <= positions]
    for start in range(0, len(roomy), TOGETHER):
        yield tokens, roomy[start : start + TOGETHER]
    # The others have less room each, and must not take it from those that have enough.
    for i in order[len(roomy) :]:
        if len(prompts[i]) < positions:
            yield positions - len(prompts[i]), [i]


def _generate(model: Any, prompts: Sequence[Sequence[int]], reader: Reader, tokens: int) -> list[list[int]]:
    encodes = bool(model.config.is_encoder_decoder)
    pad = next((i for i in (reader.tokenizer.pad_token_id, reader.tokenizer.eos_token_id) if i is not None), 0)
    ids, mask = _side_by_side(prompts, pad, left=not encodes)
    device = next(model.parameters()).device
    with _greedy(model, max_new_tokens=tokens, eos_token_id=sorted(reader.stops) or None, pad_token_id=pad):
        out: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    # (prompts, longest + answer), or (prompts, 1 + answer) where the prompt went into an encoder
    new = out[:, 1 if encodes else ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in reader.stops), len(row))] for row in new]


@contextmanager
def _greedy(model: Any, **settings: Any) -> Iterator[None]:
    """The likeliest token each time, without the beams, penalties and least lengths that a base's authors set.

    They are replaced as a whole: what is given to a single call is only laid over them, and they would make scores of
    two bases incomparable.
    """
    own = model.generation_config
    start = own.decoder_start_token_id
    if start is None and model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id  # where a composed model has it
    kept = {"bos_token_id": own.bos_token_id, "decoder_start_token_id": start}
    model.generation_config = GenerationConfig(do_sample=False, num_beams=1, **kept, **settings)
    try:
        yield
    finally:
        model.generation_config = own


def _positions(model: Any) -> int:
    """How many tokens a decoder can number, prompt and answer together; without end where it does not say."""
    if model.config.is_encoder_decoder:
        return 2**31  # an answer has the decoder's positions to itself
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _side_by_side(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (prompts, longest) each, filled on one side."""
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), pad), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


def prompt_within(prompt: Sequence[int], limit: int, begin: int | None) -> list[int]:
    """A prompt of a row that may be cut: its end, after the token that every text begins with."""
    kept = list(prompt[-limit:])
    return [begin, *kept[1:]] if begin is not None and len(prompt) > limit and prompt[0] == begin else kept


# --- scores -----------------------------------------------------------------------------------------------------------


def text_measures(metrics: Sequence[Metric]) -> dict[str, Direction]:
    """The scores of these metrics; more is better with all of them."""
    return {score: "higher" for metric in metrics for score in SCORES[metric]}


def text_scores(
    metrics: Sequence[Metric], answers: Sequence[Answer], *, tokeniser: Tokeniser = "13a"
) -> dict[str, float]:
    """The scores that the metrics name: exact_match, token_f1 and rouge from 0 to 1, bleu and chrf from 0 to 100.

    Raises:
        DataError: metrics are named, and there are no answers.
    """
    predictions, references = [a.prediction for a in answers], [a.references for a in answers]
    found: dict[str, float] = {}
    # Each brings a library of its own, which only those wait for who want its scores.
    if {"exact-match", "token-f1"} & set(metrics):
        from ..metrics.answers import answer_scores

        found |= answer_scores(predictions, references)
    if {"bleu", "chrf"} & set(metrics):
        from ..metrics.translations import translation_scores

        found |= translation_scores(predictions, references, tokeniser=tokeniser)
    if "rouge" in metrics:
        from ..metrics.summaries import summary_scores

        found |= summary_scores(predictions, references)
    return {score: found[score] for score in text_measures(metrics)}
