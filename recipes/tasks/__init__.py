"""Tasks: what rows look like, which tokens are supervised, what is measured. Found as adapters are."""

from onegpu.adapters import TASKS
from onegpu.adapters.registry import find, load

from .contract import Batch, Example, Labels, Objective, Reader, Row, RowProblem, Task

__all__ = ["Batch", "Example", "Labels", "Objective", "Reader", "Row", "RowProblem", "Task", "get_task"]


def get_task(name: str) -> type[Task]:
    """The task class of that name (or `distribution:name`), imported now.

    Raises:
        PluginError: unknown, ambiguous, broken, or of another API level.
    """
    loaded: type[Task] = load(find(TASKS, name), Task)
    return loaded
