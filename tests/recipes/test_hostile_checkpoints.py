"""Checkpoint folders that a stranger made to do harm: passed over, or refused; nothing in them is executed or followed.

Where their checksums do not hold, they are damaged: set aside, and the one before is used. Where these hold, somebody
made them so: one message, exit code 2, and the run's folder is as it was.
"""

import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onegpu.adapters.untrusted import LARGEST
from onegpu.recipes import Loaded

Command = Callable[..., tuple[int, str, str]]
Bytes = Callable[[Path], dict[str, bytes]]
Spoil = Callable[[Path], object]

MODULE = "hostile_checkpoint_module"
STATE, OPTIMIZER, RANDOM = "state.json", "optimizer.safetensors", "random.safetensors"
HEARD = ("import", "open", "subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class")


class Payload:
    """Unpickling one leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


class _Audit:
    """What the interpreter was asked to do; a hook can never be taken off again, so that it is switched."""

    def __init__(self) -> None:
        self.on, self.events = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in HEARD:
            self.events.append(f"{event} {' '.join(map(str, args))}")


@pytest.fixture(scope="module")
def audit() -> Callable[[], Any]:
    """`with audit() as events:` what is imported, opened, started, connected to and unpickled."""
    heard = _Audit()

    @contextmanager
    def listen() -> Iterator[list[str]]:
        heard.events.clear()
        heard.on = True
        try:
            yield heard.events
        finally:
            heard.on = False

    return listen


def _state(change: Callable[[Any], object]) -> Spoil:
    """Change what state.json says."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / STATE).read_text("utf-8"))
        change(content)
        (folder / STATE).write_text(json.dumps(content), "utf-8")

    return spoil


def _put(path: str, value: Any) -> Spoil:
    """Put a value at a place in state.json, such as `progress.selection.step`."""
    *above, last = path.split(".")

    def change(content: Any) -> None:
        for key in above:
            content = content[int(key) if isinstance(content, list) else key]
        content[int(last) if isinstance(content, list) else last] = value

    return _state(change)


def _drop(path: str) -> Spoil:
    *above, last = path.split(".")

    def change(content: Any) -> None:
        for key in above:
            content = content[key]
        del content[last]

    return _state(change)


