"""Which share of a run its proofs take: a real run of 200 steps, looked at every few milliseconds.

    python benchmarks/proof_overhead.py [--steps 200] [--set train.precision=fp32 ...] [--out FILE.md]

Nothing is switched off and nothing is patched: a thread looks at what the main one is doing, and counts how often that
is a proof. Both sides, with and without the proofs, are therefore of the same run.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from onegpu.recipes import load_recipe, run

EVERY = 0.005  # seconds
PROOFS = {  # file, or file and function, and what it is called on the page; the outermost that is known counts
    "recipes/step_proof.py": "step proof",
    "recipes/gradient_flow.py": "step proof",
    "recipes/proofs.py frozen_base": "digests of the base",
    "recipes/proofs.py check": "digests of the base",
    "adapters/fingerprints.py": "digests of the base",
    "recipes/proofs.py first_bad_gradient": "finite gradients",
    "recipes/resident_proof.py": "round trip of checkpoints",
    "adapters/twins.py": "round trip of checkpoints",
    "recipes/checkpoints.py _confirm": "round trip of checkpoints",
    "adapters/files.py seal": "checksums of checkpoints",
    "adapters/artefact.py confirm": "round trip at the end",
    "recipes/proofs.py": "round trip at the end",
    "recipes/running.py _prove": "round trip at the end",
    "tasks/packing.py of_model": "trials of packing and head",
    "tasks/output_head.py find_head": "trials of packing and head",
}
REST = "everything else"


def main() -> None:
    """Run a packaged recipe and write what its proofs took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the recipe")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    settings = [f"train.steps={chosen.steps}", f"train.checkpoint_every={chosen.checkpoint_every}", *chosen.set]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, Watch() as watch:
        run(load_recipe(chosen.recipe, settings), Path(place) / "run")
    text = page(watch.seen, time.perf_counter() - began, [chosen.recipe, *settings])
    print(text)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")


class Watch:
    """Counts what the thread that made it is doing, until the block ends."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        self._watcher = threading.Thread(target=self._look, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            self.seen[_doing(sys._current_frames().get(self._thread))] += 1


def _doing(frame: FrameType | None) -> str:
    """What the outermost proof on the stack is called."""
    found = REST
    while frame is not None:
        file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
        found = PROOFS.get(f"{file} {frame.f_code.co_name}", PROOFS.get(file, found))
        frame = frame.f_back
    return found


def page(seen: Counter[str], seconds: float, settings: list[str]) -> str:
    """A table of the shares."""
    total = seen.total()
    proofs = total - seen[REST]
    overrides = ", ".join(f"`{setting}`" for setting in settings[1:])
    cores = f"{os.cpu_count()} cores of which the run used {os.environ.get('OMP_NUM_THREADS', 'all')}"
    lines = [
        "# What the proofs of a run take",
        "",
        f"`python benchmarks/proof_overhead.py`: `onegpu run {settings[0]}` with {overrides}, looked at",
        f"{total:,} times in {seconds:,.0f} s.",
        "",
        "| | share of the run |",
        "| --- | --- |",
        *(f"| {name} | {count / total:.2%} |" for name, count in seen.most_common() if name != REST),
        f"| **all proofs** | **{proofs / total:.2%}** |",
        "",
        f"With the proofs, the run took {total / (total - proofs):.4f} times what it takes without them, loading and",
        "evaluations included. The data proof is part of tokenising, whose results are kept, and is not counted.",
        "",
        f"Machine: {platform.machine()}, {cores}, torch {version('torch')}, onegpu {version('onegpu')} at {_commit()}.",
        "",
    ]
    return "\n".join(lines)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
