"""What the low-rank adapters share: settings, the layer beside a linear, and PEFT's file format.

Shapes: W: (out, in), A: (rank, in), B: (out, rank), x: (..., in).
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .contract import Adapter, Attachment, Capabilities, Context
from .errors import StackError
from .frozen_linear import FrozenLinear
from .low_rank_product import LowRankProduct, adapted, is_plain, is_undisturbed
from .structure import Wrapper, inside, linear_shape, modules, swap, unwrap, weight
from .targets import ALL_LINEAR, as_list, resolve, shortest_names

__all__ = ["LowRank", "LowRankAttachment", "LowRankLinear", "matrix", "product", "random_start"]

ROLES = {"lora_A": "A", "lora_B": "B"}


class LowRank(Adapter):
    """Settings of the family. A method says, in `layer`, where A and B start and what they do."""

    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=True, peft_readable=True)
    peft_flags: ClassVar[frozenset[str]] = frozenset()  # what PEFT's configuration switches the method on by

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

    def aims(self, skeleton: nn.Module) -> dict[str, list[str]]:
        return {entry: list(resolve(skeleton, entry)) for entry in as_list(self.targets)}

    def check(self, skeleton: nn.Module) -> None:
        resolve(skeleton, self.targets)

    def attach(self, model: nn.Module, context: Context) -> "LowRankAttachment":
        chosen = resolve(model, self.targets)
        names = shortest_names(model, list(chosen))
        layers = self.layers(model, chosen, context)
        swap(model, {module: layers[path] for path, module in chosen.items()})
        return LowRankAttachment(context.name, self, model, layers=layers, target_names=names)

    def layers(self, model: nn.Module, chosen: Mapping[str, nn.Module], context: Context) -> dict[str, "LowRankLinear"]:
        """The layer to put around each chosen linear, by path."""
        generator = torch.Generator().manual_seed(context.seed)
        return {path: self.layer(linear, generator, fresh=context.fresh) for path, linear in chosen.items()}

    @abstractmethod
    def layer(self, linear: nn.Module, generator: torch.Generator, *, fresh: bool) -> "LowRankLinear":
        """One linear with its update; where it starts does not matter unless `fresh`."""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], targets: Sequence[str]) -> "LowRank | None":
        ours = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", *cls.peft_flags}
        start = config.get("init_lora_weights", True)
        # Other starts change the base's weights, so that what PEFT saved of them is no update of the base as it was.
        if config.keys() - ours or start not in (True, False, "gaussian", "eva", "orthogonal"):
            return None
        if any(not config.get(flag, False) for flag in cls.peft_flags):
            return None
        return cls(
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0)),
            rank_stabilised=config.get("use_rslora", False),
            targets=list(targets),
        )

    def as_peft(self) -> dict[str, Any]:
        """The settings that PEFT computes the same update from, non-default keys only."""
        settings: dict[str, Any] = {"r": self.rank, "lora_alpha": self.effective_alpha}
        if self.dropout:
            settings["lora_dropout"] = self.dropout
        if self.rank_stabilised:
            settings["use_rslora"] = True
        return settings


def matrix(linear: nn.Module) -> Tensor:
    """The weight (out, in) of any linear in float32, dequantised where it is packed."""
    w = weight(linear).detach()
    return (w.T if isinstance(unwrap(linear), Conv1D) else w).float()


def random_start(linear: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A as torch initialises a linear, and B = 0, so that B A = 0."""
    shape = linear_shape(linear)
    assert shape is not None, type(linear)
    inputs, outputs = shape
    a = torch.empty(rank, inputs)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(outputs, rank)


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:  # (..., in) -> (..., out)
    """B A x. A and B are float32; the multiplication is in the compute dtype, like the base's."""
    low = F.linear(x, a.to(x.dtype))  # (..., rank)
    return F.linear(low, b.to(low.dtype))


