"""The round trip of a checkpoint, on the base in memory: no weight of it is read or copied again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from onegpu.adapters import OnegpuError, ProofFailed, Stack
from onegpu.adapters.artefact import attach_saved, confirm
from onegpu.adapters.manifest import Saved
from onegpu.adapters.specs import Named
from onegpu.adapters.twins import twin

from .checkpoints import undisturbed
from .proofs import Probe, round_trip

__all__ = ["ResidentProof"]


@dataclass(frozen=True)
class ResidentProof:
    """What was written is what is trained: read back bit for bit, then loaded into a second instance and run."""

    stack: Stack
    untouched: nn.Module | None  # the base before anything was attached; None where an adapter trains the base itself
    inputs: Mapping[str, Sequence[int]]

    @staticmethod
    def untouched_base(model: nn.Module, stack: Sequence[Named]) -> nn.Module | None:
        """To be called before anything is attached. A base that is trained has no twin without a second copy of it."""
        return twin(model) if all(named.adapter.capabilities.base_frozen for named in stack) else None

    def __call__(self, folder: Path) -> float | None:
        """Prove an adapter folder; returns the largest difference of the logits, None where only bytes are compared.

        Raises:
            ProofFailed: what was written is not what is trained.
        """
        try:
            saved = confirm(self.stack, folder)
            return None if self.untouched is None else self._again(saved, self.untouched)
        except ProofFailed:
            raise
        except (OnegpuError, KeyError) as cause:
            raise ProofFailed(f"round trip: {cause}") from cause

    def _again(self, saved: Saved, untouched: nn.Module) -> float:
        with undisturbed():
            probe = Probe.of(self.stack.model, self.inputs)
            second = attach_saved(untouched, saved)
            try:
                return round_trip(probe, second.model)
            finally:
                second.detach()
