"""`classification`: a class for a text, by an encoder or a decoder with a head.

One row: {"text": "Ad sales boost Time Warner profit", "label": "business"}
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from sklearn.metrics import f1_score
from torch import nn, tensor
from torch.nn import functional as F

from onegpu.adapters import DataError

from .contract import Batch, Example, Labels, Objective, Reader, Row, RowProblem, Task, attention_mask, padded

__all__ = ["Classification"]


class Classification(Task):
    """Fine-tune a classifier; the head is trained and saved with the adapter."""

    api = 1
    kind = "sequence-classification"
    has_head = True
    needs = ("text", "label")
    better = ("accuracy", "higher")

    too_long: Literal["error", "drop", "truncate"] = "truncate"
    """What to do with a text above `max_length`."""

    def labels(self, rows: Sequence[Row]) -> Labels:
        """The classes of the rows, sorted: their order is the order of the head's outputs."""
        names = sorted({str(row["label"]) for row in rows})
        if len(names) < 2:
            raise DataError(
                f"classification needs at least two classes, and every row says {names[0] if names else 'nothing'!r}"
            )
        return names

    def encode(self, number: int, row: Row, reader: Reader) -> Example:
        labels, limit = reader.labels, reader.limit
        assert labels is not None
        text, label = row["text"], str(row["label"])
        if not isinstance(text, str) or not text.strip():
            raise RowProblem("no text")
        if label not in labels:
            raise RowProblem(f"its class {label!r} is not among the training rows'")
        ids = reader.tokenizer(text, truncation=self.too_long == "truncate", max_length=limit)["input_ids"]
        if len(ids) > limit:
            if self.too_long == "error":
                raise DataError(
                    f"row {number} has {len(ids)} tokens and max_length is {limit}: raise it, or set `too_long`"
                )
            raise RowProblem(f"{len(ids)} tokens, above {limit}")
        return Example(number, ids, [labels.index(label)])

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return {
            "input_ids": padded([e.ids for e in examples], pad),
            "attention_mask": attention_mask(examples),
            "labels": tensor([e.labels[0] for e in examples]),
        }

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Summed cross-entropy over the examples, in float32; the weight is how many there are."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["labels"]  # (batch,)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts: dict[str, float] = {}
        for predicted, true in zip(logits.detach().argmax(-1).tolist(), labels.tolist(), strict=True):
            cell = f"{true}>{predicted}"
            counts[cell] = counts.get(cell, 0) + 1
        return Objective(loss, float(len(labels)), counts)

    def scores(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Accuracy and macro-averaged F1, from the cells `true>predicted` of the confusion matrix."""
        cells = [(*map(int, cell.split(">")), n) for cell, n in counts.items()]
        true, predicted, weights = zip(*cells, strict=True)
        right = sum(n for t, p, n in cells if t == p)
        macro = f1_score(true, predicted, sample_weight=weights, average="macro", zero_division=0.0)
        return {"accuracy": right / sum(weights), "macro_f1": float(macro)}
