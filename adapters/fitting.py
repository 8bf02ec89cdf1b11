"""Whether a saved adapter fits a model: its base, its tensors, its settings; both sides are named."""

import copy
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import ArtefactError, OnegpuError, brief, nearest
from .fingerprints import differences
from .frozen_linear import packed_as
from .isolation import answerable
from .manifest import CONFIG, BaseRecord, Saved
from .specs import Named

__all__ = ["check_base", "config_faults", "finite_faults", "misfit", "refuse_excess", "tensor_faults", "vocabulary"]

COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN = 5  # faults in one message
ROOM = 256 * 2**20  # bytes that any adapter may take
TIMES = 64  # as many as its file has: some methods multiply what they train with large tensors that are not saved


def vocabulary(model: nn.Module) -> int | None:
    """Entries of a model's vocabulary, where it says."""
    config = getattr(model, "config", None)
    found = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    return found if isinstance(found, int) else None


def _base_faults(base: BaseRecord, model: nn.Module) -> tuple[list[str], list[str]]:
    """(what shows that a model is not the base of an adapter, tensors that could not be compared)."""
    found, skipped = differences(base.fingerprint, model)
    if not found and len(skipped) == len({name.partition("#")[0] for name in base.fingerprint.tensors}):
        found = ["no tensor of it could be compared"]
    faults = []
    if type(model).__name__ != base.model_class:
        faults.append(f"it is a {type(model).__name__}, not a {base.model_class}")
    here = vocabulary(model)
    if None not in (here, base.vocabulary) and here != base.vocabulary:
        faults.append(f"its vocabulary has {here} entries, not {base.vocabulary}")
    commit = _commit(model) if _name(model) == base.source else None
    if commit is not None and COMMIT.fullmatch(base.revision or "") and commit != base.revision:
        faults.append(f"it is revision {commit}, not {base.revision}")
    return faults + found, skipped


def _name(model: nn.Module) -> str | None:
    """Where transformers read a model from: a hub id, or a path that says nothing to others."""
    return getattr(getattr(model, "config", None), "_name_or_path", None)


def _commit(model: nn.Module) -> str | None:
    """The commit of the hub that it was read from; None for a local folder."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def check_base(saved: Saved, model: nn.Module, *, allow: bool) -> list[str]:
    """See that a model is the base of a saved adapter; what differs is returned for the next manifest, where allowed.

    Raises:
        ArtefactError: it is another, and that is not allowed.
    """
    base = saved.manifest.base
    found, skipped = _base_faults(base, model)
    if not found:
        if skipped:
            warnings.warn(
                f"{saved.folder} was trained on a base packed as {base.packed_as}, and this one is "
                f"{packed_as(model)}: {len(skipped)} packed linears could not be compared, and results will differ a "
                "little",
                stacklevel=3,
            )
        return []
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    theirs, what = base.named, "; ".join(found[:3]) + more
    if not allow:
        here = _name(model)
        raise ArtefactError(
            f"{saved.folder} was trained on {theirs}, and this model is another{f' ({here})' if here else ''}: {what}. "
            "Pass allow_base_mismatch=True (`--allow-base-mismatch`) to go on all the same"
        )
    return [f"values that were trained on {theirs}: {what}"]


def misfit(folder: Path, faults: Sequence[str]) -> ArtefactError:
    """The error that names the first of them."""
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    return ArtefactError(f"{folder} does not fit this model: {'; '.join(faults[:SHOWN])}{more}")


def tensor_faults(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Keys, shapes and dtypes of a file that are not those of the model; no value is looked at."""
    missing, foreign = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    faults = [f"{key} is missing" for key in missing]
    faults += [f"{key[:200]} is not expected" for key in foreign[SHOWN:]]
    # The nearest name takes time for each, and only the first are shown.
    faults[len(missing) : len(missing)] = [
        f"{key[:200]} is not expected{nearest(key[:200], own, list_all=False)}" for key in foreign[:SHOWN]
    ]
    for key in sorted(own.keys() & given.keys()):
        ours, theirs = (f"{tuple(t.shape)} {t.dtype}" for t in (own[key], given[key]))
        if ours != theirs:
            faults.append(f"{key} is {theirs[:200]}, and {ours} is needed")
    return faults


def finite_faults(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors with values that are no numbers: one is enough to spoil every output."""
    floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    return [f"{key} has values that are not finite" for key in sorted(floats) if not floats[key].isfinite().all()]


def config_faults(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Settings that PEFT would follow and we would not. Empty ones, and another path of the base, do no harm."""
    keys = sorted((own.keys() | {key for key, value in given.items() if value}) - {"base_model_name_or_path"})
    changed = [key for key in keys if own.get(key) != given.get(key)]
    return [f"{CONFIG} says {key[:80]}: {brief(given.get(key))}, the manifest {brief(own.get(key))}" for key in changed]


def refuse_excess(folder: Path, tensors: Iterable[Tensor], model: nn.Module, stack: Sequence[Named]) -> None:
    """Refuse settings that ask for far more memory than the tensors of the folder come to, before any is taken.

    Raises:
        ArtefactError: naming the adapter.
    """
    if not isinstance(model, PreTrainedModel):
        return
    room = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    held = sum(tensor.nbytes for tensor in tensors)
    with torch.device("meta"):  # also what adapters make: they would draw their start on the CPU
        skeleton = type(model)(copy.deepcopy(model.config))
        for named in stack:
            if (taken := _positions(named)) > room:
                raise ArtefactError(f"{folder}: {named.name} takes {taken} positions, and the model has {room}")
            asked = _asked(named, skeleton)
            if asked > TIMES * held + ROOM:
                raise ArtefactError(
                    f"{folder}: the settings of {named.name} ask for {asked:,} bytes, and its tensors have {held:,}"
                )


def _positions(named: Named) -> int:
    with answerable(named.name, named.entry, "positions"):
        return named.adapter.positions()


def _asked(named: Named, skeleton: nn.Module) -> int:
    """Bytes that an adapter would take; 0 for what cannot be told without weights, which is found out by attaching."""
    try:
        with answerable(named.name, named.entry, "cost"):
            cost = named.adapter.cost(skeleton)
    except OnegpuError:
        return 0
    return max(cost.weights, cost.gradients)
