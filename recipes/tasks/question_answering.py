"""`question-answering`: the words of a text that answer a question, or that there are none, by an encoder.

One row, as in SQuAD (https://arxiv.org/abs/1606.05250); empty lists where the text does not say
(https://arxiv.org/abs/1806.03822):

    {"question": "Who was here?", "context": "The cat was here.", "answers": {"text": ["The cat"], "answer_start": [0]}}

A long context is cut into windows that overlap, each behind the whole question. A window without the whole answer is
taught to point to its first token ([CLS]), as BERT was (https://arxiv.org/abs/1810.04805, section 4.3).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.adapters import RecipeError

from ..evaluation import evaluating, on_device
from .contract import (
    Batch,
    Direction,
    Example,
    Objective,
    Reader,
    Row,
    RowProblem,
    Task,
    attention_mask,
    model_inputs,
    padded,
)
from .lengths import refuse_too_long
from .texts import read_text

__all__ = ["QuestionAnswering", "Window"]

OVERLAP = 4  # windows share a quarter of the longest example, unless told otherwise
NOWHERE = 0  # the token that is pointed to where there is no answer


@dataclass(frozen=True)
class Window(Example):
    """The question and a piece of its context. `labels` are the positions of the answer's first and last token."""

    number: int = 0  # of the window among those of its row
    first: int = 0  # position of the context's first token
    text: str = ""  # the piece of the context
    starts: list[int] = field(default_factory=list)  # of each context token, in characters of `text`
    ends: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)  # token types, for models that have them
    references: list[str] = field(default_factory=list)  # the right answers; none: not answerable


class Span(NamedTuple):
    """What the model says about one window: scores are sums of two logits."""

    row: int
    number: int
    nowhere: float
    best: float
    first: int  # context token of the window
    last: int


