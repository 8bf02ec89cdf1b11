"""`bitfit`: only biases are trained."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .contract import Adapter, Attachment, Capabilities, Context
from .errors import StackError, TargetError, nearest
from .structure import Wrapper, head_modules, linear_shape, modules, swap, unwrap
from .targets import ALL_LINEAR, as_list, matches

__all__ = ["BitFit"]

ALL = "all"


class BitFit(Adapter):
    """y = f(x) + d, where f is a linear or a layer norm of the base with a bias b, and d: (out,) is trained.

    That is training b itself (b + d has the same gradient), but the base stays as it is, packed or not. d starts at
    zero, so a fresh adapter changes nothing. A model without biases, as Llama is, has nothing to train.

    Source: Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199, section 3.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(
        mergeable=True, reasons={"peft_readable": "PEFT has no method that trains biases only"}
    )

    targets: str | Annotated[list[str], Field(min_length=1)] = ALL
    """Whose biases: `all`, `all-linear`, names or patterns. Heads are trained whole anyway."""

    def aims(self, skeleton: nn.Module) -> dict[str, list[str]]:
        biased = _biased(skeleton)
        return {entry: [p for p, m in biased.items() if _means(entry, p, m)] for entry in as_list(self.targets)}

    def check(self, skeleton: nn.Module) -> None:
        self.resolve(skeleton)

    def attach(self, model: nn.Module, context: Context) -> "BitFitAttachment":
        chosen = self.resolve(model)
        layers = {path: ShiftedModule(module) for path, module in chosen.items()}
        swap(model, {module: layers[path] for path, module in chosen.items()})
        return BitFitAttachment(context.name, self, model, layers)

    def resolve(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules whose biases `targets` mean, by logical path.

        Raises:
            StackError: the model has no bias.
            TargetError: an entry matches no module with a bias, or one whose bias is not added to its output last.
        """
        biased = _biased(model)
        if not biased:
            raise StackError(f"bitfit trains biases, and {type(model).__name__} was made without any: use lora instead")
        wanted = as_list(self.targets)
        hits = {entry: {path for path, m in biased.items() if _means(entry, path, m)} for entry in wanted}
        if missed := [entry for entry, found in hits.items() if not found]:
            names = {path.rpartition(".")[2] for path in biased}
            raise TargetError("; ".join(f"target {e!r} matches nothing with a bias{nearest(e, names)}" for e in missed))
        chosen = {path: module for path, module in biased.items() if any(path in found for found in hits.values())}
        _refuse_unknown(chosen)
        return chosen


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base with a bias of its own, by logical path."""
    heads = head_modules(model)
    return {
        path: module
        for path, module in modules(model)
        if "bias" in dict(unwrap(module).named_parameters(recurse=False))
        and not any(path == head or path.startswith(f"{head}.") for head in heads)
    }


def _means(entry: str, path: str, module: nn.Module) -> bool:
    if entry == ALL:
        return True
    return matches(path, entry) and (entry != ALL_LINEAR or linear_shape(module) is not None)


def _refuse_unknown(chosen: Mapping[str, nn.Module]) -> None:
    """A convolution adds its bias along another axis, and what a module of a model's own does with one is unknown."""
    for path, module in chosen.items():
        if linear_shape(module) is None and not isinstance(unwrap(module), nn.LayerNorm):
            kind = type(unwrap(module)).__name__
            raise TargetError(
                f"bitfit can train the biases of linears and layer norms, and {path} is a {kind}: list the targets by "
                "name to leave it out"
            )


class ShiftedModule(Wrapper):
    """A module with a shift of its output. x: (..., in) -> (..., out)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        bias = unwrap(module).get_parameter("bias")
        self.shift = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))  # (out,)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.shift.to(y.dtype) if self.on else y


class BitFitAttachment(Attachment):
    """One named set of shifts on one model."""

    def __init__(self, name: str, adapter: BitFit, model: nn.Module, layers: Mapping[str, ShiftedModule]) -> None:
        super().__init__(name, adapter, model, {f"{path}.bias.{name}": layer.shift for path, layer in layers.items()})
        self.layers = dict(layers)

    def enabled(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on

    @torch.no_grad()
    def merge(self) -> None:
        """b += d, added in float32 and rounded once. A packed linear's bias is not packed."""
        for layer in self.layers.values():
            bias = unwrap(layer).get_parameter("bias")
            bias.copy_(bias.float() + layer.shift)
        self.detach()

    def detach(self) -> None:
        swap(self.model, {layer: layer.base for layer in self.layers.values()})

    def resolved(self) -> dict[str, Any]:
        return {"targets": list(self.layers)}
