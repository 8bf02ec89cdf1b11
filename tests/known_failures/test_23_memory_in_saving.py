"""23. Memory or the disk ends while saving or merging.

Met: a merge makes a full copy, a checkpoint holds the optimiser's state of a frozen base, the disk is full halfway and
the last good state is gone.

Here: checkpoints hold the adapter and its moments, never the base, and only the last two are kept; a write that fails
leaves what was there.

Not yet: merging shard by shard, and asking for room on the disk beforehand, come with export.

Also: tests/adapters/test_files.py, tests/recipes/test_runfolder.py
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import StorageError, artefact, attach, save
from onegpu.recipes import Loaded, Outcome


def test_a_checkpoint_holds_the_adapter_and_its_moments_only(
    recipe: Callable[..., Loaded],
    run: Callable[..., Outcome],
    tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    outcome = run(recipe([{"lora": {"rank": 2}}], train={"steps": 6, "checkpoint_every": 1}))
    adapter = sum(tensor.nbytes for tensor in tensors(outcome.adapter).values())
    kept = sorted((tmp_path / "out/checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-000005", "step-000006"]
    held = tensors(kept[-1])
    random = sum(t.nbytes for key, t in held.items() if key.startswith("random"))
    steps = sum(t.nbytes for key, t in held.items() if key.endswith("/step"))
    assert sum(t.nbytes for t in held.values()) - random - steps == 3 * adapter


def test_a_full_disk_leaves_the_adapter_that_was_there(
    fresh: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Any
) -> None:
    stack = attach(fresh(), ["lora"])
    save(stack, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    noise(stack.trainable())

    def full(tensors: Any, place: Path, **options: Any) -> None:
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        save(stack, tmp_path / "adapter")
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "adapter"))] == ["adapter"]
