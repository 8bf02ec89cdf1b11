"""Checkpoints to resume from, bit for bit: safetensors and JSON, never a pickle.

step-000050/
  adapter/                the artefact as it stands
  optimizer.safetensors   every tensor of the optimiser's state
  state.json              everything else: schedule, loss scaling, adapters' own state, versions
  random.safetensors      the random states of torch, per device
"""

import json
import random
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from onegpu.adapters import RecipeError, Stack, Unavailable
from onegpu.adapters.artefact import confirm, fill
from onegpu.adapters.files import atomic_folder, write_json

__all__ = ["read_checkpoint", "write_checkpoint"]

EXACTLY = ("onegpu", "torch", "transformers", "bitsandbytes")  # versions that a resumed run must share


def write_checkpoint(
    folder: Path,
    *,
    stack: Stack,
    save_adapter: Callable[[Path], None],
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    progress: Mapping[str, Any],
) -> None:
    """Write all that the next step depends on; the folder appears whole or not at all."""
    tensors, values = _flatten(optimizer)
    state = {
        "progress": dict(progress),
        "optimizer": values,
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
        "adapters": {a.name: a.state() for a in stack.attachments},
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
        "environment": _environment(),
    }
    with atomic_folder(folder) as partial:
        save_adapter(partial / "adapter")
        confirm(stack, partial / "adapter")
        save_file(tensors, partial / "optimizer.safetensors", metadata={"format": "pt"})
        save_file(_torch_states(), partial / "random.safetensors", metadata={"format": "pt"})
        write_json(partial / "state.json", state)


def read_checkpoint(
    folder: Path, *, stack: Stack, optimizer: Optimizer, schedule: LRScheduler, scaler: torch.amp.GradScaler
) -> dict[str, Any]:
    """Restore everything; returns the progress that was stored.

    Raises:
        Unavailable: other versions, or another number of threads, than the run began with: bits would differ.
        ArtefactError: the adapter does not fit.
    """
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        tensors = load_file(folder / "optimizer.safetensors")
        states = load_file(folder / "random.safetensors")
    except (OSError, ValueError, SafetensorError) as cause:
        raise RecipeError(f"the checkpoint {folder} cannot be read: {cause}") from cause
    _check_environment(state["environment"], folder)
    fill(stack, folder / "adapter")
    _unflatten(optimizer, tensors, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    scaler.load_state_dict(state["scaler"])
    for attachment in stack.attachments:
        attachment.load_state(state["adapters"][attachment.name])
    _restore_random(state["random"], states)
    progress: dict[str, Any] = state["progress"]
    return progress


def _environment() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), **{name: version(name) for name in EXACTLY}}


def _check_environment(stored: Mapping[str, Any], folder: Path) -> None:
    here = _environment()
    changed = [f"{name} was {stored.get(name)} and is {here[name]}" for name in here if stored.get(name) != here[name]]
    if changed:
        raise Unavailable(f"{folder} cannot be resumed exactly here: {'; '.join(changed)}")


def _flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors and plain values, both keyed by tensor name and path within its state.

    bitsandbytes nests its quantised state one level deeper and shares look-up tables between tensors; safetensors
    wants flat names and tensors of their own.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().clone().contiguous()
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{path}/{key}", inner)
        else:
            values[path] = value

    order = _names_in_order(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        visit(order[index], state)
    return tensors, values


def _unflatten(optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(_names_in_order(optimizer))}
    for path, value in (*tensors.items(), *values.items()):
        name, *keys = path.split("/")
        place: dict[str, Any] = state.setdefault(index_of[name], {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _names_in_order(optimizer: Optimizer) -> list[str]:
    """Names in the order in which the optimiser numbers its tensors: group by group."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def _numpy_state() -> list[Any]:
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return [name, numpy.asarray(keys).tolist(), *rest]


def _torch_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random(stored: Mapping[str, Any], states: Mapping[str, Tensor]) -> None:
    kind, internal, gauss = stored["python"]
    random.setstate((kind, tuple(internal), gauss))
    name, keys, *rest = stored["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    for key, state in states.items():
        if key.startswith("cuda"):
            torch.cuda.set_rng_state(state, key)
