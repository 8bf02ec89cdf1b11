"""Turns a GGUF file into a folder in transformers' format."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .pretrained import readable
from .quiet import quietly

__all__ = ["dequantise"]


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the weights of `gguf` in bf16, with configuration and tokenizer, to `folder`.

    Raises:
        RecipeError: the file is damaged, or of an architecture that transformers cannot read.
    """
    print(f"dequantising {gguf.name} into the cache, once", file=sys.stderr)
    with quietly():
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    with readable(f"base {str(gguf)!r} cannot be read as GGUF"):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            # Without this the model counts as quantised for ever after, and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
