"""What a base is, by content: so that an adapter is never loaded on another one unnoticed."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .frozen_linear import PackedWeight
from .structure import head_modules, modules, unwrap

__all__ = ["Fingerprint", "base_tensors", "differences", "fingerprint", "tensor_digest"]

# Settings that say how a model is run, labelled or stored, not what it is; a Trainer sets special tokens as its
# tokenizer has them.
NOT_CONTENT = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "architectures"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("use_cache", "num_labels", "id2label", "label2id", "problem_type", "return_dict"),
    *("attn_implementation", "_attn_implementation", "output_hidden_states"),
}


PIECE = 2**20  # elements that are widened or rounded at once
NORMS_AGREE = 2e-3  # relative; rounding to 8 bits of mantissa moves a norm by less


class TensorPrint(BaseModel):
    """One base tensor: a digest of its bytes, and what two precisions of it have in common.

    That is a digest of its bf16 rounding, and its norm for fp16, which loses small values that bf16 keeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: str  # dtype; or the kind of packing, and the dtype that was packed
    exact: str
    rounded: str | None = None
    norm: float | None = None


class Fingerprint(BaseModel):
    """Digest of the configuration, and of each base tensor by logical name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    tensors: dict[str, TensorPrint]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Fingerprint the base under whatever is attached to it: heads and adapters are left out."""
    config = getattr(model, "config", None)
    content = _content(config.to_dict() if config else {})
    tensors = {name: _print(tensor, storage) for name, tensor, storage in base_tensors(model)}
    return Fingerprint(config=_digest([json.dumps(content, sort_keys=True, default=str).encode()]), tensors=tensors)


def _content(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say what a model is; those of an encoder and a decoder lie a level deeper."""
    kept = {key: value for key, value in settings.items() if key not in NOT_CONTENT}
    return {key: _content(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def differences(stored: Fingerprint, model: nn.Module) -> tuple[list[str], list[str]]:
    """(what shows that the model is another base, what could not be compared because it is stored otherwise).

    Float tensors of two precisions are compared by their bf16 roundings; a packed and a float one are not comparable.
    """
    live = fingerprint(model)
    faults, skipped = [], []
    if live.config != stored.config:
        faults.append("its configuration differs")
    # A packed linear has one weight under several buffers: compare the names of what it stands for.
    ours, theirs = (_by_stem(prints.tensors) for prints in (live, stored))
    faults += [f"it lacks {name}" for name in sorted(theirs.keys() - ours.keys())]
    faults += [f"it adds {name}" for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        here, there = ours[name], theirs[name]
        if {k: p.storage for k, p in here.items()} == {k: p.storage for k, p in there.items()}:
            same = {k: p.exact for k, p in here.items()} == {k: p.exact for k, p in there.items()}
        elif name in here and name in there:
            same = _same_rounded(here[name], there[name])
        else:
            skipped.append(name)
            continue
        if not same:
            faults.append(f"{name} has other values")
    return faults, skipped


def _same_rounded(one: TensorPrint, other: TensorPrint) -> bool:
    if "float16" in (one.storage, other.storage):
        return (
            one.norm is not None and other.norm is not None and math.isclose(one.norm, other.norm, rel_tol=NORMS_AGREE)
        )
    return one.rounded == other.rounded


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor of the base under whatever is attached to it: logical name, tensor, how it is stored."""
    heads = head_modules(model)
    unpacked = (p for _, m in modules(model) for p in unwrap(m).parameters(recurse=False) if p.is_floating_point())
    packed_from = _name_of_dtype(next(unpacked, torch.empty(0)))  # the first is the token embedding
    seen: set[int] = set()
    for path, outer in [("", model), *modules(model)]:
        if any(path == head or path.startswith(f"{head}.") for head in heads):
            continue
        module = unwrap(outer)
        if isinstance(module, PackedWeight):
            stem = path.removesuffix(".packed") + ".weight"
            storage = f"{module.kind} of {packed_from}"
            yield from ((f"{stem}#{name}", buffer, storage) for name, buffer in module.named_buffers())
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # tied tensors once
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), parameter, _name_of_dtype(parameter)


def _name_of_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _by_stem(prints: Mapping[str, TensorPrint]) -> dict[str, dict[str, TensorPrint]]:
    """Prints by the tensor that they are of: a packed one has several."""
    found: dict[str, dict[str, TensorPrint]] = {}
    for name, one in prints.items():
        found.setdefault(name.partition("#")[0], {})[name] = one
    return found


def _print(tensor: Tensor, storage: str) -> TensorPrint:
    exact = tensor_digest(tensor)
    if not tensor.is_floating_point():
        return TensorPrint(storage=storage, exact=exact)
    rounded = exact if tensor.dtype == torch.bfloat16 else tensor_digest(tensor, torch.bfloat16)
    squares = sum(piece.float().square().sum().item() for piece in _pieces(tensor))
    return TensorPrint(storage=storage, exact=exact, rounded=rounded, norm=float(f"{math.sqrt(squares):.5g}"))


def tensor_digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Digest of the shape and the bytes of a tensor, or of those that it has in another dtype."""
    bytes_of = (piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data for piece in _pieces(tensor))
    return _digest(chain([str(tuple(tensor.shape)).encode()], bytes_of))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in their order, some at a time: no copy of a whole embedding table is ever made."""
    yield from tensor.detach().contiguous().reshape(-1).split(PIECE)


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:24]
