"""A full disk, a folder that may not be written, too many open files: one message, and nothing earlier is lost."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import StorageError
from onegpu.adapters.files import damage
from onegpu.recipes import Loaded, Outcome, training
from onegpu.recipes.training import Session

TRAIN = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "best": {"metric": "loss"}}
CREATES = {"open", "os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp"}

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Bytes = Callable[[Path], dict[str, bytes]]


class Disk:
    """Refuses, when there is no room any more, whatever creates or opens a file for writing below a folder."""

    def __init__(self) -> None:
        self.folder, self.room, self.refusals, self.code = "", 0, 0, errno.ENOSPC
        sys.addaudithook(self.look)  # there is no taking it away again

    def look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or event not in CREATES or not any(self.folder in str(a) for a in args):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.room -= 1
        if self.room < 0:
            self.refusals += 1
            raise OSError(self.code, os.strerror(self.code), str(args[0]))


@pytest.fixture(scope="module")
def hook() -> Disk:
    """One for all tests."""
    return Disk()


@pytest.fixture
def disk(hook: Disk) -> Iterator[Disk]:
    """A disk with room for ever, until a test says otherwise."""
    yield hook
    hook.folder = ""


@pytest.fixture
def loaded(chat_recipe: Recipe) -> Loaded:
    """Six steps with a checkpoint at every other one."""
    return chat_recipe(task={"evaluation": 0.2}, train=TRAIN)


def _check_whole_and_resumable(message: str, loaded: Loaded, run: Run, folder_bytes: Bytes, out: Path) -> None:
    assert "\n" not in message
    assert ("go on with --resume" in message) == (out / "recipe.yaml").is_file()  # else there is nothing to go on with
    assert folder_bytes(run(loaded, resume=True).adapter) == folder_bytes(run(loaded, "straight").adapter)


@pytest.mark.parametrize(
    ("room", "code"), [(3, errno.ENOSPC), (15, errno.EROFS), (28, errno.ENOSPC), (45, errno.EIO), (70, errno.ENOSPC)]
)
def test_a_disk_that_takes_no_more_from_any_time_on(
    room: int, code: int, disk: Disk, loaded: Loaded, run: Run, folder_bytes: Bytes, tmp_path: Path
) -> None:
    disk.folder, disk.room, disk.code = str(tmp_path / "out"), room, code
    with pytest.raises(StorageError, match=f"was not written: {os.strerror(code)}") as caught:
        run(loaded)
    assert disk.refusals
    disk.folder = ""
    assert caught.value.exit_code == 3
    _check_whole_and_resumable(str(caught.value), loaded, run, folder_bytes, tmp_path / "out")


@contextmanager
def _limited(kind: int, to: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (to, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _lowest_free_handle() -> int:
    """With this limit no other can be had."""
    handle = os.open(os.devnull, os.O_RDONLY)
    os.close(handle)
    return handle


def _in_checkpoint(number: int, monkeypatch: pytest.MonkeyPatch, limit: Callable[[], tuple[int, int]]) -> None:
    """A limit of the process while the checkpoint of one step is written."""
    real = training._checkpoint

    def checkpoint(s: Session, *args: Any) -> None:
        if s.step != number:
            return real(s, *args)
        with _limited(*limit()):
            return real(s, *args)

    monkeypatch.setattr(training, "_checkpoint", checkpoint)


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (lambda: (resource.RLIMIT_NOFILE, _lowest_free_handle()), "Too many open files"),
        (lambda: (resource.RLIMIT_FSIZE, 2000), "File too large"),
    ],
    ids=["handles", "size"],
)
def test_limits_of_the_process(
    limit: Callable[[], tuple[int, int]],
    told: str,
    loaded: Loaded,
    run: Run,
    folder_bytes: Bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with monkeypatch.context() as patch:
        _in_checkpoint(4, patch, limit)
        with pytest.raises(StorageError, match=rf"was not written: {told}") as caught:
            run(loaded)
    left = {path.name for path in (tmp_path / "out/checkpoints").iterdir()}
    assert "step-000002" in left
    assert not {name for name in left if "000004" in name and not name.startswith("best")}
    _check_whole_and_resumable(str(caught.value), loaded, run, folder_bytes, tmp_path / "out")


def test_a_damaged_disk_is_told_from_a_shortage_of_handles(
    loaded: Loaded, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # If it were not, checkpoints that are whole would be set aside.
    run(loaded)
    with _limited(resource.RLIMIT_NOFILE, _lowest_free_handle()), pytest.raises(StorageError, match="Too many open"):
        damage(tmp_path / "out/checkpoints/step-000004")
    assert damage(tmp_path / "out/checkpoints/step-000004") is None


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted("size=100k")`: the folder of a small file system of its own, where this user may have one."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("only root may mount")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_real_disk_that_is_full(
    mounted: Callable[..., Path], loaded: Loaded, run: Run, folder_bytes: Bytes, tmp_path: Path
) -> None:
    disk = mounted("size=160k")
    with pytest.raises(StorageError, match="was not written: No space left on device") as caught:
        run(loaded, "mounted/out")
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert "go on with --resume" in str(caught.value)
    resumed = run(loaded, "mounted/out", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(run(loaded, "straight").adapter)


def test_a_read_only_disk_is_refused_before_anything_is_computed(
    mounted: Callable[..., Path], loaded: Loaded, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted("ro")
    monkeypatch.setattr("onegpu.recipes.running.preflight", None)
    with pytest.raises(StorageError, match=r"mounted/out cannot be written: .*mounted is read-only for you"):
        run(loaded, "mounted/out")


def test_what_the_machine_refuses_elsewhere_is_one_line_too(
    onegpu: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "config.json")

    monkeypatch.setattr("onegpu.recipes.loading.load_recipe", refuse)
    code, _, err = onegpu("run", "quickstart")
    assert (code, err) == (3, f"onegpu: [Errno {errno.EMFILE}] Too many open files: 'config.json'\n")
