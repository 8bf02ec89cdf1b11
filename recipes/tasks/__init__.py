"""Tasks: what rows look like, which tokens are supervised, what is measured. Found as adapters are."""

from onegpu.adapters import TASKS
from onegpu.adapters.registry import find, load

from .contract import (
    Batch,
    Direction,
    Example,
    Labels,
    Objective,
    Predictions,
    PredictiveTask,
    Reader,
    Row,
    RowProblem,
    Task,
    TooLong,
    Traits,
    model_inputs,
)

__all__ = [
    "Batch",
    "Direction",
    "Example",
    "Labels",
    "Objective",
    "Predictions",
    "PredictiveTask",
    "Reader",
    "Row",
    "RowProblem",
    "Task",
    "TooLong",
    "Traits",
    "get_task",
    "model_inputs",
]


def get_task(name: str) -> type[Task]:
    """The task class of that name (or `distribution:name`), imported now.

    Raises:
        PluginError: unknown, ambiguous, broken, or of another API level.
    """
    loaded: type[Task] = load(find(TASKS, name), Task)
    return loaded