class LowRankLinear(Wrapper):
    """y = W x + scale B A x. What several of them on one linear add to W x adds up, in any order."""

    reads_weight: ClassVar[bool] = False  # what it adds depends on the values of W

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, config: LowRank) -> None:
        super().__init__(linear)
        device = next(t.device for t in (*unwrap(linear).parameters(), *unwrap(linear).buffers()))
        self.lora_A = nn.Parameter(a.to(device).contiguous())  # as a file gives them: other strides, other rounding
        self.lora_B = nn.Parameter(b.to(device).contiguous())
        self.scale = config.scale
        self.dropout = config.dropout
        self.on = True

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        linear, products = self._products()
        if products and is_plain(linear):
            return adapted(linear, x, products)
        y: Tensor = self.base(x)
        if not self.on:
            return y
        return y + self.update(F.dropout(x, self.dropout, self.training), y).to(y.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the base's output y; x went through dropout."""
        return self.scale * product(x, self.lora_A, self.lora_B)

    def _products(self) -> tuple[nn.Module, list[LowRankProduct]]:
        """The linear beneath this and others like it, and the products of those that are on, innermost first."""
        module: nn.Module = self
        found = []
        while type(module) is LowRankLinear and (module is self or is_undisturbed(module)):
            if module.on:
                dropout = module.dropout if module.training else 0.0
                found.append(LowRankProduct(module.lora_A, module.lora_B, module.scale, dropout))
            module = module.base
        return module, found[::-1]

    def delta(self) -> Tensor:
        """scale B A as one matrix (out, in), float32."""
        return self.scale * (self.lora_B.detach() @ self.lora_A.detach())

    def merged(self) -> Tensor:
        """The weight (out, in) that does the same alone, float32."""
        return matrix(self) + self.delta()

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name that PEFT has for it."""
        return dict(self.named_parameters(recurse=False))

    def saved(self) -> dict[str, Tensor]:
        """What the file holds, under the ends of PEFT's keys."""
        return {"lora_A.weight": self.lora_A.detach(), "lora_B.weight": self.lora_B.detach()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take what `saved` gave."""
        for key, own in self.saved().items():
            own.copy_(values[key])


class LowRankAttachment(Attachment):
    """One named adapter of the family on one model."""

    adapter: LowRank

    def __init__(
        self,
        name: str,
        adapter: LowRank,
        model: nn.Module,
        *,
        layers: Mapping[str, LowRankLinear],
        target_names: list[str],
    ) -> None:
        super().__init__(name, adapter, model)
        self.layers = dict(layers)
        self.target_names = target_names
        for path, layer in layers.items():
            self.parameters |= {f"{path}.{kind}.{name}": p for kind, p in layer.trained().items()}

    def roles(self) -> dict[str, str]:
        return {f"{path}.{kind}.{self.name}": role for path in self.layers for kind, role in ROLES.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The keys are those of PEFT's file format."""
        return {
            f"base_model.model.{path}.{key}": tensor
            for path, layer in self.layers.items()
            for key, tensor in layer.saved().items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for path, layer in self.layers.items():
            layer.load({key: tensors[f"base_model.model.{path}.{key}"] for key in layer.saved()})

    def enabled(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on

    def may_rest(self) -> frozenset[str]:
        """A has no gradient while B is zero."""
        return frozenset(f"{path}.lora_A.{self.name}" for path, layer in self.layers.items() if not layer.lora_B.any())

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into W, added in float32 and rounded once."""
        self._refuse_packed()
        self._refuse_beside_readers()
        for layer in self.layers.values():
            merged = layer.merged()
            weight(layer).copy_(merged.T if isinstance(unwrap(layer), Conv1D) else merged)
        self.detach()

    def _refuse_packed(self) -> None:
        packed = next((path for path, x in self.layers.items() if isinstance(unwrap(x), FrozenLinear)), None)
        if packed is not None:
            raise StackError(
                f"{self.name}: {packed} is packed, and rounding the sum to its few bits would lose most of the update; "
                "load the base without quantisation to merge"
            )

    def _refuse_beside_readers(self) -> None:
        for path, outermost in modules(self.model):
            if path in self.layers and any(w is not self.layers[path] and _reads_weight(w) for w in _around(outermost)):
                raise StackError(
                    f"{self.name}: another adapter on {path} depends on its weight and would change with it; merge "
                    "that one first, or detach it"
                )

    def detach(self) -> None:
        swap(self.model, {layer: layer.base for layer in self.layers.values()})

    def resolved(self) -> dict[str, Any]:
        return {"targets": self.target_names, "scale": self.adapter.scale}

    def peft_config(self) -> dict[str, Any]:
        config = {"peft_type": "LORA", "target_modules": self.target_names, **self.adapter.as_peft()}
        if any(isinstance(unwrap(layer), Conv1D) for layer in self.layers.values()):
            config["fan_in_fan_out"] = True
        return config


def _around(module: nn.Module) -> Iterator[nn.Module]:
    """The wrappers around a module of the base, outermost first."""
    while (inner := inside(module)) is not None:
        yield module
        module = inner


def _reads_weight(wrapper: nn.Module) -> bool:
    return isinstance(wrapper, LowRankLinear) and wrapper.reads_weight
