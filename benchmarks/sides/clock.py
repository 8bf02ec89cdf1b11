"""Time, loss and memory of each step of transformers' `Trainer`, for the sides that train with it."""

from typing import Any

from measuring import now, peak
from transformers import TrainerCallback

__all__ = ["Clock"]


class Clock(TrainerCallback):
    """Looks at each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0  # at the end of the last step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seconds.append(-now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds[-1] += now()
        self.peak = peak()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def found(self, began: int) -> dict[str, Any]:
        """What a side reports, which held so many bytes before the model."""
        return {"seconds": self.seconds, "losses": self.losses, "peak": self.peak - began}
