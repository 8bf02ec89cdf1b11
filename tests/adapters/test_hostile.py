"""Folders that a stranger made to do harm: each is refused, and nothing is executed, imported, fetched or filled."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from onegpu.adapters import attach, save

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MEMORY = 200 * 2**20  # bytes that all of them together may take
LONGEST = 1500  # characters of a message

Change = Callable[[Path], object]

# Loads one good folder, then the hostile ones, and writes down what happens in the process meanwhile.
PROGRAM = """
import json, resource, sys, warnings
from pathlib import Path
import torch
from onegpu.adapters import OnegpuError, load, load_base

warnings.simplefilter("ignore")
torch.set_num_threads(1)
base, good, *folders = sys.argv[1:]
model = load_base(base, precision="fp32")
for first in good.split(","):
    load(model, first).detach()  # what is imported lazily, is now
names = sorted(dict(model.named_modules()))
WATCHED = ("import", "open", "os.", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.")
events, watching = [], False

def hook(event, arguments):
    if watching and event.startswith(WATCHED):
        events.append([event, [str(argument)[:300] for argument in arguments[:1]]])

sys.addaudithook(hook)
report = {}
for folder in folders:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events.clear()
    watching = True
    try:
        load(model, folder).detach()
        outcome = ["loaded", ""]
    except OnegpuError as error:
        outcome = [error.exit_code, str(error)]
    except BaseException as error:
        outcome = [type(error).__name__, str(error)[:300]]
    watching = False
    took = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    whole = sorted(dict(model.named_modules())) == names
    report[folder] = {"outcome": outcome, "events": list(events), "took": took, "whole": whole}
print("REPORT " + json.dumps(report))
"""


class Payload:
    """Unpickling one leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def _write(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def alter(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return alter


def _record(**values: Any) -> Change:
    return _json(MANIFEST, lambda manifest: manifest["adapters"][0].update(values))


def _settings(**values: Any) -> Change:
    return _json(MANIFEST, lambda manifest: manifest["adapters"][0]["config"].update(values))


def _config(**values: Any) -> Change:
    return _json(CONFIG, lambda config: config.update(values))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def alter(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})

    return alter


def _header(header: Any, data: bytes = b"", *, length: int | None = None, hole: int = 0) -> Change:
    """A safetensors file by hand; `hole`: bytes that it claims and that take no room on the disk."""

    def alter(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        with (folder / TENSORS).open("wb") as file:
            file.write(struct.pack("<Q", len(text) if length is None else length) + text + data)
            file.truncate(file.tell() + hole)

    return alter


def _one(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {A_KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _linked(name: str, to: str) -> Change:
    def alter(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return alter


def _linked_folder(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    for name in (TENSORS, CONFIG):
        (folder / name).rename(outside / name)
    (folder / "inner").symlink_to(outside)
    _record(folder="inner")(folder)


def _piped(folder: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def _pickled(folder: Path) -> None:
    for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))
    (folder / TENSORS).unlink()


def _pickled_as_tensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))


def _poisoned(value: float) -> Change:
    return _tensors(lambda tensors: tensors[A_KEY].view(-1)[3:4].fill_(value))


DEEP = "[" * 100_000 + "]" * 100_000
REMOTE = {"parent_library": "hostile", "base_model_class": "Thing"}
# name -> (what is done to a folder of ours, what the message says)
OURS: dict[str, tuple[Change, str]] = {
    "pickles in place of tensors": (_pickled, "adapter_model.safetensors is missing"),
    "a pickle called tensors": (_pickled_as_tensors, "is damaged"),
    "auto mapping": (_config(auto_mapping=REMOTE), "adapter_config.json says auto_mapping"),
    "tokenizer kwargs": (_config(tokenizer_kwargs={"trust_remote_code": True}), "says tokenizer_kwargs"),
    "a class to import": (_record(adapter="hostile:Thing"), "needs the plugin"),
    "a module to import": (_record(distribution="hostile", adapter="hostile"), "needs the plugin"),
    "a long plugin name": (_record(distribution="x" * 100_000), "distribution: .*pattern"),
    "a path up": (_record(folder="../../.."), "lies outside the artefact"),
    "an absolute path": (_record(folder="/etc"), "lies outside the artefact"),
    "a path with a null": (_record(folder="a\0b"), "cannot be a path|lies outside|is missing"),
    "a very long path": (_record(folder="a" * 10_000), "cannot be|is missing"),
    "a name with slashes": (_record(name="../../x"), "name"),
    "a link to a file outside": (_linked(CONFIG, "/etc/hostname"), "lies outside the artefact"),
    "a link to a device": (_linked(TENSORS, "/dev/zero"), "lies outside the artefact"),
    "a manifest linked outside": (_linked(MANIFEST, "/etc/hostname"), "lies outside the artefact"),
    "a circle of links": (_linked(CONFIG, CONFIG), "cannot be a path|is missing"),
    "a folder linked outside": (_linked_folder, "lies outside the artefact"),
    "a pipe": (_piped, "is not a file"),
    "an oversized header": (_header(b"{}", length=2**62), "is damaged: its header is cut off"),
    "a large header": (_header(b"{" + b" " * 2**25 + b"}"), "more than enough"),
    "an empty header": (_header(b""), "is damaged"),
    "a header of zeros": (_write(TENSORS, bytes(64)), "is damaged"),
    "overlapping tensors": (_header(_one([1], [0, 4]) | {"b": _one([1], [0, 4])[A_KEY]}, b"0000"), "is damaged"),
    "a gap": (_header(_one([1], [4, 8]), b"00000000"), "is damaged"),
    "bytes after the end": (_header(_one([1], [0, 4]), b"00000000"), "is damaged"),
    "offsets beyond the end": (_header(_one([2**40], [0, 2**42]), b"0000"), "is damaged"),
    "offsets backwards": (_header(_one([1], [4, 0]), b"0000"), "is damaged"),
    "a shape that lies": (_header(_one([2**40], [0, 4]), b"0000"), "is damaged"),
    "a shape that overflows": (_header(_one([2**62, 4], [0, 0])), "is damaged"),
    "a negative shape": (_header(_one([-1], [0, 4]), b"0000"), "is damaged"),
    "an empty tensor of huge shape": (_header(_one([2**40, 0, 2**40], [0, 0])), "does not fit this model"),
    "a tensor of four terabytes": (_header(_one([2**40], [0, 2**42]), hole=2**42), "is damaged|does not fit"),
    "one tensor twice": (_header(b'{"a": {}, "a": {}}'), "is given twice"),
    "a deep header": (_header(b'{"a":' + DEEP.encode() + b"}"), "nested too deeply"),
    "a header that is no text": (_header(b'{"\xff": 1}'), "is damaged"),
    "a dtype of bits": (_header(_one([32, 16], [0, 256], "F4"), bytes(256)), "does not fit this model"),
    "other dtypes": (_tensors(lambda t: t.update({k: v.long() for k, v in t.items()})), "int64, and .* is needed"),
    "not a number": (_poisoned(float("nan")), f"{A_KEY} has values that are not finite"),
    "infinity": (_poisoned(float("-inf")), f"{A_KEY} has values that are not finite"),
    "a rank that fills the memory": (_settings(rank=10**9), "ask for .* bytes, and its tensors have"),
    "a rank of many digits": (_settings(rank=10**4000), "Overflow"),
    "deep JSON": (_write(MANIFEST, DEEP), "nested too deeply"),
    "deep enough to break who walks it": (
        _json(MANIFEST, lambda m: m.update(run={"a": json.loads("[" * 300 + "]" * 300)})),
        "nested too deeply",
    ),
    "huge JSON": (_write(MANIFEST, "[" + "0," * 2**24 + "0]"), "has more than"),
    "many adapters": (_json(MANIFEST, lambda m: m.update(adapters=m["adapters"] * 1000)), "two adapters|called"),
    "many folders": (
        _json(MANIFEST, lambda m: m.update(adapters=[m["adapters"][0] | {"folder": f"f{i}"} for i in range(5000)])),
        r"is missing; .* \(and \d+ more\)",
    ),
    "a key twice": (_write(CONFIG, '{"r": 16, "r": 17}'), "'r' is given twice"),
    "not UTF-8": (_write(CONFIG, b'{"r": "\xff"}'), "is not JSON"),
    "half a surrogate pair": (_write(CONFIG, '{"r": "\\ud800"}'), "is not JSON"),
    "no number": (_write(CONFIG, '{"r": NaN}'), "NaN is no JSON number"),
    "too large a number": (_write(CONFIG, '{"r": 1e999}'), "too large a number"),
    "a long key": (_config(**{"k" * 100_000: 1}), "adapter_config.json says kkk"),
    "a long value": (_config(r="v" * 100_000), "says r: 'vvv"),
    "foreign tensors": (_header({f"t{i}": _one([0], [0, 0])[A_KEY] for i in range(20_000)}), r"and \d+ more"),
}
# The same of a folder that stock PEFT saved.
THEIRS: dict[str, tuple[Change, str]] = {
    "PEFT: pickles": (_pickled, "pickles are never read"),
    "PEFT: a link to a device": (_linked(TENSORS, "/dev/zero"), "lies outside|is not an adapter folder"),
    "PEFT: a link outside": (_linked(CONFIG, "/etc/hostname"), "is not an adapter folder"),
    "PEFT: tokenizer kwargs": (_config(tokenizer_kwargs={"trust_remote_code": True}), "says? tokenizer_kwargs"),
    "PEFT: a plugin's import path": (_config(peft_type="hostile:Thing"), "knows no method"),
    "PEFT: an unknown setting": (_config(use_newthing="hostile"), "use_newthing, which PEFT here does not know"),
    "PEFT: an unknown method": (_config(peft_type="HOSTILE"), "knows no method"),
    "PEFT: not a number": (
        _tensors(lambda t: [v.fill_(float("nan")) for v in t.values()]),
        "has values that are not finite",
    ),
    "PEFT: a rank that fills the memory": (_config(r=10**9), "ask for .* bytes, and its tensors have"),
    "PEFT: deep JSON": (_write(CONFIG, DEEP), "is not an adapter folder"),
    "PEFT: a pattern that never ends": (_config(target_modules="(" * 200 + "a"), "cannot be used|no module|matches"),
}
# Harmless, because nobody looks: trainers leave such files beside their adapters.
IGNORED: dict[str, Change] = {
    "pickles beside tensors": lambda folder: [
        (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))
        for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin")
    ],
    "code beside tensors": lambda folder: [
        (folder / name).write_text("raise SystemExit('executed')")
        for name in ("hostile.py", "__init__.py", "conftest.py", "sitecustomize.py")
    ],
    "another base, as a folder": _config(base_model_name_or_path="/root/hostile"),
    "another base, as a hub id": _config(base_model_name_or_path="hostile/base"),
    "links nobody follows": lambda folder: (folder / "more").symlink_to("/"),
}


@pytest.fixture(scope="module")
def report(saved_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, Any]]:
    """What a process made of every case, by its name."""
    root = tmp_path_factory.mktemp("hostile")
    ours, theirs = root / "ours", root / "theirs"
    save(attach(LlamaForCausalLM.from_pretrained(saved_models["plain"]), ["lora"]), ours, source="tiny/plain")
    plain: Any = LlamaForCausalLM.from_pretrained(saved_models["plain"])
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(theirs))
    cases: dict[str, Path] = {}
    for original, changes in (
        (ours, {name: change for name, (change, _) in OURS.items()} | IGNORED),
        (theirs, {name: change for name, (change, _) in THEIRS.items()}),
    ):
        for name, change in changes.items():
            folder = Path(shutil.copytree(original, root / f"case-{len(cases)}"))
            change(folder)
            cases[name] = folder
    arguments = [str(saved_models["plain"]), f"{ours},{theirs}", *map(str, cases.values())]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (root / "executed").exists()
    found = json.loads(done.stdout.rpartition("REPORT ")[2])
    return {name: found[str(folder)] | {"folder": str(folder)} for name, folder in cases.items()}


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_it_is_refused_with_one_message(report: Mapping[str, dict[str, Any]], name: str) -> None:
    import re

    code, message = report[name]["outcome"]
    assert code in (2, 3), message
    assert re.search((OURS | THEIRS)[name][1], message), message
    assert len(message) <= LONGEST
    assert report[name]["whole"], "the model was changed"


@pytest.mark.parametrize("name", IGNORED)
def test_what_lies_beside_is_not_looked_at(report: Mapping[str, dict[str, Any]], name: str) -> None:
    assert report[name]["outcome"] == ["loaded", ""]


@pytest.mark.parametrize("name", [*OURS, *THEIRS, *IGNORED])
def test_nothing_is_executed_imported_fetched_or_read_elsewhere(
    report: Mapping[str, dict[str, Any]], name: str
) -> None:
    installed = tuple({*sys.path[1:], sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])} - {""})
    for event, (first, *_) in [(event, arguments or [""]) for event, arguments in report[name]["events"]]:
        if event == "import":
            assert "hostile" not in first
            assert first.partition(".")[0] in sys.stdlib_module_names | {"torch", "transformers", "peft", "onegpu"}, (
                first
            )
        elif event in ("open", "os.listdir", "os.scandir"):
            assert first.startswith((report[name]["folder"], *installed)) or first.isdigit(), (event, first)
            assert not first.endswith((".bin", ".pt", ".pth"))
        else:
            assert not event.startswith(("subprocess.", "socket.", "pickle.", "os.system", "os.exec"))
            assert event not in ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.posix_spawn", "os.fork")


def test_hardly_any_memory_is_taken(report: Mapping[str, dict[str, Any]]) -> None:
    took = {name: case["took"] for name, case in report.items()}
    assert took
    assert sum(took.values()) < MEMORY, sorted(took.items(), key=lambda item: -item[1])[:3]
