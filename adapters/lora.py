"""`lora`: a low-rank update beside frozen linears."""

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .contract import Adapter, Attachment, Capabilities, Context
from .errors import StackError
from .frozen_linear import FrozenLinear
from .structure import Wrapper, linear_shape, swap, unwrap, weight
from .targets import ALL_LINEAR, resolve, shortest_names

__all__ = ["LoRA", "LoRALinear"]


class LoRA(Adapter):
    """y = W x + (alpha / rank) B A x, with A: (rank, in) and B: (out, rank) trained and W frozen.

    B starts at zero, so a fresh adapter changes nothing. Rank-stabilised scaling divides by the square root of the
    rank instead. Works over any linear of the base, float or packed.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3;
    rank-stabilised: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732, theorem 3.2.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=True, peft_readable=True)

    rank: int = Field(default=16, ge=1)
    """Inner dimension of the update."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling; twice the rank when left out."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of A that are dropped in training."""

    targets: str | list[str] = ALL_LINEAR
    """Which linears: names, patterns, or `all-linear`."""

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""

    @property
    def effective_alpha(self) -> float:
        """Alpha as used: the one given, else twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.effective_alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def check(self, skeleton: nn.Module) -> None:
        resolve(skeleton, self.targets)

    def attach(self, model: nn.Module, context: Context) -> "LoRAAttachment":
        generator = torch.Generator().manual_seed(context.seed)
        chosen = resolve(model, self.targets)
        names = shortest_names(model, list(chosen))
        layers = {path: LoRALinear(module, self, generator) for path, module in chosen.items()}
        swap(model, {module: layers[path] for path, module in chosen.items()})
        return LoRAAttachment(context.name, self, model, layers=layers, target_names=names)


class LoRALinear(Wrapper):
    """A linear with its update. x: (..., in) -> (..., out)."""

    def __init__(self, base: nn.Module, config: LoRA, generator: torch.Generator) -> None:
        super().__init__(base)
        shape = linear_shape(base)
        assert shape is not None, type(base)
        inputs, outputs = shape
        device = next(t.device for t in (*unwrap(base).parameters(), *unwrap(base).buffers()))
        a = torch.empty(config.rank, inputs)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # as torch initialises a linear
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank, device=device))
        self.scale = config.scale
        self.dropout = config.dropout
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.on:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        # A and B are float32; the multiplication is in the compute dtype, like the base's.
        low = F.linear(dropped, self.lora_A.to(x.dtype))
        return y + (self.scale * F.linear(low, self.lora_B.to(low.dtype))).to(y.dtype)

    def delta(self) -> Tensor:
        """The update as one matrix (out, in), float32."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())


class LoRAAttachment(Attachment):
    """One named LoRA on one model."""

    adapter: LoRA

    def __init__(
        self, name: str, adapter: LoRA, model: nn.Module, *, layers: dict[str, LoRALinear], target_names: list[str]
    ) -> None:
        super().__init__(name, adapter, model)
        self.layers = layers
        self.target_names = target_names
        for path, layer in layers.items():
            self.parameters[f"{path}.lora_A.{name}"] = layer.lora_A
            self.parameters[f"{path}.lora_B.{name}"] = layer.lora_B

    def tensors(self) -> dict[str, Tensor]:
        """The keys are those of PEFT's file format."""
        found = {}
        for path, layer in self.layers.items():
            found[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A.detach()
            found[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B.detach()
        return found

    def enabled(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on

    def may_rest(self) -> frozenset[str]:
        """A has no gradient while B is zero."""
        return frozenset(f"{path}.lora_A.{self.name}" for path, layer in self.layers.items() if not layer.lora_B.any())

    @torch.no_grad()
    def merge(self) -> None:
        """W += (alpha / rank) B A, added in float32 and rounded once."""
        packed = next((path for path, x in self.layers.items() if isinstance(unwrap(x), FrozenLinear)), None)
        if packed is not None:
            raise StackError(
                f"{self.name}: {packed} is packed, and rounding the sum to its few bits would lose most of the update; "
                "load the base without quantisation to merge"
            )
        for layer in self.layers.values():
            w = weight(layer)
            delta = layer.delta().T if isinstance(unwrap(layer), Conv1D) else layer.delta()
            w.copy_(w.float() + delta)
        self.detach()

    def detach(self) -> None:
        swap(self.model, {layer: layer.base for layer in self.layers.values()})

    def resolved(self) -> dict[str, Any]:
        return {"targets": self.target_names, "scale": self.adapter.scale}

    def peft_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": self.adapter.rank,
            "lora_alpha": self.adapter.effective_alpha,
            "target_modules": self.target_names,
        }
        if self.adapter.dropout:
            config["lora_dropout"] = self.adapter.dropout
        if self.adapter.rank_stabilised:
            config["use_rslora"] = True
        if any(isinstance(unwrap(layer), Conv1D) for layer in self.layers.values()):
            config["fan_in_fan_out"] = True
        return config
