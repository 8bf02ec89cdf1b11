"""Weights as a model's checkpoint has them, read one at a time: what packing started from."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .errors import StackError
from .structure import linears

__all__ = ["CheckpointWeights"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CheckpointWeights:
    """The linears' weights in the safetensors that a model was read from.

    Raises:
        StackError: the model does not say where it came from, or no safetensors are there.
    """

    def __init__(self, model: nn.Module) -> None:
        source = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not isinstance(model, PreTrainedModel) or not source:
            raise StackError("the original weights are needed, and this model was not read from a checkpoint")
        self.source = str(source)
        self.prefix = f"{model.base_model_prefix}."
        self.files = self._files(getattr(model.config, "_commit_hash", None))
        with torch.device("meta"):
            unpacked = type(model)(model.config)
        self.transposed = {path for path, linear in linears(unpacked).items() if isinstance(linear, Conv1D)}

    def _files(self, revision: str | None) -> dict[str, Path]:
        """The file of every tensor, by its name."""
        if index := self._find(SAFE_WEIGHTS_INDEX_NAME, revision):
            names: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            parts = {name: self._find(name, revision) for name in set(names.values())}
            if missing := sorted(name for name, part in parts.items() if part is None):
                raise StackError(f"the original weights are needed, and {missing[0]} is missing in {self.source}")
            return {key: part for key, name in names.items() if (part := parts[name]) is not None}
        whole = self._find(SAFE_WEIGHTS_NAME, revision)
        if whole is None:
            raise StackError(f"the original weights are needed, and {self.source} holds no safetensors")
        with safe_open(whole, "pt") as file:
            return dict.fromkeys(file.keys(), whole)

    def _find(self, name: str, revision: str | None) -> Path | None:
        """A file in the folder, or in the hub's cache for an id; what was loaded from there is there."""
        found = cached_file(
            self.source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return Path(found) if found else None

    def weight(self, path: str) -> Tensor:
        """The weight (out, in) of the linear at a path of the model, float32 on the CPU.

        Raises:
            StackError: the checkpoint lacks it, or holds it packed.
        """
        key = self._key(path)
        with safe_open(self.files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise StackError(
                f"the checkpoint {self.source} is packed itself: {key} is {dtype}; take the unpacked model"
            )
        return (tensor.T if path in self.transposed else tensor).float()

    def _key(self, path: str) -> str:
        """The name in the file: a checkpoint may be of the model without its head, or the other way round."""
        key = f"{path}.weight"
        for candidate in (key, key.removeprefix(self.prefix), self.prefix + key):
            if candidate in self.files:
                return candidate
        raise StackError(f"the original weight of {path} is needed, and {self.source} does not have it")
