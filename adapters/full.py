"""`full`: every tensor of the base is trained."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from .contract import Adapter, Attachment, Capabilities, Context, LoadOptions
from .errors import StackError
from .structure import head_modules

__all__ = ["Full"]


class Full(Adapter):
    """Train the whole model. Weights are float32; a lower precision is applied while computing (autocast).

    What is saved is the whole model too, not a few megabytes.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(base_frozen=False, quantised_bases=False)

    def load_options(self, options: LoadOptions, keep: tuple[str, ...]) -> LoadOptions:
        autocast = None if options.dtype == torch.float32 else options.dtype
        return replace(options, dtype=torch.float32, autocast=autocast)

    def attach(self, model: nn.Module, context: Context) -> "FullAttachment":
        heads = tuple(f"{head}." for head in head_modules(model))  # the stack owns and saves these
        body = {name: p for name, p in model.named_parameters() if not name.startswith(heads)}
        attachment = FullAttachment(context.name, self, model, body)
        for parameter in attachment.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return attachment


class FullAttachment(Attachment):
    """The trained base itself."""

    stepped = False

    def before_step(self, step: int) -> None:
        self.stepped = True

    def enabled(self, on: bool) -> None:
        if not on and self.stepped:
            raise StackError(f"{self.name}: the base was trained in place, and no copy of it as it was is kept")

    def may_rest(self) -> frozenset[str]:
        """Some tensors of a whole model have no gradient of their own: key biases, rows of unseen tokens."""
        return frozenset(self.parameters)

    def detach(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
