"""`onegpu doctor`: what is installed, and whether it works here. Each check tries the real thing."""

import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from onegpu.adapters import ADAPTERS, TASKS, DeviceError, entries, load_base
from onegpu.adapters.device import compute_dtype, detect
from onegpu.adapters.files import cache_folder
from onegpu.adapters.quiet import quietly
from onegpu.adapters.registry import VARIABLE, Entry

from .describing import breakage
from .display import human_bytes

__all__ = ["Finding", "examine"]

LIBRARIES = ("onegpu", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


class Finding(NamedTuple):
    """One thing looked at."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Run every check; none of them touches the network."""
    found = [Finding("python", True, platform.python_version())]
    found += [_library(name) for name in LIBRARIES]
    checks: dict[str, Callable[[], str]] = {
        "device": _device,
        "precision": _precision,
        "packing": _packing,
        "8-bit adamw": _eight_bit_step,
        "cache": _cache,
    }
    found += [_tried(what, check) for what, check in checks.items()]
    for group in (ADAPTERS, TASKS):
        for entry in entries(group):
            found.append(_plugin(group, entry))
    return found


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, f"not installed: pip install {name}")


def _plugin(group: str, entry: Entry) -> Finding:
    if not entry.allowed:
        return Finding(entry.name, True, f"{entry.origin}, not allowed by {VARIABLE}")
    broken = breakage(group, entry)
    return Finding(entry.name, broken is None, broken or entry.origin)


def _tried(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except Exception as error:  # a check may fail in any way; that is what it is for
        return Finding(what, False, f"{type(error).__name__}: {error}")


def _device() -> str:
    hardware = detect()
    memory = f", {human_bytes(hardware.memory)}" if hardware.memory else f", {torch.get_num_threads()} threads"
    return f"{hardware.name}{memory}"


def _precision() -> str:
    hardware, possible = detect(), []
    for precision in ("fp32", "bf16", "fp16"):
        try:
            compute_dtype(precision, hardware)
            possible.append(precision)
        except DeviceError:
            pass
    return f"{', '.join(possible)}; auto is {str(compute_dtype('auto', hardware)).removeprefix('torch.')}"


def _packing() -> str:
    """Pack a tiny model in each way and run it."""
    with tempfile.TemporaryDirectory() as folder:
        with quietly():
            LlamaForCausalLM(TINY).save_pretrained(folder)
        for name in ("int8", "nf4", "fp4"):
            logits = load_base(folder, [name], precision="fp32")(torch.tensor([[1, 2]]).to(detect().device)).logits
            assert torch.isfinite(logits).all(), f"{name} gives logits that are not finite"
    return "int8, nf4 and fp4 pack and compute"


def _eight_bit_step() -> str:
    from bitsandbytes.optim.adamw import AdamW8bit

    parameter = torch.nn.Parameter(torch.ones(8192, device=detect().device))
    optimizer = AdamW8bit([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (parameter < 1).all(), "the step moved nothing"
    return "steps"


def _cache() -> str:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink()
    return f"{folder}, {human_bytes(shutil.disk_usage(folder).free)} free"
