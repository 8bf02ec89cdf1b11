"""27. Shared adapters and checkpoints that run code.

Met: pickles in checkpoints and random states, import paths in configurations that a loader follows, settings that turn
on the code of a remote repository.

Here: everything is safetensors and JSON, and there is no way to a pickle; no text of a folder is imported or followed;
the code of plugins comes from installed distributions only, and those that may not load can be bounded.

Also: tests/test_nothing_is_executed.py, tests/adapters/test_hostile.py, tests/recipes/test_plugins.py
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from onegpu.adapters import OnegpuError, attach, load, save
from onegpu.recipes import Loaded, Outcome

Fresh = Callable[..., PreTrainedModel]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


class _Audit:
    """What the interpreter was asked to do; a hook can never be taken off again, so that it is switched."""

    def __init__(self) -> None:
        self.on, self.events = False, list[tuple[str, str]]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in (
            "import",
            "open",
            "subprocess.Popen",
            "os.system",
            "socket.connect",
            "pickle.find_class",
        ):
            self.events.append((event, " ".join(map(str, args))))


@pytest.fixture(scope="module")
def audit() -> Callable[[], Any]:
    """`with audit() as events:` what is imported, opened, started, connected to and unpickled."""
    heard = _Audit()

    @contextmanager
    def listen() -> Iterator[list[tuple[str, str]]]:
        heard.events.clear()
        heard.on = True
        try:
            yield heard.events
        finally:
            heard.on = False

    return listen


@pytest.fixture
def adapter(fresh: Fresh, tmp_path: Path) -> Path:
    """A folder with a trap in every file that any program would unpickle."""
    folder = tmp_path / "adapter"
    save(attach(fresh(), ["lora"]), folder)
    for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    return folder


def _say(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def test_the_trap_and_the_audit_work(tmp_path: Path, audit: Callable[[], Any]) -> None:
    with audit() as events:
        pickle.loads(pickle.dumps(Trap(tmp_path / "executed")))
        (tmp_path / "something").write_text("")
    assert (tmp_path / "executed").exists()
    assert {"open", "pickle.find_class"} <= {event for event, _ in events}


def test_no_pickle_is_opened(adapter: Path, fresh: Fresh, audit: Callable[[], Any], tmp_path: Path) -> None:
    model = fresh()
    with audit() as events:
        assert load(model, adapter).trainable()
    opened = {Path(text.split(" ")[0]).name for event, text in events if event == "open" and "adapter" in text}
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} >= opened
    assert opened
    (adapter / "adapter_model.safetensors").unlink()
    with audit() as again, pytest.raises(OnegpuError, match=r"adapter_model\.safetensors is missing"):
        load(fresh(), adapter)
    assert not {event for event, _ in [*events, *again]} & {"pickle.find_class", "subprocess.Popen", "socket.connect"}
    assert not (tmp_path / "executed").exists()


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a class to import": (
        "adapter_config.json",
        lambda c: c.update(auto_mapping={"base_model_class": "Trap", "parent_library": "hostile_module"}),
    ),
    "a tokenizer with code": (
        "adapter_config.json",
        lambda c: c.update(tokenizer_kwargs={"trust_remote_code": True}, tokenizer_name_or_path="hostile_module"),
    ),
    "an import path for an adapter": (
        "manifest.json",
        lambda c: c["adapters"][0].update(adapter="hostile_module:Trap", distribution="onegpu"),
    ),
    "an unknown distribution": ("manifest.json", lambda c: c["adapters"][0].update(distribution="hostile_module")),
    "a folder outside": ("manifest.json", lambda c: c["adapters"][0].update(folder="../hostile_module")),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_no_text_of_a_folder_is_imported_or_followed(
    how: str, adapter: Path, fresh: Fresh, audit: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path)!r}, 'executed').touch()\n"
    )
    shutil.copytree(adapter, tmp_path / "hostile_module")  # what a path out of the folder would find
    monkeypatch.syspath_prepend(tmp_path)
    name, change = HOSTILE[how]
    _say(adapter / name, change)
    model = fresh()
    with audit() as events, pytest.raises(OnegpuError):
        load(model, adapter)
    assert events
    assert [text for event, text in events if event in ("import", "open") and "hostile_module" in text] == []
    assert not (tmp_path / "executed").exists()


def test_a_run_writes_no_pickle(recipe: Callable[..., Loaded], run: Callable[..., Outcome], tmp_path: Path) -> None:
    run(recipe(train={"steps": 2, "checkpoint_every": 1}))
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".html", ".lock", ""}
    assert ".safetensors" in suffixes
