"""A program that runs recipes again and again, kills them at chosen instants, resumes them, and says what came of it.

    python killed_runs.py JOBS.json

JOBS.json: [{"root": folder with recipe.yaml, "kills": [[how, ...], ...]}, ...]. Each list of `how` is one run: it is
killed as the first says, resumed and killed as the second says, and so on, then resumed to its end. `how` is a number,
the file-system operation in the folder of the run before which the process kills itself; `"share S"`, the one at that
share of all that `straight` took; a float, seconds after which it is killed; `"step N"`, in the middle of that step; or
`"asked N"`, SIGTERM in that step, after which it ends itself.
The run `straight` is not killed, and is done by this process itself, so that all is imported when the others are
forked. Output: a JSON object for each run.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from onegpu.adapters import OnegpuError
from onegpu.recipes import load_recipe, run, training
from onegpu.recipes.data.batches import Plan
from onegpu.recipes.display import Display

PLANNED = Plan.window
WRITES = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"),
    *("tempfile.mkstemp", "tempfile.mkdtemp"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_operation(number: int, folder: Path) -> list[int]:
    """Die before that many operations in a folder were done; returns a list that grows by one with each."""
    seen: list[int] = []

    def ours(path: str) -> bool:
        return path == str(folder) or path.startswith(f"{folder}/")  # the file with the order lies beside it

    def look(event: str, args: tuple[Any, ...]) -> None:
        if event in WRITES and any(ours(os.fsdecode(a)) for a in args if isinstance(a, str | bytes | Path)):
            seen.append(1)
            if len(seen) == number:
                die()

    sys.addaudithook(look)
    return seen


def in_step(number: int, what: signal.Signals) -> None:
    real = training._accumulate

    def accumulate(s: training.Session, *args: Any) -> tuple[float, float]:
        found = real(s, *args)
        if s.step + 1 == number:
            os.kill(os.getpid(), what)
        return found

    training._accumulate = accumulate  # type: ignore[assignment]


def note_order(path: Path) -> None:
    """Write down which examples each step sees."""
    real = PLANNED

    def window(self: Plan, step: int) -> Any:
        found = real(self, step)
        with path.open("a") as file:
            file.write(json.dumps([step, list(found)]) + "\n")
        return found

    Plan.window = window  # type: ignore[method-assign]


def attempt(recipe: str, folder: Path, how: Any) -> int:
    """One process; its wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_work(recipe, folder, how))
    if isinstance(how, float):
        time.sleep(how)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _work(recipe: str, folder: Path, how: Any) -> int:
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # whatever a process begins with
    seen: list[int] = []
    if isinstance(how, str):
        in_step(int(how.split()[1]), signal.SIGTERM if how.startswith("asked") else signal.SIGKILL)
    else:
        seen = at_operation(how if isinstance(how, int) else 0, folder)
    note_order(folder.with_suffix(".order"))
    try:
        run(load_recipe(recipe), folder, resume=folder.exists(), display=Display(quiet=True))
    except OnegpuError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 99
    folder.with_suffix(".operations").write_text(str(len(seen)))
    return 0


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        root, recipe = Path(job["root"]), f"{job['root']}/recipe.yaml"
        _say(root / "straight", [], [_work(recipe, root / "straight", None)])
        for number, kills in enumerate(job["kills"]):
            folder = root / f"run-{number:03d}"
            exactly = [operation(how, root / "straight") for how in kills]
            _say(folder, exactly, [attempt(recipe, folder, how) for how in (*exactly, None)])


def operation(how: Any, straight: Path) -> Any:
    """The number that a share means."""
    if not isinstance(how, str) or not how.startswith("share "):
        return how
    return max(1, round(float(how.split()[1]) * int(straight.with_suffix(".operations").read_text())))


def _say(folder: Path, kills: list[Any], statuses: list[int]) -> None:
    print(json.dumps({"folder": str(folder), "kills": kills, "statuses": statuses}), flush=True)


if __name__ == "__main__":
    main()
