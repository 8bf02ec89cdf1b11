"""Checkpoint folders that a stranger made to do harm: resumed from another, or refused; nothing in them is executed."""

import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.recipes import Loaded

Command = Callable[..., tuple[int, str, str]]


class Payload:
    """Unpickling one leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def _pickle_everywhere(folder: Path, trap: bytes) -> None:
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "adapter/adapter_model.bin"):
        (folder / name).write_bytes(trap)


def _pickle_as(name: str) -> Callable[[Path, bytes], object]:
    return lambda folder, trap: (folder / name).write_bytes(trap)


def _link(name: str, to: str) -> Callable[[Path, bytes], object]:
    def replace(folder: Path, trap: bytes) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return replace


def _lie(folder: Path, trap: bytes) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (folder / "optimizer.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


HARMLESS = {"pickles beside": _pickle_everywhere}
HARMFUL: dict[str, Callable[[Path, bytes], object]] = {
    "a pickle as optimiser": _pickle_as("optimizer.safetensors"),
    "a pickle as random states": _pickle_as("random.safetensors"),
    "a pickle as state": _pickle_as("state.json"),
    "a pickle as adapter": _pickle_as("adapter/adapter_model.safetensors"),
    "an adapter linked outside": _link("adapter/adapter_config.json", "/etc/hostname"),
    "tensors that lie": _lie,
    "no JSON": _pickle_as("state.json"),
}


@pytest.fixture
def stopped(chat_recipe: Callable[..., Loaded], onegpu: Command, tmp_path: Path) -> Path:
    """The recipe of a run that has checkpoints and no result, in `run/`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(chat_recipe(train={"steps": 4, "checkpoint_every": 2}).as_yaml())
    assert onegpu("run", str(recipe), "-o", str(tmp_path / "run"))[0] == 0
    shutil.rmtree(tmp_path / "run" / "adapter")
    return recipe


@pytest.mark.parametrize("name", [*HARMLESS, *HARMFUL])
def test_nothing_in_a_checkpoint_is_executed(name: str, stopped: Path, onegpu: Command, tmp_path: Path) -> None:
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    marker = tmp_path / "executed"
    (HARMLESS | HARMFUL)[name](checkpoint, pickle.dumps(Payload(marker)))
    code, _, err = onegpu("run", str(stopped), "-o", str(tmp_path / "run"), "--resume")
    assert not marker.exists()
    assert "Traceback" not in err
    assert code in ((0,) if name in HARMLESS else (0, 2, 3)), err  # 0: told, and begun again from an earlier state
    assert code == 0 or len(err) < 1500
