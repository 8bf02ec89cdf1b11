"""What adapters share that train the base's own tensors, in float32, where they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .contract import Adapter, Attachment, Capabilities, LoadOptions
from .errors import StackError
from .structure import head_modules

__all__ = ["BaseTraining", "BaseTrainingAttachment", "body"]

# A key bias adds the same to each score of a query, which softmax ignores: its gradient is nothing but rounding.
KEY_BIASES = (".k_proj.bias", ".key.bias", ".k.bias", ".k_lin.bias", ".key_proj.bias")


class BaseTraining(Adapter):
    """An adapter that trains the base itself: weights are float32, a lower precision is applied while computing."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        base_frozen=False,
        quantised_bases=False,
        reasons={
            "quantised_bases": "a packed weight cannot be stepped",
            "mergeable": "it trains the base's own weights, so there is nothing to fold in",
        },
    )

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        autocast = None if options.dtype == torch.float32 else options.dtype
        return replace(options, dtype=torch.float32, autocast=autocast)


def body(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every tensor of the base by name; the heads are left out, which the stack owns and saves."""
    heads = tuple(f"{head}." for head in head_modules(model))
    return {name: p for name, p in model.named_parameters() if not name.startswith(heads)}


class BaseTrainingAttachment(Attachment):
    """The trained base itself."""

    stepped = False

    def __init__(self, name: str, adapter: Adapter, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(name, adapter, model, dict(parameters))
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.parameters}
        self._ran = set[nn.Module]()  # in this step
        self._watches: list[RemovableHandle] = []

    def before_step(self, step: int) -> None:
        self.stepped = True
        self._ran.clear()
        if not self._watches:
            self._watches = [m.register_forward_pre_hook(self._note) for m in set(self._owners.values())]

    def _note(self, module: nn.Module, args: Any) -> None:
        self._ran.add(module)

    def may_rest(self) -> frozenset[str]:
        """Tensors of modules that did not run in this step (an expert, a tower for images), and key biases."""
        idle = {name for name, owner in self._owners.items() if self.stepped and owner not in self._ran}
        return frozenset(idle | {name for name in self.parameters if name.endswith(KEY_BIASES)})

    def enabled(self, on: bool) -> None:
        if not on and self.stepped:
            raise StackError(f"{self.name}: the base was trained in place, and no copy of it as it was is kept")

    def detach(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        for watch in self._watches:
            watch.remove()
        self._watches = []
