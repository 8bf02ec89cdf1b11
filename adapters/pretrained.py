"""What transformers reads of a base: data, whoever wrote it. A damaged file is one message, and none chooses code."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from .errors import OnegpuError, RecipeError, brief
from .untrusted import read_json

__all__ = ["read_config", "read_tokenizer", "readable", "refuse_detours"]

ADAPTER_CONFIG_NAME = "adapter_config.json"
SHARD = re.compile(r"[\w.-]+\.safetensors")

LARGEST_INDEX = 2**26  # bytes; of 100,000 tensors, 10 million
DEEPEST = 1000  # layers of a model; each is built, without weights, before anything else of it is looked at
EXPECTED = (OSError, ValueError)  # whose message says what is wrong


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Whatever a library raises over the files of a base, which may be anybody's, is one message.

    Args:
        what: cannot be done, for the message.

    Raises:
        RecipeError: something was raised that is no error of the house; `--debug` shows it as the cause.
    """
    try:
        yield
    except Exception as cause:
        if isinstance(cause, (OnegpuError, torch.OutOfMemoryError)):
            raise
        raise RecipeError(f"{what}: {_reason(cause)}") from cause


def _reason(cause: Exception) -> str:
    line = str(cause).strip().partition("\n")[0]
    return line if line and isinstance(cause, EXPECTED) else f"{type(cause).__name__}: {line}".removesuffix(": ")


def read_config(place: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a base, to be used inside `readable`.

    One may ask for an implementation of attention, and transformers fetches it from the hub and runs it where the
    name is that of a repository. How attention is computed is no property of a base, so that is forgotten.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    config._attn_implementation = None  # of its parts, too
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > DEEPEST:
            raise RecipeError(f"{place} says num_hidden_layers: {brief(layers)}, and no model has more than {DEEPEST}")
    return config


def read_tokenizer(place: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a base, to be used inside `readable`."""
    return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)


def refuse_detours(place: str | Path, revision: str | None = None) -> None:
    """Refuse a base that leads transformers to files which are none of its own, or no safetensors.

    It reads whatever an index of shards names, pickles and other folders included; and where there is the
    configuration of an adapter, it reads the base which that one names instead, and puts the adapter onto it.

    Raises:
        RecipeError: it does; or its index is damaged.
    """
    if _own_file(place, ADAPTER_CONFIG_NAME, revision) is not None:
        raise RecipeError(
            f"base {str(place)!r} holds an adapter ({ADAPTER_CONFIG_NAME}): name the base that it was trained on, and "
            "the adapter with `adapter:`"
        )
    index = _own_file(place, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        return
    shards = read_json(index, largest=LARGEST_INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise RecipeError(f"{index} has no weight_map of names and files")
    for name in shards.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise RecipeError(
                f"{index} names {brief(name)}: weights are read from safetensors beside it, and from no other"
            )


def _own_file(place: str | Path, name: str, revision: str | None) -> Path | None:
    """Where a file of a base is, if it has one: in its folder, or in the cache of the hub."""
    found = cached_file(
        str(place),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found is not None else None
