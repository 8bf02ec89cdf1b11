"""Checkpoint folders that a stranger made to do harm: passed over, or refused; nothing in them is executed or followed.

Where their checksums do not hold, they are damaged: set aside, and the one before is used. Where these hold, somebody
made them so: one message, exit code 2, and the run's folder is as it was.
"""

import base64
import json
import os
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
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from onegpu.adapters.files import damage, seal
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
        save_file(
            {k: t.clone().contiguous() for k, t in change(tensors).items()}, folder / file, metadata={"format": "pt"}
        )

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
    "a version that is an object": (_put("environment.peft", {}), "'environment.peft"),
    "no process": (_put("environment.processes", 0), "'environment.processes': "),
    "an unknown key": (_put("import", MODULE), "'import': unknown key"),
    "an unknown key inside": (_put("progress.module", MODULE), "'progress.module': unknown key"),
    "another optimiser": (_put("optimizer.kind", MODULE), f"'{MODULE}', and the recipe asks for AdamW"),
    "a value that the optimiser has not": (_put("optimizer.values", {"a/b": 1}), "it has a state of 'a', and the run"),
    "values as text": (_put("optimizer.values", {"a/b": "1"}), "'optimizer.values.a/b': "),
    "scaling where nothing is scaled": (
        _put("scaler", torch.amp.GradScaler("cpu").state_dict()),
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
        "has 'exp_avg_sq, step', and AdamW keeps 'exp_avg, exp_avg_sq, step'",
    ),
    "moments of a stranger": (_tensors(OPTIMIZER, lambda t: t | {"a/exp_avg": torch.ones(1)}), "it has a state of 'a'"),
    "moments without a path": (_tensors(OPTIMIZER, lambda t: {"": torch.ones(1)}), "it has a state of ''"),
    "moments that lie": (_lie, "optimizer.safetensors is damaged"),
    "moments that are a pickle": (_bytes(OPTIMIZER, pickle.dumps(Payload(Path("x")))), "tensors is damaged"),
    "no random states": (_tensors(RANDOM, lambda t: {}), "has the states of [], and must have those of cpu"),
    "random states of a stranger": (_tensors(RANDOM, lambda t: t | {"mps": t["cpu"]}), "['cpu', 'mps'], and must"),
    "random states too short": (_tensors(RANDOM, lambda t: {"cpu": t["cpu"][:, :9]}), "cpu is [1, 9] of uint8"),
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


def _judge(spoil: Spoil, told: str, stopped: Path, onegpu: Command, folder_bytes: Bytes) -> str | None:
    """What is wrong with how a resumed run answered to a checkpoint that was spoilt and sealed again."""
    run = stopped.parent / "run"
    spoil(newest := _newest(stopped.parent))
    seal(newest if newest.is_dir() else _newest(stopped.parent))
    before = folder_bytes(run)
    code, out, err = onegpu("run", str(stopped), "-o", str(run), "--resume")
    message = err.rpartition("\nonegpu: ")[2] or err
    if code != 2 or told not in message or "Traceback" in err or len(message) > 1500:
        return f"exit {code}: {err[-1500:]}"
    if "resumed" in out or "damaged" in out.replace("is damaged", ""):
        return out
    return None if folder_bytes(run) == before else "the folder of the run changed"


def test_what_was_sealed_again_is_one_message_and_nothing_is_restored(
    stopped: Path, onegpu: Command, folder_bytes: Bytes, audit: Callable[[], Any], tmp_path: Path
) -> None:
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit(9)\n")
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    wrong = {}
    with pytest.MonkeyPatch.context() as patch, audit() as events:
        patch.syspath_prepend(tmp_path)
        for name, (spoil, told) in SEALED.items():
            _again(tmp_path / "good", tmp_path)
            if fault := _judge(spoil, told, stopped, onegpu, folder_bytes):
                wrong[name] = fault
    assert not wrong, json.dumps(wrong, indent=1)
    assert any("state.json" in event for event in events)  # it did listen
    assert not [e for e in events if MODULE in e or e.startswith(("subprocess", "os.", "socket", "pickle"))]


