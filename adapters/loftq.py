"""`loftq`: a low-rank update that starts as what packing lost."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .checkpoint_weights import CheckpointWeights
from .contract import Capabilities, Context, LoadOptions
from .errors import StackError
from .frozen_linear import FrozenLinear
from .low_rank import LowRank, LowRankLinear, matrix, random_start
from .structure import unwrap

__all__ = ["LoftQ"]


class LoftQ(LowRank):
    """y = Q x + s B A x, with Q the packed weight and s B A starting as the best fit of rank `rank` to W - Q.

    So a fresh adapter is nearer to the unpacked model than the packed one is. W is read from the checkpoint, one
    linear after the other, at the start of training only; it is saved as a plain LoRA, for the same packing. A linear
    that is not packed lost nothing, and starts as with `lora`.

    Source: Li et al. 2023, https://arxiv.org/abs/2310.08659, algorithm 1 with T = 1.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(identity_at_start=False, mergeable=False, peft_readable=True)

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        if options.quantization_config is None:
            raise StackError("loftq fits what packing lost, and nothing is packed: put nf4, fp4 or int8 before it")
        return options

    def layers(self, model: nn.Module, chosen: Mapping[str, nn.Module], context: Context) -> dict[str, LowRankLinear]:
        plain = super().layers(model, chosen, context)
        packed = {path: linear for path, linear in chosen.items() if isinstance(unwrap(linear), FrozenLinear)}
        if not packed and not _is_skeleton(model):  # its values would correct a loss that is not there
            raise StackError("loftq fits what packing lost, and no target of it is packed: use lora")
        if not context.fresh:
            return plain
        originals = CheckpointWeights(model)
        return plain | {path: self._fitted(path, linear, originals) for path, linear in packed.items()}

    def _fitted(self, path: str, linear: nn.Module, originals: CheckpointWeights) -> LowRankLinear:
        packed = matrix(linear)
        original = originals.weight(path).to(packed.device)
        if original.shape != packed.shape:
            raise StackError(f"{path} is {tuple(packed.shape)}, and {originals.source} has {tuple(original.shape)}")
        return LowRankLinear(linear, *self._best(original - packed), self)

    def _best(self, lost: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) with scale B A the nearest matrix of that rank to lost: (out, in)."""
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        root = (s[: self.rank] / self.scale).sqrt()
        return root[:, None] * vh[: self.rank], u[:, : self.rank] * root

    def layer(self, linear: nn.Module, generator: torch.Generator, *, fresh: bool) -> LowRankLinear:
        return LowRankLinear(linear, *random_start(linear, self.rank, generator), self)


def _is_skeleton(model: nn.Module) -> bool:
    """A model without weights, which is only measured."""
    return all(parameter.is_meta for parameter in model.parameters())
