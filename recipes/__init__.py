"""What a run is made of: recipes, data, tasks, the loop, proofs, and the command line.

    from onegpu.recipes import load_recipe, run

    run(load_recipe("quickstart"), Path("runs/quickstart"))

Names are imported at first use, so that `onegpu --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jobs import Job, preflight
    from .loading import Loaded, load_recipe, parse_recipe
    from .packaged import packaged_recipes
    from .running import Outcome, run
    from .schema import Recipe, Train
    from .tasks import Task, get_task

_HOME = {
    **dict.fromkeys(("Loaded", "load_recipe", "parse_recipe"), "loading"),
    **dict.fromkeys(("packaged_recipes",), "packaged"),
    **dict.fromkeys(("Job", "preflight"), "jobs"),
    **dict.fromkeys(("Outcome", "run"), "running"),
    **dict.fromkeys(("Recipe", "Train"), "schema"),
    **dict.fromkeys(("Task", "get_task"), "tasks"),
}

__all__ = [
    "Recipe",
    "Train",
    "Loaded",
    "load_recipe",
    "parse_recipe",
    "packaged_recipes",
    "Job",
    "Outcome",
    "preflight",
    "run",
    "Task",
    "get_task",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
