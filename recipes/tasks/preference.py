"""`preference`: a causal language model on which of two completions is better, or on which are good.

One row: {"prompt": [{"role": "user", "content": "Capital of France?"}], "chosen": [{"role": "assistant", "content":
"Paris."}], "rejected": [{"role": "assistant", "content": "Lyon."}]}; for `loss: kto` also {"prompt": "2 + 2 =",
"completion": " 4", "label": true}. Texts in place of messages, and whole conversations: see pairs.py.

The reference model is the same model with its adapters switched off: there is never a second one in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .answering import generate_texts
from .chat import answer
from .contract import IGNORED, Batch, Direction, Example, Labels, Objective, Reader, Row, RowProblem
from .packing import PackedTask
from .pairs import (
    PairExample,
    Said,
    continued,
    fitted,
    marked,
    pair_scores,
    prompt_ids,
    read_pair,
    reward_directions,
    said,
)
from .preference_losses import READS, Loss, Strengths, compared, kto_loss, needs_reference, pair_loss
from .tokens import sequence_logps, supervised_tokens

__all__ = ["JudgedExample", "Preference"]

BETA, SIMPO_BETA, SIMPO_GAMMA = 0.1, 2.0, 1.0  # where a recipe does not say
ANSWER_TOKENS = 48  # in a demonstration


@dataclass(frozen=True)
class JudgedExample(PairExample):
    """A pair; or for KTO one completion, beside which `prepare` puts the prompt with somebody else's completion."""

    desirable: int = 1  # 0 for a completion that is not wanted
    longest: int = 0  # tokens that a sequence may have


