"""Tiny random models that adapters are proved on, and the rows that they are trained with. No network, no data.

Three kinds: a Llama that writes, a BERT that sorts texts into three classes, a T5 that reads and writes. They are as
small as methods allow (some need a hidden size of 256), and without dropout, so that gradients can be compared.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ..base import load_base
from ..compatibility import Circumstances, refuse_unfit
from ..contract import LoadOptions
from ..device import DTYPES, Hardware
from ..quiet import quietly
from ..specs import Named, Spec, build
from ..structure import head_modules, output_embeddings

__all__ = ["FAMILIES", "ROWS", "Family", "Precision", "batch", "load", "logits", "losses", "place", "skeleton"]

Family = Literal["llama", "bert", "t5"]
Precision = Literal["fp32", "bf16", "fp16"]
FAMILIES: tuple[Family, ...] = get_args(Family)

VOCABULARY, START = 64, 0  # token 0 pads and starts a decoder
CLASSES: dict[Family, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "bert": BertForSequenceClassification,
    "t5": T5ForConditionalGeneration,
}

# Six rows of different lengths, the longest neither first nor last.
ROWS: tuple[tuple[int, ...], ...] = tuple(
    tuple(torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    for length in (7, 5, 9, 4, 8, 6)
)


SETTINGS: dict[Family, dict[str, Any]] = {
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # fewer than the query heads, on purpose
        "max_position_embeddings": 128,
    },
    "bert": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    },
    "t5": {
        "d_model": 256,
        "d_ff": 512,
        "d_kv": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": START,
        "pad_token_id": START,
    },
}
CONFIGS: dict[Family, type[PreTrainedConfig]] = {"llama": LlamaConfig, "bert": BertConfig, "t5": T5Config}


def _config(family: Family) -> PreTrainedConfig:
    return CONFIGS[family](**({"vocab_size": VOCABULARY} | SETTINGS[family]))


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Where the models of this process lie; removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="onegpu-tiny-")


@cache
def place(family: Family) -> str:
    """The folder of a tiny model, written at first use; the same weights in every process."""
    folder = Path(_root().name) / family
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        CLASSES[family](_config(family)).save_pretrained(folder)
    return str(folder)


def skeleton(family: Family) -> PreTrainedModel:
    """The model without weights, on torch's meta device."""
    with torch.device("meta"):
        return CLASSES[family](_config(family))


def load(
    family: Family,
    stack: Sequence[Spec | Named] = (),
    *,
    precision: Precision = "fp32",
    folder: str | None = None,
) -> PreTrainedModel:
    """A new instance on the CPU, read as the loading stage of a stack wants it.

    Args:
        folder: of the model, for a process that did not write it.
    """
    read = _read(family, repr(stack), precision, folder or place(family), _Held(build(stack)))
    return copy.deepcopy(read)


class _Held:
    """A stack that does not count in a cache's key: equal descriptions mean equal stacks."""

    def __init__(self, stack: Sequence[Named]) -> None:
        self.stack = stack

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@cache
def _read(family: Family, described: str, precision: Precision, folder: str, held: _Held) -> PreTrainedModel:
    if family == "t5" or precision == "fp16":  # load_base knows no such head, and refuses fp16 on a CPU
        return _read_directly(family, held.stack, DTYPES[precision], folder)
    kind: Literal["causal-lm", "sequence-classification"] = (
        "causal-lm" if family == "llama" else "sequence-classification"
    )
    return load_base(folder, held.stack, kind=kind, precision=precision, hardware=Hardware("cpu"))


def _read_directly(family: Family, stack: Sequence[Named], dtype: torch.dtype, folder: str) -> PreTrainedModel:
    """What `load_base` does, for a model that it does not know."""
    bare = skeleton(family)
    refuse_unfit(stack, Circumstances(model=bare))
    options = LoadOptions(dtype=dtype, device=torch.device("cpu"))
    keep = tuple(filter(None, (*head_modules(bare), output_embeddings(bare))))
    for named in stack:
        named.adapter.check(bare)
        options = named.adapter.load_options(options, keep)
    packing = options.quantization_config
    extra: dict[str, Any] = (
        {} if packing is None else {"quantization_config": packing, "device_map": {"": options.device}}
    )
    with quietly():
        model: PreTrainedModel = CLASSES[family].from_pretrained(folder, dtype=options.dtype, **extra)
    for step in options.after_load:
        step(model)
    if packing is not None:
        cast(Any, model).hf_quantizer.remove_quantization_config(model)
    return model


def batch(family: Family, rows: Sequence[Sequence[int]] = ROWS) -> dict[str, Tensor]:
    """Rows as the model takes them, padded on the right: ids and mask (rows, longest), and a decoder's ids."""
    inputs = {"input_ids": _padded(rows), "attention_mask": _padded([[1] * len(row) for row in rows])}
    if family == "t5":
        inputs["decoder_input_ids"] = _padded([[START, *_answer(row)[:-1]] for row in rows])
    return inputs


def losses(model: nn.Module, family: Family, rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    """The sum of all losses: over tokens, or over rows where there is one class each."""
    found = model(**batch(family, rows)).logits.float()
    if family == "bert":
        return F.cross_entropy(found, torch.tensor([sum(row) % 3 for row in rows]), reduction="sum")
    targets = [_answer(row) for row in rows] if family == "t5" else [list(row[1:]) for row in rows]
    longest = max(map(len, targets))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in targets])
    # Methods that put learned positions in front may give logits for those too.
    own = max(map(len, rows))
    return F.cross_entropy(found[:, -own:][:, :longest].flatten(0, 1), labels.flatten(), reduction="sum")


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model in evaluation mode, without gradients; the mode is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**inputs).logits.detach()
    for module in training:
        module.training = True
    return found


def _answer(row: Sequence[int]) -> list[int]:
    """What the T5 is taught to write: the row backwards."""
    return list(reversed(row))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows])