class QuestionAnswering(Task):
    """Fine-tune an encoder to point to the first and the last token of an answer."""

    api = 1
    kind = "question-answering"
    example = Window
    has_head = True
    needs = ("question", "context", "answers")

    too_long: Literal["error", "drop", "window"] = "window"
    """What to do with a question and context above `max_length`."""

    stride: int | None = Field(default=None, ge=0)
    """Tokens that a window shares with the one before it; a quarter of the longest example when left out."""

    answer_tokens: int = Field(default=30, ge=1)
    """Longest predicted answer."""

    null_threshold: float = 0.0
    """How much higher "no answer" must score than the best answer; only read where a row has none."""

    def measures(self) -> dict[str, Direction]:
        return {"token_f1": "higher", "exact_match": "higher", "loss": "lower"}

    def check(self, reader: Reader) -> None:
        if not reader.tokenizer.is_fast:
            raise RecipeError(
                "question-answering must know where in the text a token stands, and only fast tokenizers say it: "
                "the base needs a tokenizer.json"
            )

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Window]:
        question, context = read_text(row, "question").strip(), read_text(row, "context")
        answers = list(_answers(row["answers"], context))
        read = _Read.of(reader.tokenizer, question, context)
        refuse_too_long(len(read.ids), reader.limit, self.too_long, ("error", "drop", "window"))
        span = read.span(*answers[0]) if answers else None
        references = [context[start:end] for start, end in answers]
        windows = [
            read.window(number, i, place, span, references) for i, place in enumerate(self._windows(read, reader.limit))
        ]
        if span is not None and all(window.labels == [NOWHERE, NOWHERE] for window in windows):
            raise RowProblem("its answer is whole in no window: raise max_length or stride")
        return windows

    def _windows(self, read: "_Read", limit: int) -> Iterator[tuple[int, int]]:
        """(start, end) of each window, in tokens of the context."""
        stride = limit // OVERLAP if self.stride is None else self.stride
        room = limit - (len(read.ids) - len(read.offsets))
        if len(read.offsets) > room and room <= stride:
            raise RowProblem("the question leaves no room for the context: raise max_length, or lower stride")
        for start in range(0, max(1, len(read.offsets) - stride), max(1, room - stride)):
            yield start, min(start + room, len(read.offsets))

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        windows = cast(Sequence[Window], examples)
        batch = {
            "input_ids": padded([w.ids for w in windows], pad),
            "attention_mask": attention_mask(windows),
            "labels": torch.tensor([w.labels for w in windows]),  # (batch, 2)
            # Row, number of the window, position of the context, and its length: (batch, 4).
            "windows": torch.tensor([[w.row, w.number, w.first, len(w.starts)] for w in windows]),
        }
        return batch | ({"token_type_ids": padded([w.types for w in windows], 0)} if windows[0].types else {})

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Summed mean of both cross-entropies of each window, over its tokens; the weight is how many windows."""
        found = model(**model_inputs(batch))
        # Padding is no place to point to, so the loss does not depend on what a window is padded to.
        hidden = batch["attention_mask"] == 0
        start, end = (x.float().masked_fill(hidden, -torch.inf) for x in (found.start_logits, found.end_logits))
        labels = batch["labels"]
        loss = sum(F.cross_entropy(x, labels[:, i], reduction="sum") for i, x in enumerate((start, end)))
        total = torch.as_tensor(loss) / 2
        return Objective(total, float(len(labels)), lambda: self._spans(start.detach(), end.detach(), batch["windows"]))

    def _spans(self, start: Tensor, end: Tensor, windows: Tensor) -> list[Span]:
        """The best span of the context in each window; logits are (batch, tokens)."""
        spans = []
        start, end = start.cpu(), end.cpu()
        for i, (row, number, first, length) in enumerate(windows.tolist()):
            context = slice(first, first + length)
            score = start[i, context, None] + end[i, None, context]  # (first, last)
            allowed = torch.ones_like(score, dtype=torch.bool).triu().tril(self.answer_tokens - 1)
            best = int(score.masked_fill(~allowed, -torch.inf).argmax())
            nowhere = float(start[i, NOWHERE] + end[i, NOWHERE])
            spans.append(Span(row, number, nowhere, float(score.flatten()[best]), *divmod(best, length)))
        return spans

    def answer(self, model: nn.Module, examples: Sequence[Example], reader: Reader) -> Sequence[Any]:
        """The windows themselves: nothing is generated, and `scores` needs their texts."""
        return list(examples)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        """Exact match and F1 of words, from 0 to 1, as SQuAD counts them."""
        from ..metrics.answers import answer_scores

        said, references = self._said(outcomes, answers), _references(answers)
        return answer_scores([said[row] for row in references], list(references.values()))

    def details(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, Any]:
        """How many questions of either kind were answered."""
        said = self._said(outcomes, answers)
        counts = {kind: {"answered": 0, "not answered": 0} for kind in ("answerable", "not answerable")}
        for row, references in _references(answers).items():
            counts["answerable" if references else "not answerable"]["answered" if said[row] else "not answered"] += 1
        return {"questions": counts}

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        windows = self.encode(0, row, reader)
        batch = on_device(self.collate(windows, reader.tokenizer.pad_token_id or 0), next(model.parameters()).device)
        with evaluating(model):
            spans = self.objective(model, batch).outcomes()
        return str(row["question"]), self._said(spans, windows)[0]

    def _said(self, spans: Sequence[Span], windows: Sequence[Window]) -> dict[int, str]:
        """The answer to each row: the best span of all its windows, or "" where that no answer is there scores more.

        A window scores "no answer" high wherever the answer is in another one, so the lowest such score counts.
        """
        texts = {(w.row, w.number): w for w in windows}
        by_row: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_row[span.row].append(span)
        may_refuse = any(not w.references for w in windows)
        said = {}
        for row, found in by_row.items():
            best = max(found, key=lambda span: span.best)
            window = texts[row, best.number]
            refused = may_refuse and min(s.nowhere for s in found) - best.best > self.null_threshold
            said[row] = "" if refused else window.text[window.starts[best.first] : window.ends[best.last]]
        return said

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        first, last = example.labels
        cut = ((0, first, None), (first, last + 1, "answer"), (last + 1, len(example.ids), None))
        return [(reader.tokenizer.decode(example.ids[a:b]), told) for a, b, told in cut if a < b]


def _references(windows: Sequence[Window]) -> dict[int, list[str]]:
    return {window.row: window.references for window in windows}


class _Read(NamedTuple):
    """A question and its whole context as tokens."""

    ids: list[int]
    types: list[int]  # empty for models without
    first: int  # position of the context's first token
    offsets: list[tuple[int, int]]  # of each context token, in characters
    context: str

    @classmethod
    def of(cls, tokenizer: Any, question: str, context: str) -> "_Read":
        found = tokenizer(question, context, return_offsets_mapping=True, verbose=False)
        places = [i for i, part in enumerate(found.sequence_ids(0)) if part == 1]
        if not places:
            raise RowProblem("the tokenizer makes nothing of the context")
        offsets = [tuple(found["offset_mapping"][i]) for i in places]
        return cls(found["input_ids"], list(found.get("token_type_ids", ())), places[0], offsets, context)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """First and last context token that have characters of context[start:end]."""
        inside = [i for i, (a, b) in enumerate(self.offsets) if a < b and a < end and b > start]
        if not inside:
            raise RowProblem("the tokenizer makes nothing of the answer")
        return inside[0], inside[-1]

    def window(
        self, row: int, number: int, place: tuple[int, int], answer: tuple[int, int] | None, references: list[str]
    ) -> Window:
        """The question with the context's tokens from `place[0]` up to `place[1]`."""
        start, end = place
        begins = self.offsets[start][0]
        labels = [NOWHERE, NOWHERE]
        if answer is not None and start <= answer[0] and answer[1] < end:
            labels = [self.first + token - start for token in answer]
        return Window(
            row,
            self._cut(self.ids, start, end),
            labels,
            number=number,
            first=self.first,
            text=self.context[begins : self.offsets[end - 1][1]],
            starts=[a - begins for a, _ in self.offsets[start:end]],
            ends=[b - begins for _, b in self.offsets[start:end]],
            types=self._cut(self.types, start, end),
            references=references,
        )

    def _cut(self, values: list[int], start: int, end: int) -> list[int]:
        """Without the context's tokens outside of the window."""
        behind = self.first + len(self.offsets)
        return [*values[: self.first], *values[self.first + start : self.first + end], *values[behind:]]


def _answers(value: Any, context: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each answer, in characters of the context, without spaces around it.

    An answer without its place is searched; the first place counts.
    """
    texts, starts = _columns(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise RowProblem("an answer is no text, or empty")
        start = context.find(text) if starts is None else starts[i]
        if starts is None and start < 0:
            raise RowProblem("an answer does not occur in its context")
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            raise RowProblem("an answer is not where `answer_start` says")
        lead = len(text) - len(text.lstrip())
        yield start + lead, start + lead + len(text.strip())


def _columns(value: Any) -> tuple[Sequence[Any], Sequence[Any] | None]:
    texts = value.get("text") if isinstance(value, Mapping) else None
    starts = value.get("answer_start") if isinstance(value, Mapping) else None
    if not isinstance(texts, list) or not (starts is None or isinstance(starts, list)):
        raise RowProblem('`answers` must be {"text": [...], "answer_start": [...]}')
    if starts is not None and len(starts) != len(texts):
        raise RowProblem("`answers` has as many `text` as `answer_start`, or no `answer_start`")
    return texts, starts
