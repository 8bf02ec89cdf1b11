"""What tasks of causal language models share: cutting, batches, the loss over supervised tokens, scores."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from .answering import AnswerExample, AnsweringTask, prompt_within, text_measures
from .contract import (
    IGNORED,
    Batch,
    Direction,
    Objective,
    Predictions,
    Reader,
    RowProblem,
    TooLong,
)
from .lengths import Piece, fit, refuse_too_long
from .packing import PackedTask
from .tokens import causal_logits, token_objective, token_scores

__all__ = ["CausalTask", "pieces"]


class CausalTask(PackedTask, AnsweringTask):
    """A causal language model that learns to say the supervised tokens of each example."""

    kind = "causal-lm"

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567, section 7)."""

    def measures(self) -> dict[str, Direction]:
        return text_measures(self.metrics) | {"loss": "lower", "token_accuracy": "higher", "perplexity": "lower"}

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        return causal_logits(model, batch, self._arithmetic)

    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """Summed cross-entropy of the supervised tokens, in float32; the weight is how many there are."""
        return token_objective(found, self.label_smoothing)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        return self.answer_scores(answers) | token_scores(outcomes)


def answerable_examples(
    number: int, found: Sequence[Piece], reader: Reader, *, prompt: Sequence[int], references: Sequence[str]
) -> list[AnswerExample]:
    """The pieces of a row as examples; the last one carries the prompt, so that a row is answered once."""
    asked = prompt_within(prompt, reader.limit, reader.tokenizer.bos_token_id)
    examples = [AnswerExample(number, ids, labels, cut) for ids, labels, cut in found]
    last = examples.pop()
    return [*examples, AnswerExample(number, last.ids, last.labels, last.cut, asked, list(references))]


def pieces(
    number: int, ids: Sequence[int], labels: Sequence[int], reader: Reader, policy: TooLong, choices: Sequence[TooLong]
) -> list[Piece]:
    """A sequence cut to what the model can take, without pieces that teach nothing.

    Args:
        labels: one per id, IGNORED where nothing is supervised.
        choices: the policies that the task offers.

    Raises:
        DataError: it is too long, and the policy is `error`.
        RowProblem: it is too long, and the policy is `drop`; or nothing is supervised, perhaps only after cutting.
    """
    refuse_too_long(len(ids), reader.limit, policy, choices)
    found = fit(ids, labels, reader.limit, policy, begin=reader.tokenizer.bos_token_id)
    # A first token has no prediction, so a label there would be counted and never be trained.
    shifted = [(kept, [IGNORED, *own[1:]], cut) for kept, own, cut in found]
    useful = [piece for piece in shifted if any(label != IGNORED for label in piece[1])]
    if not useful:
        raise RowProblem(
            "nothing supervised is left after cutting" if len(ids) > reader.limit else "nothing supervised"
        )
    return useful
