"""Checkpoints to resume from, bit for bit: safetensors and JSON, never a pickle.

step-000050/
  adapter/                the artefact as it stands
  optimizer.safetensors   every tensor of the optimiser's state
  state.json              everything else: progress, loss scaling, adapters' own state, versions
  random.safetensors      the random states of torch, a row per process
  checksums.json          the digest of every file, so that damage is seen
"""

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
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from onegpu.adapters import Attachment, ProofFailed, RecipeError, Stack
from onegpu.adapters.artefact import fill
from onegpu.adapters.errors import brief
from onegpu.adapters.files import atomic_folder, seal, write_json
from onegpu.adapters.untrusted import LARGEST, read_json, read_tensors

from . import checkpoint_record, optimizer_state

__all__ = ["environment", "random_states", "read_state", "restore", "undisturbed", "write_checkpoint"]

EXACTLY = ("onegpu", "torch", "transformers", "bitsandbytes", "peft")  # versions that a resumed run must share
OPTIMIZER, RANDOM, STATE = "optimizer.safetensors", "random.safetensors", "state.json"
OWN = 32  # bytes of JSON for an element that is trained: AdaLoRA keeps three sums of each, in base 64


def write_checkpoint(
    folder: Path,
    *,
    stack: Stack,
    save_adapter: Callable[[Path], None],
    optimizer: Optimizer,
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
    tensors, values = optimizer_state.flatten(optimizer)
    state = {
        "progress": dict(progress),
        "optimizer": {"kind": type(optimizer).__name__, "values": values},
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


def read_state(folder: Path, stack: Stack) -> dict[str, Any]:
    """What a checkpoint of this stack says beside its tensors: `progress`, `environment` and more.

    Raises:
        ArtefactError: it cannot be read, or is larger than that of such a stack can be.
        RecipeError: it says what no checkpoint says.
    """
    trained = sum(parameter.numel() for parameter in stack.trainable().values())
    path = folder / STATE
    return checkpoint_record.checked(read_json(path, largest=LARGEST + OWN * trained), path)


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

    Args:
        state: of `read_state`.

    Raises:
        ArtefactError: a file is damaged, or the adapter does not fit.
        RecipeError: the optimiser, or anything else, does not; nothing was restored then, but for what adapters
            of a stack took before another one refused its own state.
    """
    tensors, states = read_tensors(folder / OPTIMIZER), read_tensors(folder / RANDOM)
    _check_optimizer(folder, state, optimizer, tensors)
    _check_scaler(folder / STATE, state["scaler"], scaler)
    _check_random(folder / RANDOM, states, state["environment"]["processes"])
    _check_adapters(folder / STATE, state["adapters"], stack)
    fill(stack, folder / "adapter")
    for attachment in stack.attachments:
        _load_own_state(folder / STATE, attachment, state["adapters"][attachment.name])
    optimizer_state.unflatten(optimizer, tensors, state["optimizer"]["values"])
    _restore_schedule(schedule, optimizer, state["progress"]["step"])
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    _restore_random(state["random"], {name: _own_row(rows, process) for name, rows in states.items()})


def _check_optimizer(
    folder: Path, state: Mapping[str, Any], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    kind, here = state["optimizer"]["kind"], type(optimizer).__name__
    if kind != here:
        raise RecipeError(f"{folder} has the state of {brief(kind)}, and the recipe asks for {here}: start another run")
    try:
        optimizer_state.check(optimizer, tensors, state["optimizer"]["values"], state["progress"]["step"])
    except RecipeError as cause:
        raise RecipeError(f"{folder / OPTIMIZER} does not fit this run: {cause}") from None


def _check_scaler(path: Path, stored: Mapping[str, Any], scaler: torch.amp.GradScaler) -> None:
    live = scaler.state_dict()
    constants = ("growth_factor", "backoff_factor", "growth_interval")
    if stored.keys() != live.keys() or any(stored.get(name) != live.get(name) for name in constants):
        raise RecipeError(f"{path} does not fit this run: scaler is {brief(stored)}, and here it is {brief(live)}")


def _check_random(path: Path, states: Mapping[str, Tensor], processes: int) -> None:
    """torch trusts what it is given in part, and has no way back: so the live generators come last."""
    live = _torch_states()
    if "cpu" not in states or not states.keys() <= {"cpu", "cuda"}:
        raise RecipeError(f"{path} has the states of {brief(sorted(states))}, and must have those of cpu, and of cuda")
    for name, rows in states.items():
        length = live[name].numel() if name in live else rows.shape[-1] if rows.dim() else 0
        if rows.dtype != torch.uint8 or tuple(rows.shape) != (processes, length):
            raise RecipeError(
                f"{path}: {name} is {list(rows.shape)} of {str(rows.dtype).removeprefix('torch.')}, and must be "
                f"{[processes, length]} of uint8: a row for each process"
            )
        for row in range(processes if name in live else 0):
            try:
                torch.Generator(name).set_state(_own_row(rows, row))
            except RuntimeError as cause:
                raise RecipeError(f"{path}: {name} is no state of a generator: {str(cause)[:200]}") from None


def _own_row(rows: Tensor, process: int) -> Tensor:
    """A copy: torch crashes on a state that is a view into other ones."""
    return rows[min(process, len(rows) - 1)].clone()


def _check_adapters(path: Path, stored: Mapping[str, Any], stack: Stack) -> None:
    names = [attachment.name for attachment in stack.attachments]
    if stored.keys() != set(names):
        raise RecipeError(f"{path} has the state of {brief(sorted(stored))}, and the stack is {brief(names)}")


def _load_own_state(path: Path, attachment: Attachment, state: Mapping[str, Any]) -> None:
    """What it holds is the adapter's affair, and may be a plugin's: whatever it finds wrong is one message."""
    try:
        attachment.load_state(state)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as cause:
        raise RecipeError(
            f"{path}: the state of {attachment.name} does not fit this run: {type(cause).__name__}: {str(cause)[:200]}"
        ) from cause


def _restore_schedule(schedule: LRScheduler, optimizer: Optimizer, step: int) -> None:
    """Where it stood after a step; the rates are the recipe's, so that a changed one is not silently the old one."""
    assert isinstance(schedule, LambdaLR)  # all of transformers' are that `schedule` may name
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1})
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
