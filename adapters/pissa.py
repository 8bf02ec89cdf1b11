"""`pissa`: a low-rank update that starts at the principal singular vectors of the weight."""

import torch
from pydantic import Field
from torch import Tensor

from .weight_start import WeightStart

__all__ = ["PiSSA"]


class PiSSA(WeightStart):
    """y = W x + s (B A x - B0 A0 x), with A0, B0 the start of A, B: for W = U S Vᵀ and the largest `rank` of S,

        B0 = U[:, :rank] sqrt(S[:rank] / s),    A0 = sqrt(S[:rank] / s) V[:, :rank]ᵀ.

    What is trained is the principal part of W, which learns faster than `lora` at the same rank. The paper takes B0 A0
    out of W; here it is subtracted beside W, so the base stays as it is, packed or not. Only under dropout does that
    differ: the start is then dropped with the update.

    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 to 4.
    """

    api = 1

    iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a randomised decomposition, many times faster on large weights; exact when left out."""

    def factors(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u, s, v = self._decomposed(w, generator)  # (out, rank), (rank,), (in, rank)
        root = (s / self.scale).sqrt()
        return root[:, None] * v.T, u * root

    def _decomposed(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if self.iterations is None:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            return u[:, : self.rank], s[: self.rank], vh[: self.rank].T
        with torch.random.fork_rng():  # it draws from the program's own random numbers
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            found: tuple[Tensor, Tensor, Tensor] = torch.svd_lowrank(w, q=self.rank, niter=self.iterations)
        return found
