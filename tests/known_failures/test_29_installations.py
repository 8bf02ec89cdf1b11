"""29. Versions, platforms, and installations that fail in riddles.

Met: a renamed argument, a library that imports all of its extras, 4 bits that silently become none, workers that are
started again and again, listings that need a GPU.

Here: listing imports nothing heavy; `onegpu doctor` tries what a run needs on this machine; what is asked for and
cannot be had is an error with exit code 3, never something less; a missing package is named with the command that gets
it.

Not yet: one run of the tests each with the oldest and the newest supported versions.

Also: tests/recipes/test_doctor.py, tests/test_layout.py, tests/recipes/test_cli.py, tests/adapters/test_device.py
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from onegpu.adapters.frozen_linear import FrozenLinear

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "pydantic", "accelerate", "datasets")
LISTING = f"""
import sys
sys.argv = ["onegpu", *sys.argv[1:]]
from onegpu.recipes.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""
SPAWNED = """
import multiprocessing
multiprocessing.set_start_method("spawn")
from pathlib import Path
from onegpu.recipes import load_recipe, run
run(load_recipe("recipe.yaml"), Path("out"))
print("done")
"""


@pytest.mark.parametrize("arguments", [["--help"], ["adapters"], ["tasks"], ["recipes"]], ids=str)
def test_listing_needs_no_library_and_no_gpu(arguments: list[str]) -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LISTING, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.perf_counter() - began < 10  # 0.3 s on an idle machine


@pytest.mark.parametrize("packing", ["nf4", "fp4", "int8"])
def test_packing_that_is_asked_for_is_what_one_gets_on_a_cpu_too(
    packing: str, fresh: Callable[..., PreTrainedModel]
) -> None:
    packed = [m for m in fresh("plain", packing).modules() if isinstance(m, FrozenLinear)]
    assert len(packed) == 2 * 7


def test_what_this_machine_cannot_do_ends_with_3_and_is_never_replaced(
    written: Callable[..., str], onegpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "recipe.yaml").write_text(written(train={"precision": "fp16"}), "utf-8")
    code, _, errors = onegpu("run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert code == 3
    assert "precision fp16 needs a CUDA device and this run is on the CPU: use bf16 or fp32" in errors
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named_with_the_command_that_gets_it(
    written: Callable[..., str], onegpu: Any, tmp_path: Path
) -> None:
    text = written(base="package:some_package_that_is_not_here/model.gguf")
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    code, _, errors = onegpu("run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert code == 3
    assert "pip install" in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_doctor_names_versions_and_device(onegpu: Any) -> None:
    code, shown, _ = onegpu("doctor", "--json")
    found = json.loads(shown)
    assert code == 0
    text = json.dumps(found)
    assert [name for name in ("torch", "transformers", "peft", "bitsandbytes", "device") if name not in text] == []


def test_a_script_without_a_main_guard_runs_once(written: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(written(), "utf-8")
    (tmp_path / "script.py").write_text(SPAWNED, "utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    assert done.stdout.count("proved") == 1


def test_packing_without_its_library_is_an_error_that_names_it(written: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(written(["nf4", "lora"]), "utf-8")
    code = "import sys; sys.modules['bitsandbytes'] = None; from onegpu.recipes.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "recipe.yaml", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "`pip install bitsandbytes` may help" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