class Preference(PackedTask):
    """Fine-tune on preferences: towards what was chosen, away from what was rejected."""

    api = 1
    version: ClassVar[int] = 2
    kind = "causal-lm"
    example = JudgedExample
    needs = ()  # they depend on the loss; a row without them is a problem of the row
    optional = ("prompt", "chosen", "rejected", "completion", "label", "tools")

    loss: Loss = "dpo"
    """dpo, ipo, hinge, robust (with the base as reference); simpo, orpo, cpo (without); kto (single completions)."""

    beta: float | None = Field(default=None, gt=0)
    """How strongly rewards count; 0.1 when left out, 2 for `simpo`. It is τ in `ipo` and λ in `orpo`."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be labelled the wrong way round; read by `dpo`, `robust`, `simpo` and `cpo`."""

    gamma: float | None = Field(default=None, ge=0)
    """`simpo`: by how much the reward of the chosen is to be larger; 1 when left out."""

    desirable_weight: float = Field(default=1.0, gt=0)
    """`kto`: what a desirable completion counts; times their number it should be near the same of the undesirable."""

    undesirable_weight: float = Field(default=1.0, gt=0)
    """`kto`: what an undesirable completion counts."""

    too_long: Literal["error", "drop", "cut-left"] = "error"
    """What to do above `max_length`; `cut-left` cuts the prompt from its left, never a completion."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        for name in sorted(set().union(*READS.values()) - READS[self.loss]):
            if getattr(self, name) != type(self).model_fields[name].default:
                losses = ", ".join(loss for loss in READS if name in READS[loss])
                raise ValueError(f"`{name}` is read by {losses} and not by `loss: {self.loss}`")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("`loss: robust` is dpo without `label_smoothing`: set it, 0.1 for example")
        return self

    def measures(self) -> dict[str, Direction]:
        """Pairs: how often the chosen has the larger reward, and by how much. KTO: the margin between the kinds."""
        found: dict[str, Direction] = {} if self.loss == "kto" else {"accuracy": "higher"}
        return {**found, "margin": "higher", "loss": "lower"}

    def directions(self, labels: Labels) -> dict[str, Direction]:
        kinds = ("desirable", "undesirable") if self.loss == "kto" else ("chosen", "rejected")
        return super().directions(labels) | reward_directions(*kinds)

    def stratum(self, row: Row) -> str | None:
        """KTO: which kind of completion it is, so that both are held out."""
        return str(row["label"]) if self.loss == "kto" and row.get("label") is not None else None

    # --- rows ---------------------------------------------------------------------------------------------------------

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[JudgedExample]:
        if self.loss == "kto" and row.get("chosen") is None:
            return [self._single(number, said(row, "prompt"), said(row, "completion"), _label(row), reader)]
        prompt, chosen, rejected = read_pair(row)
        if self.loss == "kto":
            return [
                self._single(number, prompt, completion, desirable, reader)
                for completion, desirable in ((chosen, 1), (rejected, 0))
            ]
        both = [continued(prompt, completion, reader) for completion in (chosen, rejected)]
        (first, second), cut = fitted(both, reader, self.too_long)
        return [JudgedExample(number, first.ids, first.labels, cut, second.ids, second.labels)]

    def _single(self, number: int, prompt: Said, completion: Said, desirable: int, reader: Reader) -> JudgedExample:
        (found,), cut = fitted([continued(prompt, completion, reader)], reader, self.too_long)
        return JudgedExample(number, found.ids, found.labels, cut, desirable=desirable, longest=reader.limit)

    # --- a step -------------------------------------------------------------------------------------------------------

    def packable(self) -> bool:
        return self.loss != "kto"  # takes its own completions and the mismatched ones apart

    def groups(self, examples: int, shares: bool) -> Sequence[Sequence[int]]:
        """Sequences are the chosen ones, then the rejected; two of one prompt share it in any case."""
        return [range(2 * examples)] if shares else [[number, number + examples] for number in range(examples)]

    def prepare(self, window: Sequence[Example], seed: int) -> Sequence[Example]:
        """KTO: each prompt with the completion of its neighbour in the window, the one before it as in trl.

        Where a neighbour is of the same row (a pair makes two examples), the window is turned further. An example that
        meets no other row, as one that is alone in its window, gets no such sequence.
        """
        if self.loss != "kto":
            return window
        examples = _judged(window)
        by = _turn([example.row for example in examples])
        return [_mismatched(example, examples[i - by]) for i, example in enumerate(examples)]

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """Of pairs the chosen ones, then the rejected; of KTO the completions, then the mismatched ones."""
        judged = _judged(examples)
        first = [Example(e.row, e.ids, e.labels) for e in judged]
        second = [Example(e.row, e.other_ids or e.ids, e.other_labels or [IGNORED] * len(e.ids)) for e in judged]
        batch = self.rows([*first, *second], len(judged), pad)
        rows, desirable = (torch.tensor(values) for values in zip(*((e.row, e.desirable) for e in judged), strict=True))
        return batch | {"rows": rows, "desirable": desirable}

    def smallest_batch(self) -> int:
        """KTO compares with the completions of others."""
        return 2 if self.loss == "kto" else 1

    def refers(self) -> bool:
        """Whether the loss compares with the base."""
        return needs_reference(self.loss)

    def refer(self, model: nn.Module, batch: Batch) -> Batch:
        """`reference`: (2 · batch,) log-probability of each sequence."""
        return {"reference": sequence_logps(model, batch, self._arithmetic)} if self.refers() else {}

    def refers_once(self) -> bool:
        """A pair is the same pair in every epoch; KTO's mismatched completions are others."""
        return self.loss != "kto"

    def surveys(self) -> int:
        """KTO's baseline is of the whole window: a sum and a count."""
        return 2 if self.loss == "kto" else 0

    def survey(self, model: nn.Module, batch: Batch) -> Tensor:  # (2,) float64
        """Over mismatched completions: the sum of log π/π_ref, and how many there are."""
        others = _half(batch, 1)
        there = (others["labels"] != IGNORED).any(1)
        ratios = sequence_logps(model, others, self._arithmetic).detach().double() - others["reference"].double()
        return torch.stack([ratios[there].sum(), there.sum().double()])

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Summed loss of the pairs, or for KTO of the completions; the weight is how many there are."""
        return self._single_losses(model, batch) if self.loss == "kto" else self._pair_losses(model, batch)

    def _pair_losses(self, model: nn.Module, batch: Batch) -> Objective:
        tokens = supervised_tokens(batch)  # (2 · batch,)
        logps = sequence_logps(model, batch, self._arithmetic)
        chosen, rejected = compared(self.loss, logps, batch.get("reference"), tokens).chunk(2)
        likelihood = (logps / tokens).chunk(2)[0]
        losses = pair_loss(self.loss, (chosen, rejected), likelihood, self._strengths())

        def outcomes() -> Sequence[tuple[float, float]]:
            rewards = self._strengths().beta * torch.stack([chosen, rejected], 1).detach()
            return [(first, second) for first, second in rewards.tolist()]

        return Objective(losses.sum(), float(len(losses)), outcomes)

    def _single_losses(self, model: nn.Module, batch: Batch) -> Objective:
        own, beta = _half(batch, 0), self._strengths().beta
        desirable, (total, count) = batch["desirable"].bool(), batch["window"]
        scores = sequence_logps(model, own, self._arithmetic) - own["reference"]
        # An estimate of a divergence may be negative, which a divergence is not.
        baseline = (total / count.clamp(min=1)).clamp(min=0).to(scores.dtype)
        losses = kto_loss(scores, desirable, baseline, beta)
        losses = losses * torch.where(desirable, self.desirable_weight, self.undesirable_weight)

        def outcomes() -> Sequence[tuple[int, bool, float]]:
            rewards = (beta * scores.detach()).tolist()
            return list(zip(batch["rows"].tolist(), desirable.tolist(), rewards, strict=True))

        return Objective(losses.sum(), float(len(losses)), outcomes)

    def _strengths(self) -> Strengths:
        simpo = self.loss == "simpo"
        beta = self.beta if self.beta is not None else SIMPO_BETA if simpo else BETA
        gamma = self.gamma if self.gamma is not None else SIMPO_GAMMA
        return Strengths(beta, self.label_smoothing, gamma)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        """Of rewards: β times what the loss compares (see preference_losses.py)."""
        return _kto_scores(outcomes) if self.loss == "kto" else pair_scores(outcomes)

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        assert isinstance(example, JudgedExample)
        if self.loss == "kto":
            return marked(example.ids, example.labels, "desirable" if example.desirable else "undesirable", reader)
        both = ((example.ids, example.labels, "chosen"), (example.other_ids, example.other_labels, "rejected"))
        return [piece for ids, labels, mark in both for piece in marked(ids, labels, mark, reader)]

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        prompt = said(row, "prompt") if row.get("chosen") is None else read_pair(row)[0]
        if isinstance(prompt, str):
            return prompt, generate_texts(model, [prompt_ids(prompt, reader)[0]], reader, tokens=ANSWER_TOKENS)[0]
        said_last = str(prompt.messages[-1]["content"])
        return said_last, answer(model, reader, prompt.messages, ANSWER_TOKENS, tools=prompt.tools)


def _half(batch: Batch, half: int) -> Batch:
    """The chosen or own (0), or the rejected or mismatched (1) sequences of a batch."""
    names = ("input_ids", "attention_mask", "labels", "reference")
    return {name: batch[name].chunk(2)[half] for name in names if name in batch}


def _judged(examples: Sequence[Example]) -> list[JudgedExample]:
    assert all(isinstance(example, JudgedExample) for example in examples)
    return [example for example in examples if isinstance(example, JudgedExample)]


def _turn(rows: Sequence[int]) -> int:
    """By how much a window is turned: the least after which no example meets its own row, or as few as possible."""

    def meetings(by: int) -> int:
        return sum(row == rows[i - by] for i, row in enumerate(rows))

    turns = range(1, len(rows))
    clear = next((by for by in turns if not meetings(by)), None)  # nearly always the first, so it is quick
    return clear if clear is not None else min(turns, key=meetings, default=0)


def _mismatched(example: JudgedExample, neighbour: JudgedExample) -> JudgedExample:
    if example.row == neighbour.row:
        return example
    start, other = (next(i for i, label in enumerate(e.labels) if label != IGNORED) for e in (example, neighbour))
    ids = [*example.ids[:start], *neighbour.ids[other:]][: example.longest]
    labels = [*[IGNORED] * start, *neighbour.labels[other:]][: example.longest]
    return replace(example, other_ids=ids, other_labels=labels)


def _label(row: Row) -> int:
    found = {"true": 1, "1": 1, "false": 0, "0": 0}.get(str(row.get("label")).strip().lower())
    if found is None:
        raise RowProblem("`label` must be true or false")
    return found


def _kto_scores(outcomes: Sequence[tuple[int, bool, float]]) -> dict[str, float]:
    """Mean rewards by kind and their margin, where a kind without examples counts 0, the reward of the base itself;
    where a row has both kinds, the scores of pairs as well.
    """
    kinds = {kind: [reward for _, desirable, reward in outcomes if desirable == kind] for kind in (True, False)}
    means = {kind: fmean(rewards) if rewards else 0.0 for kind, rewards in kinds.items()}
    first, second = ({row: reward for row, kind, reward in outcomes if kind == wanted} for wanted in (True, False))
    pairs = [(first[row], second[row]) for row in first if row in second]
    found = {"accuracy": pair_scores(pairs)["accuracy"]} if pairs else {}
    return {
        **found,
        "margin": means[True] - means[False],
        "desirable_reward": means[True],
        "undesirable_reward": means[False],
    }