def _tensors(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        (folder / file).unlink()
        save_file({k: t.contiguous() for k, t in change(tensors).items()}, folder / file, metadata={"format": "pt"})

    return spoil


def _moments(ending: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change the tensors of the optimiser's state whose names end so."""

    def all_of_them(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert any(name.endswith(ending) for name in tensors), tensors.keys()
        return {name: change(tensor) if name.endswith(ending) else tensor for name, tensor in tensors.items()}

    return _tensors(OPTIMIZER, all_of_them)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def _bytes(file: str, content: bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(content)


def _large(folder: Path) -> None:
    (folder / STATE).write_bytes(b'{"progress": {}, "' + b"x" * (LARGEST + 2**21) + b'": {}}')


def _lie(folder: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    (folder / OPTIMIZER).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def _renamed(folder: Path) -> None:
    folder.rename(folder.with_name("step-000009"))


# What was changed before the folder was sealed again, and what the message says.
SEALED: dict[str, tuple[Spoil, str]] = {
    "progress without selection": (_drop("progress.selection"), "'progress.selection': this key is needed"),
    "no progress": (_drop("progress"), "'progress': this key is needed"),
    "progress is a list": (_put("progress", [1]), "'progress': "),
    "a step as text": (_put("progress.step", "2"), "'progress.step': must be a valid integer, not '2'"),
    "a step below zero": (_put("progress.step", -5), "'progress.step': must be greater than or equal to 1, not -5"),
    "step zero": (_put("progress.step", 0), "'progress.step': must be"),
    "a step with a point": (_put("progress.step", 4.0), "'progress.step': must be a valid integer"),
    "a step that is true": (_put("progress.step", True), "'progress.step': must be a valid integer, not True"),
    "another step": (_put("progress.step", 3), "says that it was written after step 3"),
    "a step beyond the run": (_put("progress.step", 10**30), "says that it was written after step 1000"),
    "another name": (_renamed, "step-000009 says that it was written after step 4"),
    "scores as text": (_put("progress.scores", "abc"), "'progress.scores': "),
    "scores of text": (_put("progress.scores", [{"loss": "0"}]), "'progress.scores.0.loss': "),
    "changes as text": (_put("progress.changes", "zz"), "'progress.changes': "),
    "a change to come": (_put("progress.changes", [{"step": 5, "changed": []}]), "changed after step 5"),
    "a best step that is a path": (_put("progress.selection.step", "../../x"), "'progress.selection.step': "),
    "a best step to come": (_put("progress.selection.step", 5), "the best step is 5, and only 4 were done"),
    "a best step without scores": (_put("progress.selection.scores", {}), "has no score 'loss' of step"),
    "waited below zero": (_put("progress.selection.waited", -1), "'progress.selection.waited': "),
    "waited too long": (_put("progress.selection.waited", 99), "99 evaluations were waited for"),
    "environment is a list": (_put("environment", [1]), "'environment': "),
    "environment without a version": (_drop("environment.torch"), "'environment.torch': this key is needed"),
    "a version that is an object": (_put("environment.peft", {}), "'environment.peft': "),
    "no process": (_put("environment.processes", 0), "'environment.processes': "),
    "more processes than random states": (_put("environment.processes", 2), "and must be [2, "),
    "an unknown key": (_put("import", MODULE), "'import': unknown key"),
    "an unknown key inside": (_put("progress.module", MODULE), "'progress.module': unknown key"),
    "another optimiser": (_put("optimizer.kind", MODULE), f"has the state of '{MODULE}', and the recipe asks for AdamW"),
    "a value that the optimiser has not": (_put("optimizer.values", {"a/b": 1}), "it has a state of 'a', and the run"),
    "values as text": (_put("optimizer.values", {"a/b": "1"}), "'optimizer.values.a/b': "),
    "scaling where nothing is scaled": (
        _put("scaler", {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9} | {"_growth_tracker": 0}),
        "and here it is {}",
    ),
    "another adapter": (_put("adapters", {"other": {}}), "has the state of ['other'], and the stack is ['lora']"),
    "adapters as a list": (_put("adapters", []), "'adapters': "),
    "python's state as text": (_put("random.python", "abc"), "'random.python"),
    "python's state of another kind": (_put("random.python.0", 2), "'random.python.0': "),
    "python's state too short": (_put("random.python.1", [1, 2]), "'random': the state of Python's generator"),
    "python's place beyond its state": (_put("random.python.1.624", 625), "'random': the state of Python's generator"),
    "numpy's state of a word": (_put("random.numpy.1", [1]), "'random.numpy.1': "),
    "numpy's words below zero": (_put("random.numpy.1.0", -1), "'random.numpy.1.0': "),
    "numpy's place beyond its state": (_put("random.numpy.2", 10**6), "'random.numpy.2': "),
    "numpy's state is short": (_put("random.numpy", ["MT19937"]), "'random.numpy"),
    "state that is a list": (_bytes(STATE, b"[]"), "must hold one JSON object"),
    "state that is deep": (_bytes(STATE, b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested too deeply"),
    "a number that is none": (_put("progress.scores", [{"loss": float("nan")}]), "NaN is no JSON number"),
    "a key given twice": (_bytes(STATE, b'{"progress": {}, "progress": {}}'), "the key 'progress' is given twice"),
    "state that is large": (_large, "nothing of that kind is so large"),
    "state that is a pickle": (_bytes(STATE, pickle.dumps(Payload(Path("x")))), "is not JSON"),
    "moments of another shape": (_moments("exp_avg", lambda t: t.repeat(2, 1)), "of float32, and must be ["),
    "moments of whole numbers": (_moments("exp_avg", lambda t: t.to(torch.int32)), "of int32, and must be ["),
    "moments of another width": (_moments("exp_avg_sq", Tensor.half), "of float16, and must be ["),
    "a moment that is not a number": (_moments("exp_avg", _with(float("nan"))), "values that are not finite"),
    "a moment without bound": (_moments("exp_avg_sq", _with(float("inf"))), "values that are not finite"),
    "a square below zero": (_moments("exp_avg_sq", _with(-1.0)), "has negative values"),
    "a count below one": (_moments("/step", _with(0.0)), "/step is 0, and the run did 4 steps"),
    "a count beyond the run": (_moments("/step", _with(5.0)), "/step is 5, and the run did 4 steps"),
    "a count between two": (_moments("/step", _with(1.5)), "/step is 1.5, and the run did 4 steps"),
    "moments of which one is missing": (
        _tensors(OPTIMIZER, lambda t: {k: v for k, v in t.items() if not k.endswith("exp_avg")}),
        "has exp_avg_sq, step, and AdamW keeps 'exp_avg, exp_avg_sq, step'",
    ),
    "moments of a stranger": (_tensors(OPTIMIZER, lambda t: t | {"a/exp_avg": torch.ones(1)}), "it has a state of 'a'"),
    "moments without a path": (_tensors(OPTIMIZER, lambda t: {"": torch.ones(1)}), "it has a state of ''"),
    "moments that lie": (_lie, "optimizer.safetensors is damaged"),
    "moments that are a pickle": (_bytes(OPTIMIZER, pickle.dumps(Payload(Path("x")))), "optimizer.safetensors is damaged"),
    "no random states": (_tensors(RANDOM, lambda t: {}), "has the states of [], and must have those of cpu"),
    "random states of a stranger": (_tensors(RANDOM, lambda t: t | {"mps": t["cpu"]}), "['cpu', 'mps'], and must"),
    "random states too short": (_tensors(RANDOM, lambda t: {"cpu": t["cpu"][:, :9]}), "cpu is [1, 9] of uint8, and must"),
    "random states of no process": (_tensors(RANDOM, lambda t: {"cpu": t["cpu"][:0]}), "cpu is [0, "),
    "random states of one number": (_tensors(RANDOM, lambda t: {"cpu": t["cpu"][0, 0]}), "cpu is [] of uint8"),
    "random states of floats": (_tensors(RANDOM, lambda t: {"cpu": t["cpu"].float()}), "of float32, and must be"),
    "random states that are none": (
        _tensors(RANDOM, lambda t: {"cpu": torch.full_like(t["cpu"], 255)}),
        "cpu is no state of a generator",
    ),
    "an adapter that is a pickle": (
        _bytes("adapter/adapter_model.safetensors", pickle.dumps(Payload(Path("x")))),
        "adapter_model.safetensors is damaged",
    ),
}  # fmt: skip


@pytest.fixture
def stopped(chat_recipe: Callable[..., Loaded], onegpu: Command, tmp_path: Path) -> Path:
    """The recipe of a run that has checkpoints and no result, in `run/`."""
    train = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "best": {"metric": "loss"}}
    return _stopped(chat_recipe(task={"evaluation": 0.2}, train=train), onegpu, tmp_path)


def _stopped(loaded: Loaded, onegpu: Command, tmp_path: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(loaded.as_yaml())
    assert onegpu("run", str(recipe), "-o", str(tmp_path / "run"))[0] == 0
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    assert _newest(tmp_path).name == "step-000004"
    return recipe


def _newest(tmp_path: Path) -> Path:
    return max((tmp_path / "run" / "checkpoints").glob("step-*"))


def _again(to: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(to, tmp_path / "run", symlinks=True)
