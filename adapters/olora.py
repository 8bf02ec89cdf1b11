"""`olora`: a low-rank update that starts at an orthonormal basis of the weight's columns."""

import torch
from torch import Tensor

from .weight_start import WeightStart

__all__ = ["OLoRA"]


class OLoRA(WeightStart):
    """y = W x + s (B A x - B0 A0 x), with A0, B0 the start of A, B: for W = Q R, B0 = Q[:, :rank] and A0 = R[:rank].

    The columns of B start orthonormal. The paper takes s B0 A0 out of W; here it is subtracted beside W, so the base
    stays as it is, packed or not. Only under dropout does that differ: the start is then dropped with the update.

    Source: Büyükakyüz 2024, https://arxiv.org/abs/2406.01775, algorithm 1.
    """

    api = 1

    def factors(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(w)  # (out, k), (k, in)
        return r[: self.rank].contiguous(), q[:, : self.rank].contiguous()
