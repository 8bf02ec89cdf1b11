"""A second instance of a base in memory, without a second copy of its weights."""

import copy

from torch import nn

from .structure import head_modules

__all__ = ["twin"]


def twin(model: nn.Module) -> nn.Module:
    """A model of its own that shares every tensor of the base: what is attached to one is not on the other.

    Taken before anything is attached. Heads are copied, as they are trained. Never train the twin, nor attach to it
    what trains the base itself: the tensors are the same ones.
    """
    heads = {id(p) for path in head_modules(model) for p in model.get_submodule(path).parameters()}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in heads}
    return copy.deepcopy(model, shared)
