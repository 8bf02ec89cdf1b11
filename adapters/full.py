"""`full`: every tensor of the base is trained."""

from torch import nn

from .base_training import BaseTraining, BaseTrainingAttachment, body
from .contract import Context

__all__ = ["Full"]


class Full(BaseTraining):
    """Train the whole model. Weights are float32; a lower precision is applied while computing (autocast).

    What is saved is the whole model too, not a few megabytes.
    """

    api = 1

    def attach(self, model: nn.Module, context: Context) -> BaseTrainingAttachment:
        return BaseTrainingAttachment(context.name, self, model, body(model))