def test_the_checkpoint_that_was_spoilt_is_one_to_resume_from(stopped: Path, onegpu: Command, tmp_path: Path) -> None:
    seal(_newest(tmp_path))
    code, out, err = onegpu("run", str(stopped), "-o", str(tmp_path / "run"), "--resume")
    assert (code, "after step 4" in out) == (0, True), err


def _pickle_everywhere(folder: Path) -> None:
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "adapter/adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(folder.parents[2] / "executed")))


def _link(name: str) -> Spoil:
    """The same bytes, by a link to what lies outside."""

    def spoil(folder: Path) -> None:
        outside = folder.parents[2] / f"outside-{Path(name).name}"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return spoil


def _pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def _folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


# What was changed after the folder was sealed, and what is told of it.
DAMAGED: dict[str, tuple[Spoil, str]] = {
    "pickles beside": (_pickle_everywhere, "adapter/adapter_model.bin does not belong there"),
    "a pickle as optimiser": (_bytes(OPTIMIZER, pickle.dumps(Payload(Path("x")))), "has other bytes"),
    "a linked file": (_link("adapter/adapter_config.json"), "adapter/adapter_config.json is a link"),
    "a linked folder": (_link("adapter"), "adapter is a link"),
    "linked checksums": (_link("checksums.json"), "checksums.json is a link"),
    "a link to nowhere": (lambda folder: (folder / "x").symlink_to("/nowhere"), "x is a link"),
    "a pipe as checksums": (_pipe("checksums.json"), "checksums.json is not a file"),
    "a pipe as state": (_pipe(STATE), "state.json is not a file"),
    "a pipe beside": (_pipe("x"), "x is not a file"),
    "a folder as checksums": (
        _folder("checksums.json"),
        "checksums.json is damaged",
    ),
    "checksums that are deep": (_bytes("checksums.json", b'{"a":' * 9999), "checksums.json is damaged"),
    "checksums that are a list": (_bytes("checksums.json", b"[]"), "checksums.json is damaged"),
    "checksums given twice": (_bytes("checksums.json", b'{"a": 1, "a": 2}'), "checksums.json is damaged"),
    "large checksums": (_bytes("checksums.json", b'{"a": "' + b"x" * LARGEST + b'"}'), "checksums.json is damaged"),
    "checksums that move the cursor": (_bytes("checksums.json", b'{"\\u001b[2J": "a"}'), "\\x1b[2J is missing"),
    "a long name": (_bytes("checksums.json", b'{"' + b"x" * 10**6 + b'": "a"}'), "xxx"),
}  # fmt: skip


