"""Checkpoints to resume from, bit for bit: safetensors and JSON, never a pickle.

step-000050/
  adapter/                the artefact as it stands
  optimizer.safetensors   every tensor of the optimiser's state
  state.json              everything else: schedule, loss scaling, adapters' own state, versions
  random.safetensors      the random states of torch, a row per process
  checksums.json          the digest of every file, so that damage is seen
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from onegpu.adapters import ProofFailed, RecipeError, Stack
from onegpu.adapters.artefact import fill
from onegpu.adapters.files import atomic_folder, seal, write_json

__all__ = ["environment", "random_states", "read_state", "restore", "undisturbed", "write_checkpoint"]

EXACTLY = ("onegpu", "torch", "transformers", "bitsandbytes", "peft")  # versions that a resumed run must share
OPTIMIZER, RANDOM, STATE = "optimizer.safetensors", "random.safetensors", "state.json"


def write_checkpoint(
    folder: Path,
    *,
    stack: Stack,
    save_adapter: Callable[[Path], None],
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    states: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write all that the next step depends on; the folder appears whole and sealed, or not at all.

    Args:
        states: of `random_states`, which every process has to call.

    Raises:
        StorageError: the disk is full, or the folder may not be written.
        ProofFailed: what is read back is not what was to be written; the folder is there to be looked at.
    """
    tensors, values = _flatten(optimizer)
    state = {
        "progress": dict(progress),
        "optimizer": {"kind": type(optimizer).__name__, "values": values},
        "schedule": schedule.state_dict(),
        "scaler": scaler.state_dict(),
        "adapters": {a.name: a.state() for a in stack.attachments},
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
        "environment": environment(len(states["cpu"]), stack),
    }
    with atomic_folder(folder) as partial:
        save_adapter(partial / "adapter")
        save_file(tensors, partial / OPTIMIZER, metadata={"format": "pt"})
        save_file(dict(states), partial / RANDOM, metadata={"format": "pt"})
        write_json(partial / STATE, state)
        seal(partial)
    _confirm(tensors, folder / OPTIMIZER)
    _confirm(states, folder / RANDOM)


def _confirm(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One tensor at a time: a second copy of the optimiser's state may not fit."""
    try:
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                if not torch.equal(file.get_tensor(name), tensor.cpu()):
                    raise ProofFailed(f"{path.name}: {name} was not written as it is")
    except SafetensorError as cause:
        raise ProofFailed(f"{path.name} was not written as it is: {cause}") from cause


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: `progress`, `environment` and more.

    Raises:
        RecipeError: it is none.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise RecipeError(f"the checkpoint {folder} cannot be read: {cause}") from cause
    if not isinstance(state, dict) or not {"progress", "environment"} <= state.keys():
        raise RecipeError(f"the checkpoint {folder} cannot be read: {STATE} is not one of ours")
    return state


def restore(
    folder: Path,
    state: Mapping[str, Any],
    *,
    stack: Stack,
    optimizer: Optimizer,
    schedule: LRScheduler,
    scaler: torch.amp.GradScaler,
    process: int,
) -> None:
    """Make everything live what it was when the checkpoint was written. Rates follow from the recipe and the step.

    Raises:
        ArtefactError: the adapter does not fit.
        RecipeError: the optimiser, or anything else, does not.
    """
    try:
        kind, here = state["optimizer"]["kind"], type(optimizer).__name__
        if kind != here:
            raise RecipeError(f"{folder} has the state of {kind}, and the recipe asks for {here}: start another run")
        tensors, states = load_file(folder / OPTIMIZER), load_file(folder / RANDOM)
        fill(stack, folder / "adapter")
        _unflatten(optimizer, tensors, state["optimizer"]["values"])
        _restore_schedule(schedule, optimizer, state["schedule"])
        scaler.load_state_dict(state["scaler"])
        for attachment in stack.attachments:
            attachment.load_state(state["adapters"][attachment.name])
        # A copy of the row: torch crashes on a state that is a view into other ones.
        own = {name: rows[min(process, len(rows) - 1)].clone() for name, rows in states.items()}
        _restore_random(state["random"], own)
    except (SafetensorError, KeyError, TypeError) as cause:
        raise RecipeError(f"the checkpoint {folder} does not fit this run: {cause}") from cause


def _restore_schedule(schedule: LRScheduler, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Where it stood; but the rates themselves are the recipe's, so that a changed one is not silently the old one."""
    assert isinstance(schedule, LambdaLR)  # all of transformers' are that `schedule` may name
    schedule.load_state_dict({**state, "base_lrs": schedule.base_lrs})
    rates = [b * factor(schedule.last_epoch) for b, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def environment(processes: int, stack: Stack) -> dict[str, int | str]:
    """What of this machine the bits depend on: also the versions of whoever wrote the adapters."""
    machine: dict[str, int | str] = {"processes": processes, "threads": torch.get_num_threads()}
    authors = {named.entry.distribution: named.entry.version for named in stack.named if named.entry is not None}
    return {**authors, **{name: version(name) for name in EXACTLY}, **machine, "device": _device(stack)}


def _device(stack: Stack) -> str:
    """The kind of device that the base is on."""
    return next(stack.root.parameters()).device.type


def random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The random states of torch by kind of device: (processes, bytes). Every process has to call it."""
    own = {name: state[None].to(accelerator.device) for name, state in _torch_states().items()}
    return {name: accelerator.gather(state).cpu() for name, state in own.items()}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers go on after the block as if it had not been there."""
    states, own = _torch_states(), {"python": random.getstate(), "numpy": _numpy_state()}
    try:
        yield
    finally:
        _restore_random(own, states)


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
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random(stored: Mapping[str, Any], states: Mapping[str, Tensor]) -> None:
    kind, internal, gauss = stored["python"]
    random.setstate((kind, tuple(internal), gauss))
    name, keys, *rest = stored["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
