"""Every decision that depends on the hardware: device, compute dtype, loss scaling, memory.

Decisions take a `Hardware`, so that they can be tested with one that is not there.
"""

import resource
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import DeviceError

__all__ = [
    "Attention",
    "Hardware",
    "Precision",
    "attention_of",
    "compute_dtype",
    "detect",
    "grad_scaler",
    "peak_memory",
]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Attention = Literal["auto", "eager", "sdpa"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The one device that a run uses."""

    kind: Literal["cuda", "cpu"]
    capability: tuple[int, int] | None = None  # CUDA compute capability
    name: str = "CPU"
    memory: int | None = None  # bytes on the device

    @property
    def device(self) -> torch.device:
        """The torch device: always a single one, never a map over several."""
        return torch.device(self.kind)


def detect() -> Hardware:
    """The CUDA device that is current, else the CPU."""
    if not torch.cuda.is_available():
        return Hardware("cpu")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Hardware("cuda", (properties.major, properties.minor), properties.name, properties.total_memory)


def compute_dtype(precision: Precision, hardware: Hardware) -> torch.dtype:
    """The dtype to compute in. `auto` is bf16 where the card computes it natively (8.0 on), else fp16; fp32 on a CPU.

    Raises:
        DeviceError: the device cannot do what was asked for. It is never replaced silently: cards before 8.0 accept
            bf16 and emulate it slowly, and fp16 on a CPU would run without loss scaling.
    """
    native_bf16 = hardware.kind == "cpu" or (hardware.capability or (0, 0)) >= (8, 0)
    if precision == "auto":
        if hardware.kind == "cpu":
            return torch.float32
        return torch.bfloat16 if native_bf16 else torch.float16
    if precision == "fp16" and hardware.kind == "cpu":
        raise DeviceError("precision fp16 needs a CUDA device and this run is on the CPU: use bf16 or fp32")
    if precision == "bf16" and not native_bf16:
        raise DeviceError(
            f"{hardware.name} (capability {hardware.capability}) only emulates bf16: use precision fp16, fp32 or auto"
        )
    return DTYPES[precision]


def attention_of(asked: Attention, dtype: torch.dtype, hardware: Hardware) -> str | None:
    """Which of transformers' implementations of attention to take; None for a model's own choice.

    `auto` is the fast one: the backward pass of torch's fused attention in bf16 is several times slower on a CPU than
    plain matrix products.
    """
    if asked != "auto":
        return asked
    return "eager" if hardware.kind == "cpu" and dtype == torch.bfloat16 else None


def grad_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16, whose gradients underflow; passes everything through for the other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use at once: on the CUDA device, or by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
