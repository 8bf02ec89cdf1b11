"""What a plugin's own code raises, as one error that names the plugin: a fault of one is never a traceback of all.

An adapter's verbs run inside `answerable`. Errors of the house pass through, because an adapter raises those to speak
to its user (a pattern that matches nothing); anything else is a fault in the plugin's code, also where it is ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import OnegpuError, PluginError
from .registry import Entry, reason

__all__ = ["answerable"]


@contextmanager
def answerable(
    name: str, entry: Entry | None, verb: str, *, passing: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Name the plugin that fails inside the block.

    Args:
        name: of the adapter's instance or the task, as the recipe calls it.
        entry: where its class came from, if anybody registers it.
        verb: what it was asked to do (`attach`).
        passing: other errors that the caller explains itself.

    Raises:
        PluginError: something else than an error of the house was raised; `--debug` shows it as the cause.
    """
    try:
        yield
    except (Exception, SystemExit) as cause:
        if isinstance(cause, (OnegpuError, torch.OutOfMemoryError, passing)):
            raise
        who = f"{entry.name} of {entry.origin}" if entry else f"{name}, which no distribution registers,"
        called = f" (called {name!r})" if entry and name != entry.name else ""
        hint = "`onegpu --debug` shows where"
        raise PluginError(f"{who}{called} failed in {verb}: {reason(cause)}; {hint}") from cause
