"""What changes in a model: adapters, how they are found, attached, saved and loaded.

    from onegpu.adapters import attach, load, load_base, save

    model = load_base("path/to/model", ["nf4"])
    stack = attach(model, ["nf4", {"lora": {"rank": 16}}])
    ...                                 # train stack.trainable() in any loop
    save(stack, "my-adapter")

Names are imported at first use, so that listing what is installed needs no torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtefactError,
    DataError,
    DeviceError,
    Interrupted,
    InvalidInput,
    OnegpuError,
    PluginError,
    ProofFailed,
    RecipeError,
    StackError,
    StorageError,
    TargetError,
    Unavailable,
)
from .registry import ADAPTERS, API, RECIPES, TASKS, Entry, entries

if TYPE_CHECKING:
    from .artefact import load, save
    from .attaching import attach
    from .base import load_base
    from .contract import Adapter, Attachment, Capabilities, Context, LoadOptions, Rate
    from .specs import build, get
    from .stack import Stack, rates
    from .structure import linear_shape
    from .targets import resolve

_HOME = {
    **dict.fromkeys(("load", "save"), "artefact"),
    **dict.fromkeys(("load_base",), "base"),
    **dict.fromkeys(("Adapter", "Attachment", "Capabilities", "Context", "LoadOptions", "Rate"), "contract"),
    **dict.fromkeys(("attach",), "attaching"),
    **dict.fromkeys(("build", "get"), "specs"),
    **dict.fromkeys(("Stack", "rates"), "stack"),
    **dict.fromkeys(("linear_shape",), "structure"),
    **dict.fromkeys(("resolve",), "targets"),
}

__all__ = [
    # finding
    "ADAPTERS",
    "RECIPES",
    "TASKS",
    "API",
    "Entry",
    "entries",
    "get",
    # using
    "Stack",
    "attach",
    "build",
    "load",
    "load_base",
    "rates",
    "save",
    # writing one
    "Adapter",
    "Attachment",
    "Capabilities",
    "Context",
    "LoadOptions",
    "Rate",
    "linear_shape",
    "resolve",
    # errors
    "OnegpuError",
    "InvalidInput",
    "RecipeError",
    "DataError",
    "TargetError",
    "StackError",
    "ArtefactError",
    "Unavailable",
    "PluginError",
    "DeviceError",
    "StorageError",
    "ProofFailed",
    "Interrupted",
]

# Whoever imports bitsandbytes first (accelerate does) is asked for an optional CPU kernel that our forward never uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
