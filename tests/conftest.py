"""Tiny models and small helpers that every test may use. Nothing here reaches a network."""

import gc
import os
import re
import shutil
import string
import weakref

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may ask a hub
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is: threads that wait for other workers' are far slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # fewer than the query heads, on purpose
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 16},
}
TINY_BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}

Noise = Callable[[dict[str, torch.nn.Parameter]], None]


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()


class LiveTensors(TorchDispatchMode):
    """Sees every tensor that is computed inside the block: forward, backward and all between."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width  # of a vocabulary
        self.widest = 0  # numbers in the largest tensor with that many columns
        self.bytes = self.peak = 0  # of what was made inside and is still there; the most at once
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor, old=tensor.untyped_storage().data_ptr() in given)
        return made

    def _note(self, tensor: Tensor, *, old: bool) -> None:
        if tensor.shape[-1:] == (self.width,) and not old:
            self.widest = max(self.widest, tensor.numel())
        storage = tensor.untyped_storage()
        if not old and storage not in self._seen:
            self._seen.add(storage)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, count: int) -> None:
        self.bytes -= count


@pytest.fixture
def live_tensors() -> type[LiveTensors]:
    """`with live_tensors(width=64) as live`: how large the tensors were that were made inside."""
    return LiveTensors


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models: the Llama variants by their names, and `bert` with a head of three classes."""
    root = tmp_path_factory.mktemp("models")
    for name, changes in VARIANTS.items():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | changes))).save_pretrained(root / name)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**TINY_BERT)).save_pretrained(root / "bert")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def worded(saved_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain Llama with a tokenizer: letters and a few signs, one token each."""
    folder = tmp_path_factory.mktemp("worded") / "base"
    shutil.copytree(saved_models["plain"], folder)
    tokens = ["<pad>", "<end>", "<unknown>", *string.ascii_lowercase, *string.digits, *" .?"]
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    inner.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def peft_folder(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder that stock PEFT saved of the plain Llama with LoRA."""
    get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "stock"))
    return tmp_path / "stock"


@pytest.fixture(scope="session")
def author_files() -> dict[str, str]:
    """What docs/write-an-adapter.md lets an author write: file name -> text."""
    page = (Path(__file__).parent.parent / "docs" / "write-an-adapter.md").read_text("utf-8")
    files = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert files
    return files


@pytest.fixture
def llama(saved_models: dict[str, Path]) -> PreTrainedModel:
    """A tiny Llama with grouped-query attention, float32, in evaluation mode."""
    return LlamaForCausalLM.from_pretrained(saved_models["plain"])


@pytest.fixture
def bert(saved_models: dict[str, Path]) -> PreTrainedModel:
    """A tiny BERT with a classification head of three classes."""
    return BertForSequenceClassification.from_pretrained(saved_models["bert"])


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (2, 7), the same in every test."""
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def noise() -> Noise:
    """Moves trainable tensors off their start, so that an adapter has an effect; the same at every call."""

    def add(trainable: dict[str, torch.nn.Parameter]) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)

    return add


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
