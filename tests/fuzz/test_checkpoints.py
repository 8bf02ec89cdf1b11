"""Malformed checkpoints, sealed again by whoever made them so: `--resume` goes on, or is refused in one message."""

import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from onegpu.adapters.files import seal
from onegpu.recipes import training

STATE, SEAL = "state.json", "checksums.json"
FILES = (STATE, STATE, STATE, "optimizer.safetensors", "random.safetensors", SEAL)
OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
Judge = Callable[[Path], None]


@pytest.fixture(scope="module")
def runs(bases: dict[str, str], data_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs that stopped after their second step, of every optimiser."""
    from onegpu.recipes import parse_recipe, run
    from onegpu.recipes.display import Display

    root = tmp_path_factory.mktemp("checkpoints")
    for optimizer in OPTIMIZERS:
        train = {"steps": 3, "effective_batch": 2, "precision": "fp32", "learning_rate": 0.5, "evaluate_every": 1}
        train |= {"optimizer": optimizer, "checkpoint_every": 2, "best": {"metric": "loss"}}
        content = {
            "base": bases["llama"],
            "adapters": [{"lora": {"rank": 64}}],
            "task": {"chat": {"data": data_files["chat"], "evaluation": 0.3}},
            "train": train,
        }
        loaded = parse_recipe(yaml.safe_dump(content), name="r", folder=root)
        run(loaded, root / optimizer, display=Display(quiet=True))
        (root / f"{optimizer}.yaml").write_text(loaded.as_yaml())
        shutil.rmtree(root / optimizer / "adapter")
    return [root / optimizer for optimizer in OPTIMIZERS]


@pytest.fixture
def judge(command: Any, runs: list[Path], tally: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Resumes a run; one more step is done, and no more is proved than that it can be."""
    monkeypatch.setattr(training, "frozen_base", lambda *_: None)

    def give(folder: Path) -> None:
        before = _content(folder / "checkpoints/step-000002")
        verdict = command("run", str(folder.parent / "recipe.yaml"), "-o", str(folder), "--resume")
        how = "resumed" if "after step 2" in verdict.out else "begun again" if verdict.code == 0 else ""
        tally[how or f"exit {verdict.code}"] += 1
        assert verdict.code in (0, 2, 3), verdict
        assert how or _content(folder / "checkpoints/step-000002") == before
        assert how or not (folder / "adapter").exists()

    return give


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _spoil_header(content: bytes, draw: Any, spoil: Any) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(spoil(draw, json.loads(content[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _spoil(file: Path, draw: Any, spoil: Any, spoil_bytes: Any) -> None:
    content = file.read_bytes()
    way = draw(st.sampled_from(("structure", "structure", "structure", "bytes", "gone")))
    if way == "gone":
        file.unlink()
    elif way == "bytes":
        file.write_bytes(spoil_bytes(draw, content))
    elif file.suffix == ".safetensors":
        file.write_bytes(_spoil_header(content, draw, spoil))
    else:
        file.write_text(json.dumps(_spoil_values(json.loads(content), draw, spoil)))


def _spoil_values(content: Any, draw: Any, spoil: Any) -> Any:
    """Of the state, one part: else nearly every change would be one of the numbers of a generator."""
    part = draw(st.sampled_from((None, *(sorted(content) if "random" in content else ()))))
    return spoil(draw, content) if part is None else content | spoil(draw, {part: content[part]})


def _check(judge: Judge, runs: list[Path], tmp_path: Path, spoil: Any, spoil_bytes: Any, data: st.DataObject) -> None:
    run = data.draw(st.sampled_from(runs))
    to = tmp_path / "run"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    shutil.copy(run.with_suffix(".yaml"), tmp_path / "recipe.yaml")
    shutil.rmtree(to / "checkpoints/step-000003", ignore_errors=True)
    checkpoint = to / "checkpoints/step-000002"
    file = checkpoint / data.draw(st.sampled_from(FILES))
    _spoil(file, data.draw, spoil, spoil_bytes)
    if file.name != SEAL:
        seal(checkpoint)
    judge(to)


@settings(max_examples=20)
@given(data=st.data())
def test_a_malformed_checkpoint_is_a_message(
    judge: Judge, runs: list[Path], tmp_path: Path, spoil: Any, spoil_bytes: Any, data: st.DataObject
) -> None:
    _check(judge, runs, tmp_path, spoil, spoil_bytes, data)


@pytest.mark.fuzz
def test_hundreds_of_malformed_checkpoints(
    judge: Judge, runs: list[Path], tmp_path: Path, spoil: Any, spoil_bytes: Any, tally: Counter[str]
) -> None:
    @settings(max_examples=520)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check(judge, runs, tmp_path, spoil, spoil_bytes, data)

    each()
    print(f"\ncheckpoints: {dict(tally)}")
    assert tally.total() - tally["resumed"] >= 250, tally
