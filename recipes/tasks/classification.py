"""`classification`: a class, several classes or a number for a text or a pair of texts, by an encoder or a decoder.

    predict: class      {"text": "Ad sales boost Time Warner profit", "label": "business"}
    predict: classes    {"text": "Cameron wins four Oscars in Hollywood", "label": ["film", "prizes"]}
    predict: number     {"text": "A plane is taking off.", "pair": "An air plane is taking off.", "label": 5.0}

`pair` is a second text: of an inference, of a comparison. A relation between two things in one text is a class, too,
with markers around them; the adapter `trainable-tokens` trains markers that are tokens of their own:

    {"text": "[A] Ada Lovelace [/A] wrote to [B] Charles Babbage [/B] in 1843.", "label": "corresponded"}
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.adapters import DataError, RecipeError
from onegpu.adapters.errors import nearest

from ..metrics.classes import class_scores, confusion, score_names, several_scores
from ..metrics.numbers import number_scores
from .contract import (
    Batch,
    Direction,
    Example,
    Labels,
    Objective,
    Predictions,
    PredictiveTask,
    Reader,
    Row,
    RowProblem,
    attention_mask,
    model_inputs,
    padded,
)
from .lengths import refuse_too_long

__all__ = ["Classification", "ClassificationExample"]

LARGEST = 1e18  # the square of a larger number is infinite in float32

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class ClassificationExample(Example):
    """A text with its target.

    `labels` holds the number of its class; or a 0 or 1 for each class; or, where a number is predicted, the 0 that
    counts the head's only output.
    """

    types: list[int] = field(default_factory=list)  # of each token, which text it belongs to; empty where all are 0
    number: float = 0.0  # what is predicted, where that is a number
    weight: float = 1.0  # of its class in the loss


class Classification(PredictiveTask):
    """Fine-tune a classifier; the head is trained and saved with the adapter."""

    api = 1
    kind = "sequence-classification"
    example = ClassificationExample
    has_head = True
    needs = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ("pair",)

    predict: Literal["class", "classes", "number"] = "class"
    """One class; `classes`: any number of them, `label` is a list; `number`: `label` is a number."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This share of the target is spread evenly over all classes; for `predict: class`."""

    class_weight: Literal["balanced"] | dict[str, Weight] | None = None
    """What a class counts in the loss: `balanced` lets rare ones count more, `{sports: 2}` leaves others at 1; for
    `predict: class`."""

    too_long: Literal["error", "drop", "cut-left", "cut-right"] = "error"
    """What to do with a text above `max_length`; of a pair, the longer text is cut."""

    @model_validator(mode="after")
    def _coherent(self) -> "Classification":
        for setting in ("label_smoothing", "class_weight"):
            if getattr(self, setting) and self.predict != "class":
                raise ValueError(f"`{setting}` is for `predict: class`; `predict: {self.predict}` would ignore it")
        return self

    def measures(self) -> dict[str, Direction]:
        match self.predict:
            case "class":
                return {"accuracy": "higher", "macro_f1": "higher"}
            case "classes":
                return {"micro_f1": "higher", "macro_f1": "higher", "subset_accuracy": "higher"}
        return {"pearson": "higher", "spearman": "higher", "mean_absolute_error": "lower"}

    def directions(self, labels: Labels) -> dict[str, Direction]:
        if self.predict == "number":
            return super().directions(labels) | {"mean_squared_error": "lower"}
        names = score_names(labels or (), several=self.predict == "classes")
        return super().directions(labels) | dict.fromkeys(names, "higher")

    # --- before training ----------------------------------------------------------------------------------------------

    def labels(self, rows: Iterable[Row]) -> Labels:
        """The classes of the rows, sorted: their order is the order of the head's outputs."""
        if self.predict == "number":
            return ["number"]  # the head has one output
        names: set[str] = set()
        mistaken = ""
        for row in rows:
            try:
                names.update(self._names(row["label"]))
            except RowProblem as problem:
                mistaken = mistaken or f" (of one it cannot be read: {problem})"
        if len(names) < 2:
            alone = repr(*names) if names else "nothing"
            raise DataError(f"classification needs at least two classes, and every row says {alone}{mistaken}")
        return sorted(names)

    def class_weights(self, rows: Iterable[Row], labels: Sequence[str]) -> Sequence[float] | None:
        """`balanced` is scikit-learn's: n / (k n_c), with n rows, k classes, and n_c rows of class c.

        Raises:
            RecipeError: a weight for a class that does not exist.
            DataError: `balanced`, and a class has no rows.
        """
        if self.class_weight is None:
            return None
        if self.class_weight != "balanced":
            for name in self.class_weight:
                if name not in labels:
                    raise RecipeError(f"class_weight: no row is of class {name!r}{nearest(name, labels)}")
            return [float(self.class_weight.get(name, 1.0)) for name in labels]
        counts = Counter(self.stratum(row) for row in rows)
        absent = [name for name in labels if not counts[name]]
        if absent:
            raise DataError(f"class_weight: no row to train on is of class {absent[0]!r}, which nothing can balance")
        total = sum(counts[name] for name in labels)
        return [total / (len(labels) * counts[name]) for name in labels]

    def stratum(self, row: Row) -> str | None:
        """The class; a row without one is in no stratum."""
        return _name(row["label"]) if self.predict == "class" else None

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[ClassificationExample]:
        texts = _texts(row)
        labels, value = self._target(row["label"], reader.labels or ())
        weights = reader.class_weights
        ids, types, cut = self._tokens(texts, number, reader)
        weight = weights[labels[0]] if weights is not None else 1.0
        return [ClassificationExample(number, ids, labels, cut, types, value, weight)]

    def _target(self, label: Any, names: Sequence[str]) -> tuple[list[int], float]:
        if self.predict == "number":
            return [0], _number(label)
        chosen = self._names(label)
        for name in chosen:
            if name not in names:
                raise RowProblem(f"its class {name!r} is not among the training rows'")
        if self.predict == "class":
            return [names.index(chosen[0])], 0.0
        return [int(name in chosen) for name in names], 0.0

    def _names(self, label: Any) -> list[str]:
        """The classes of a row: one for `class`, any number for `classes`."""
        if self.predict == "class":
            name = _name(label)
            if name is None:
                several = isinstance(label, Sequence) and not isinstance(label, str)
                raise RowProblem("its label is a list: set `predict: classes`" if several else "no label")
            return [name]
        if not isinstance(label, Sequence) or isinstance(label, str):
            raise RowProblem("its label is no list of classes: set `predict: class` for one class per row")
        names = [_name(one) for one in label]
        if None in names:
            raise RowProblem("its label lists something that is no class")
        return [name for name in names if name is not None]

    def _tokens(self, texts: Sequence[str], number: int, reader: Reader) -> tuple[list[int], list[int], int]:
        """(ids, types, cut): the texts with the special tokens of the base, cut to what it can take."""
        encoded = reader.tokenizer(*texts, verbose=False)
        ids, types, cut = encoded["input_ids"], encoded.get("token_type_ids", []), 0
        if len(ids) <= reader.tokenizer.num_special_tokens_to_add(pair=len(texts) > 1):
            raise RowProblem("a text of which the tokenizer makes nothing")
        refuse_too_long(len(ids), reader.limit, self.too_long, ("error", "drop", "cut-left", "cut-right"))
        if len(ids) > reader.limit:
            kept = _kept(encoded, reader.limit, left=self.too_long == "cut-left")
            cut = len(ids) - len(kept)
            ids, types = [ids[i] for i in kept], [types[i] for i in kept if types]
        return ids, types if any(types) else [], cut

    # --- a step -------------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        rows = cast("Sequence[ClassificationExample]", examples)
        batch = {
            "input_ids": padded([row.ids for row in rows], pad),
            "attention_mask": attention_mask(rows),
            "labels": torch.tensor([row.labels for row in rows]),  # (batch, 1), or (batch, classes) of 0 and 1
            "numbers": torch.tensor([row.number for row in rows], dtype=torch.float32),  # (batch,)
            "weights": torch.tensor([row.weight for row in rows], dtype=torch.float32),  # (batch,)
        }
        if any(row.types for row in rows):
            batch["token_type_ids"] = padded([row.types or [0] * len(row.ids) for row in rows], 0)
        return batch

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        logits = model(**_inputs(model, batch)).logits.float()  # (batch, outputs)
        labels, rows = batch["labels"], torch.arange(len(logits), device=logits.device)
        match self.predict:
            case "class":
                weights = None if self.class_weight is None else batch["weights"]
                return Predictions(logits, labels[:, 0], rows, weights=weights)
            case "classes":
                return Predictions(logits, labels, rows, "classes")
        return Predictions(logits, batch["numbers"], rows, "number")

    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """A summed loss in float32, as transformers' heads have it.

        `class`: w_y ((1 - s) H(y) + s H(uniform)) with smoothing s, cross-entropy H; the weight is the sum of w_y.
        `classes`: binary cross-entropy of each class; the weight is how many classes and examples there are.
        `number`: the squared error; the weight is how many examples there are.
        """
        logits, targets = found.logits, found.targets
        match self.predict:
            case "class":
                losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
                total, weight = (losses * batch["weights"]).sum(), float(len(targets))
                if found.weights is not None:
                    weight = found.weights.double().sum().item()
            case "classes":
                total = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum")
                weight = float(targets.numel())
            case "number":
                total = F.mse_loss(logits[:, 0], targets, reduction="sum")
                weight = float(len(targets))
        return Objective(total, weight, lambda: self._outcomes(logits.detach(), batch))

    def _outcomes(self, logits: Tensor, batch: Batch) -> Sequence[tuple[Any, Any]]:
        """(true, predicted) of each example: numbers of classes, sets of them as lists, or the numbers themselves."""
        labels = batch["labels"]
        match self.predict:
            case "class":
                true, predicted = labels[:, 0].tolist(), logits.argmax(-1).tolist()
            case "classes":
                true, predicted = _chosen(labels), _chosen(logits > 0)
            case "number":
                true, predicted = batch["numbers"].tolist(), logits[:, 0].tolist()
        return list(zip(true, predicted, strict=True))

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def classes_of(self, example: Example) -> Sequence[int]:
        """The class, or each of several."""
        several = self.predict == "classes"
        return [number for number, chosen in enumerate(example.labels) if chosen] if several else example.labels

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        if self.predict != "number":
            return super().explain(example, reader)
        assert isinstance(example, ClassificationExample)
        return [(reader.tokenizer.decode(example.ids), f"{example.number:g}")]

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        true, predicted = [one for one, _ in outcomes], [other for _, other in outcomes]
        match self.predict:
            case "class":
                return class_scores(true, predicted, reader.labels or ())
            case "classes":
                return several_scores(list(map(set, true)), list(map(set, predicted)), reader.labels or ())
        return number_scores(true, predicted)

    def details(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, Any]:
        """For `class`, how often each true class was predicted as which."""
        if self.predict != "class":
            return {}
        true, predicted = [one for one, _ in outcomes], [other for _, other in outcomes]
        return {"confusion": confusion(true, predicted, reader.labels or ())}


