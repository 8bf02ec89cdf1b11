"""`lisa`: full training of a few layers at a time, drawn anew every so many steps."""

import random
from collections import Counter
from collections.abc import Mapping

from pydantic import Field
from torch import nn

from .base_training import BaseTraining, BaseTrainingAttachment, body
from .contract import Context, Cost
from .errors import StackError
from .structure import Layers

__all__ = ["LISA"]


class LISA(BaseTraining):
    """Train embeddings, final norm and output embeddings at all steps, and `active` random layers for `interval` steps.

    The layers of a period are drawn without replacement and with equal chances; the others have no gradient then, and
    the optimiser passes over them. What is drawn depends on the seed and on the number of the step alone, so a resumed
    run draws what the first one would have. Weights are float32, and what is saved is the whole model.

    Source: Pan et al. 2024, https://arxiv.org/abs/2403.17919, algorithm 1.
    """

    api = 1

    active: int = Field(default=2, ge=1)
    """How many layers are trained at a time."""

    interval: int = Field(default=20, ge=1)
    """After how many optimiser steps other layers are drawn."""

    def check(self, skeleton: nn.Module) -> None:
        count = Layers.of(skeleton).count
        if self.active > count:
            raise StackError(f"lisa: `active` is {self.active}, and the model has {count} layers")

    def attach(self, model: nn.Module, context: Context) -> "LISAAttachment":
        self.check(model)
        parameters = body(model)
        depths = {name: context.layers.depth(name) for name in parameters}
        return LISAAttachment(context.name, self, model, parameters, depths=depths, seed=context.seed)

    def drawn(self, layers: int, seed: int, step: int) -> frozenset[int]:
        """The layers, counted from 1, that are trained in optimiser step `step`, counted from 0."""
        period = step // self.interval
        return frozenset(random.Random(f"{seed}/{period}").sample(range(1, layers + 1), self.active))

    def cost(self, skeleton: nn.Module) -> Cost:
        """Gradients of the largest layers that can be drawn together; moments of all, as all are drawn in time."""
        layers = Layers.of(skeleton)
        elements = Counter[int]()
        for name, parameter in body(skeleton).items():
            elements[layers.depth(name)] += parameter.numel()
        of_layers = sorted((elements[depth] for depth in range(1, layers.count + 1)), reverse=True)
        at_all_steps = elements.total() - sum(of_layers)
        return Cost(gradients=4 * (at_all_steps + sum(of_layers[: self.active])), optimizer=8 * elements.total())


class LISAAttachment(BaseTrainingAttachment):
    """The base, with all layers frozen but those of the period."""

    adapter: LISA

    def __init__(
        self,
        name: str,
        adapter: LISA,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        depths: Mapping[str, int],
        seed: int,
    ) -> None:
        super().__init__(name, adapter, model, parameters)
        self.depths, self.seed = depths, seed
        self.layers = Layers.of(model).count
        self._thaw(0)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self._thaw(step)

    def _thaw(self, step: int) -> None:
        """Free the layers of this step; a gradient left on the others would be stepped with."""
        awake = self.adapter.drawn(self.layers, self.seed, step) | {0, self.layers + 1}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self.depths[name] in awake)
            if not parameter.requires_grad:
                parameter.grad = None

    def may_rest(self) -> frozenset[str]:
        """Also the layers that were not drawn."""
        undrawn = frozenset(name for name, parameter in self.parameters.items() if not parameter.requires_grad)
        return undrawn | super().may_rest()