def test_what_was_damaged_or_leads_out_is_passed_over(
    stopped: Path, onegpu: Command, audit: Callable[[], Any], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    for name, (spoil, told) in DAMAGED.items():
        _again(tmp_path / "good", tmp_path)
        spoil(_newest(tmp_path))
        with audit() as events:
            found = damage(_newest(tmp_path))
        assert found is not None, name
        assert told in found, (name, found)
        assert len(found) < 700, name
        assert not [event for event in events if "outside-" in event], name
    code, out, err = onegpu("run", str(stopped), "-o", str(tmp_path / "run"), "--resume")
    assert code == 0, err
    assert "set aside as damaged-000004" in out
    assert not (tmp_path / "executed").exists()


def test_a_linked_checkpoint_is_damaged(stopped: Path, tmp_path: Path) -> None:
    shutil.move(_newest(tmp_path), tmp_path / "outside")
    (tmp_path / "run/checkpoints/step-000004").symlink_to(tmp_path / "outside")
    assert damage(_newest(tmp_path)) == "it is a link"


EIGHT_BITS: dict[str, tuple[Spoil, str]] = {
    "a state of floats": (_moments("/state1", Tensor.float), "of float32, and must be"),
    "a table that is short": (_moments("/qmap1", lambda t: t[:9]), "qmap1 is [9] of float32, and must be [256]"),
    "a scale without bound": (_moments("/absmax1", _with(float("inf"))), "values that are not finite"),
    "a scale of squares below zero": (_moments("/absmax2", _with(-1.0)), "has negative values"),
    "a step below one": (
        _state(lambda s: s["optimizer"]["values"].update(dict.fromkeys(s["optimizer"]["values"], 0))),
        "/step is 0, and the run did 4 steps",
    ),
    "no steps": (_put("optimizer.values", {}), ", and AdamW8bit keeps"),
}


def test_the_8_bit_state_is_held_against_its_tensors(
    chat_recipe: Callable[..., Loaded], onegpu: Command, folder_bytes: Bytes, tmp_path: Path
) -> None:
    train = {"steps": 6, "checkpoint_every": 2, "optimizer": "adamw-8bit"}
    stopped = _stopped(chat_recipe([{"lora": {"rank": 64}}], train=train), onegpu, tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    for name, (spoil, told) in EIGHT_BITS.items():
        _again(tmp_path / "good", tmp_path)
        assert _judge(spoil, told, stopped, onegpu, folder_bytes) is None, name


def _sums(change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change the first of the sums that AdaLoRA keeps of what its tensors were worth."""

    def inside(content: Any) -> None:
        sums = load(base64.b64decode(content["adapters"]["adalora"]["importance"]))
        first = min(sums)
        sums[first] = change(sums[first])
        content["adapters"]["adalora"]["importance"] = base64.b64encode(save(sums)).decode()

    return _state(inside)


def _first_to(content: dict[str, Any], value: Any) -> None:
    content[min(content)] = value


OWN = "adapters.adalora"
OWN_STATES: dict[str, tuple[Spoil, str]] = {
    "none": (_put(OWN, {}), "the state of adalora does not fit this run: KeyError"),
    "no text": (_put(f"{OWN}.importance", 7), "the state of adalora does not fit this run: TypeError"),
    "no bytes": (_put(f"{OWN}.importance", "%%"), "the state of adalora does not fit this run"),
    "no tensors": (_put(f"{OWN}.importance", "AAAA"), "the state of adalora does not fit this run"),
    "ranks of strangers": (_put(f"{OWN}.rank_pattern", {"x": [True]}), "rank_pattern is {'x': [True]}, and must name"),
    "ranks as text": (_put(f"{OWN}.rank_pattern", "abc"), "rank_pattern is 'abc', and must name"),
    "ranks as numbers": (
        _state(lambda s: _first_to(s["adapters"]["adalora"]["rank_pattern"], [1])),
        "is [1], and must be 4 times yes or no",
    ),
}  # fmt: skip
WORTH: dict[str, tuple[Spoil, str]] = {
    "another shape": (_sums(lambda t: t[:1].clone()), "importance: exp_avg_ipt/"),
    "no numbers": (_sums(_with(float("nan"))), "has values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("tfinal", "cases"), [(3, OWN_STATES), (0, WORTH)], ids=["ranks", "worth"])
def test_the_own_state_of_an_adapter_is_held_against_its_tensors(
    tfinal: int,
    cases: dict[str, tuple[Spoil, str]],
    chat_recipe: Callable[..., Loaded],
    onegpu: Command,
    folder_bytes: Bytes,
    tmp_path: Path,
) -> None:
    adapter = {"adalora": {"total_step": 6, "tfinal": tfinal, "init_r": 4, "target_r": 2}}
    stopped = _stopped(chat_recipe([adapter], train={"steps": 6, "checkpoint_every": 2}), onegpu, tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    for name, (spoil, told) in cases.items():
        _again(tmp_path / "good", tmp_path)
        assert _judge(spoil, told, stopped, onegpu, folder_bytes) is None, name
    _again(tmp_path / "good", tmp_path)
    code, out, err = onegpu("run", str(stopped), "-o", str(tmp_path / "run"), "--resume")
    assert (code, "after step 4" in out) == (0, True), err