def _texts(row: Row) -> list[str]:
    """The text, and the second one where the row has one."""
    text, pair = row["text"], row.get("pair")
    if not isinstance(text, str) or not text.strip():
        raise RowProblem("no text")
    if "pair" not in row:
        return [text]
    if not isinstance(pair, str) or not pair.strip():
        raise RowProblem("no second text in `pair`")
    return [text, pair]


def _name(label: Any) -> str | None:
    """A class as text: numbers and truth values may name classes; None for anything else."""
    if not isinstance(label, str | int | float) or label != label:  # NaN, which tables have for nothing
        return None
    return str(label) if str(label).strip() else None


def _number(label: Any) -> float:
    """A number, which files without types (CSV) hold as text."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise RowProblem("its label is no number")
    try:
        value = float(label)
    except (ValueError, OverflowError):
        raise RowProblem("its label is no number") from None
    if not abs(value) <= LARGEST:  # so written, NaN is refused too
        raise RowProblem(f"its label is not finite, or beyond {LARGEST:g}")
    return value


def _kept(encoded: Any, limit: int, *, left: bool) -> list[int]:
    """Positions of the tokens that stay: all special ones, and of each text its share from one end."""
    if not encoded.is_fast:
        raise RecipeError("texts can only be cut with a fast tokenizer, which this base lacks: set `too_long: drop`")
    owners = encoded.sequence_ids(0)  # per token: 0 or 1 for the text that it is of, None for a special token
    texts = [[i for i, owner in enumerate(owners) if owner == which] for which in sorted({*owners} - {None})]
    room = limit - owners.count(None)
    if room < len(texts):
        raise RecipeError(f"max_length is {limit}, and special tokens leave no room for a text")
    kept = {i for i, owner in enumerate(owners) if owner is None}
    for text, share in zip(texts, _shares([len(text) for text in texts], room), strict=True):
        kept.update(text[len(text) - share :] if left else text[:share])
    return sorted(kept)


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of each text stay where the longer of two is cut first."""
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def _chosen(marks: Tensor) -> list[list[int]]:  # marks: (batch, classes), non-zero where chosen
    return [[i for i, mark in enumerate(row) if mark] for row in marks.tolist()]


def _inputs(model: nn.Module, batch: Batch) -> Batch:
    """What goes into the model."""
    inputs = model_inputs(batch)
    config: Any = model.config
    padding = config.get_text_config().pad_token_id
    if padding is not None:
        # The head of a decoder looks for the last token that is not the model's padding, by id; the tokenizer's may be
        # another one, and then the class would be read off padding.
        inputs["input_ids"] = inputs["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
    if getattr(config, "type_vocab_size", 0) < 2:  # no embedding for a second type: the tokenizer was made for BERT
        inputs.pop("token_type_ids", None)
    return inputs
