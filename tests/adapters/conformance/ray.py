"""A small healthy adapter that can do everything; tests of the conformance suite break it, one place at a time."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onegpu.adapters import Adapter, Attachment, Capabilities, Context, Rate, StackError, linear_shape, resolve
from onegpu.adapters.contract import Cost
from onegpu.adapters.frozen_linear import FrozenLinear
from onegpu.adapters.structure import Layers, unwrap

__all__ = ["Cost", "Layers", "Ray", "Rate"]


class Ray(Adapter):
    """A rank of one beside the chosen linears: y = W x + b (a . x)."""

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=True, peft_readable=True)

    targets: str | list[str] = "all-linear"
    """Names of the linears that are changed."""

    def attach(self, model: nn.Module, context: Context) -> "Rays":
        return Rays(context, self, model, resolve(model, self.targets))


class Rays(Attachment):
    """One named instance."""

    def __init__(self, context: Context, adapter: Ray, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__(context.name, adapter, model)
        self.on, self.steps = True, 0
        self.layers: dict[str, tuple[nn.Module, nn.Parameter, nn.Parameter]] = {}
        self.hooks = []
        generator = torch.Generator().manual_seed(context.seed)
        for path, layer in layers.items():
            shape = linear_shape(layer)
            assert shape is not None
            device = next(iter((*unwrap(layer).parameters(), *unwrap(layer).buffers()))).device
            a = nn.Parameter(torch.randn(shape[0], generator=generator).mul_(0.1).to(device))
            b = nn.Parameter(torch.zeros(shape[1], device=device))
            self.parameters |= {f"{path}.a.{self.name}": a, f"{path}.b.{self.name}": b}
            self.layers[path] = (layer, a, b)
            self.hooks.append(layer.register_forward_hook(self.hook(path, a, b)))

    def hook(self, path: str, a: nn.Parameter, b: nn.Parameter) -> Any:
        def add(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if not self.on:
                return y
            (x,) = args
            low = x @ a.to(x)
            return y + low.unsqueeze(-1) * b.to(y)

        return add

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for path, (_, a, b) in self.layers.items():
            found[f"base_model.model.{path}.lora_A.weight"] = a.detach().view(1, -1)
            found[f"base_model.model.{path}.lora_B.weight"] = b.detach().view(-1, 1)
        return found

    def enabled(self, on: bool) -> None:
        self.on = on

    def may_rest(self) -> frozenset[str]:
        return frozenset(f"{path}.a.{self.name}" for path, (_, _, b) in self.layers.items() if not b.any())

    def after_step(self, step: int) -> None:
        self.steps += 1

    def penalty(self) -> Tensor:
        return sum((b.square().sum() for _, _, b in self.layers.values()), torch.zeros(())) * 0.01 * self.steps

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        self.steps = state["steps"]

    @torch.no_grad()
    def merge(self) -> None:
        for layer, a, b in self.layers.values():
            base = unwrap(layer)
            if isinstance(base, FrozenLinear):
                raise StackError(f"{self.name}: a packed base cannot take it up")
            assert isinstance(base, nn.Linear)
            base.weight.add_(torch.outer(b, a))
        self.detach()

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def resolved(self) -> dict[str, Any]:
        return {"targets": sorted(self.layers)}

    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": sorted(self.layers)}
