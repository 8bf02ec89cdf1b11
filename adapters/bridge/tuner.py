"""PEFT's model of one method on one base, shared by the instances of that method, and what it takes to live with it.

PEFT freezes, frees and switches as if nothing else were attached. Here one instance is put in or taken out at a time,
and everything else stays as it was.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedModel

from ..errors import StackError
from ..structure import inside, swap

__all__ = [
    "Instance",
    "Shared",
    "activate",
    "inject",
    "keeping_what_trains",
    "quiet_peft",
    "seeded",
    "tuned",
    "withdraw",
]

PREFIX = "base_model.model."  # of PEFT's keys, before the path of a module


class Shared:
    """PEFT's model of one method on one base, shared by the instances of that method."""

    def __init__(self, peft: PeftModel, method: PeftType) -> None:
        self.peft, self.method = peft, method
        self.on: dict[str, bool] = {}  # key of an instance -> whether it is switched on
        self.users: dict[nn.Module, list[str]] = {}  # layer of PEFT's -> keys of the instances that use it


@dataclass
class Instance:
    """One adapter inside PEFT's model of its method."""

    shared: Shared
    key: str  # what PEFT calls it; contains nothing that PEFT would take for something else
    layers: list[nn.Module]
    parameters: dict[str, nn.Parameter]  # what it trains, by readable name


# By model and method. It must not keep either alive: the attachments do.
_SHARED: "WeakValueDictionary[tuple[int, PeftType], Shared]" = WeakValueDictionary()


def inject(
    model: nn.Module,
    config: PeftConfig,
    paths: Sequence[str],
    *,
    method: PeftType,
    name: str,
    start: Callable[[PeftModel, str], None],
    frozen: frozenset[str],
) -> Instance:
    """Let PEFT put its layers around the modules at `paths`; all of them or none.

    Args:
        start: changes what PEFT starts from, given its model and the key of the new instance.
        frozen: what PEFT calls parameters of its layers that nobody trains.

    Raises:
        StackError: PEFT refuses, or another method of its sits on one of the modules; the model is as it was.
    """
    shared = _SHARED.get((id(model), method))
    _refuse_shared_modules(model, paths, shared, name)
    key, before = _free_key(model), _Before.of(shared.peft if shared else model)
    try:
        shared = _put_in(model, config, shared, method, key)
        start(shared.peft, key)
        for module in shared.peft.modules():
            if id(module) not in before.modules:
                module.training = model.training  # new modules start in training mode, whatever the model is in
        layers = [model.get_submodule(path) for path in paths]
        for tuner_layer in tuned(layers):
            tuner_layer.set_adapter([key])  # frees what this instance trains
        trained = _trained(shared, key, name, before, frozen)
    except (ValueError, TypeError, KeyError, ImportError, AssertionError, AttributeError) as cause:
        _undo(model, shared, key, before)
        raise StackError(f"{name} cannot be attached: {cause}") from cause
    finally:
        vars(model).pop("peft_config", None)  # PEFT leaves a note there, and takes it for its own the next time
        _drop_input_hook(model)
    _SHARED[id(model), method] = shared
    for layer in layers:
        shared.users.setdefault(layer, []).append(key)
    shared.on[key] = True
    activate(shared)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return Instance(shared, key, layers, trained)


class _Before(NamedTuple):
    """What there was before an instance was put in, by identity."""

    modules: frozenset[int]
    parameters: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module) -> "_Before":
        return cls(frozenset(map(id, model.modules())), frozenset(map(id, model.parameters())))


def _put_in(model: nn.Module, config: PeftConfig, shared: Shared | None, method: PeftType, key: str) -> Shared:
    if shared is None:
        return Shared(PeftModel(model, config, key), method)
    shared.peft.add_adapter(key, config)
    return shared


def _undo(model: nn.Module, shared: Shared | None, key: str, before: _Before) -> None:
    """Take out what PEFT had put in before it failed."""
    fresh = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and id(m) not in before.modules]
    swap(model, {layer: _around(layer) for layer in fresh})
    if shared is not None and shared.on:
        shared.peft.peft_config.pop(key, None)
        with quiet_peft():
            for layer in tuned(shared.users):
                layer.delete_adapter(key)
        activate(shared)


def _trained(shared: Shared, key: str, name: str, before: _Before, frozen: frozenset[str]) -> dict[str, nn.Parameter]:
    """The new parameters that PEFT trains, in float32, named after their places in the base."""
    found = {}
    for path, parameter in shared.peft.named_parameters():
        if frozen & set(path.split(".")):
            parameter.requires_grad_(False)
        elif id(parameter) not in before.parameters and parameter.requires_grad:
            parameter.data = parameter.data.float()
            found[_readable(path, key, name)] = parameter
    if not found:
        raise StackError(f"{name}: PEFT left nothing to train with these settings")
    return found


def _readable(path: str, key: str, name: str) -> str:
    inner = path.removeprefix(PREFIX).removeprefix("base_model.")
    return ".".join(name if part == key else part for part in inner.split("."))


def _free_key(model: nn.Module) -> str:
    """A name that no instance of any method has on this model: AdaLoRA looks for its tensors by such names."""
    taken = {key for (place, _), shared in _SHARED.items() if place == id(model) for key in shared.on}
    return next(key for key in (f"onegpu{i}" for i in range(len(taken) + 1)) if key not in taken)


def _refuse_shared_modules(model: nn.Module, paths: Sequence[str], shared: Shared | None, name: str) -> None:
    own = set(shared.users) if shared else set()
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, BaseTunerLayer) and module not in own:
            raise StackError(
                f"{name} and another method of PEFT's both want {path}, and a module can have one: choose other "
                "targets for one of them"
            )


def activate(shared: Shared) -> None:
    """Make PEFT's layers use the instances that are switched on, and train what trained before."""
    with keeping_what_trains(shared.peft):
        for layer, keys in shared.users.items():
            assert isinstance(layer, BaseTunerLayer)
            on = [key for key in keys if shared.on[key]]
            if on:
                layer.set_adapter(on)
            layer.enable_adapters(bool(on))


def withdraw(model: nn.Module, shared: Shared, key: str) -> None:
    """Take one instance out; a layer that no other one uses goes too."""
    bare: dict[nn.Module, nn.Module] = {}
    for layer, keys in list(shared.users.items()):
        if key not in keys:
            continue
        assert isinstance(layer, BaseTunerLayer)
        keys.remove(key)
        if keys:
            with quiet_peft():
                layer.delete_adapter(key)
        else:
            bare[layer] = _around(layer)
            del shared.users[layer]
    swap(model, bare)
    del shared.on[key]
    shared.peft.peft_config.pop(key, None)
    if shared.on:
        activate(shared)
    else:
        _SHARED.pop((id(model), shared.method), None)


def tuned(layers: Iterable[nn.Module]) -> Iterator[BaseTunerLayer]:
    """The same modules, known to be layers of PEFT's."""
    for layer in layers:
        assert isinstance(layer, BaseTunerLayer), type(layer)
        yield layer


def _drop_input_hook(model: nn.Module) -> None:
    """PEFT makes embeddings require gradients under checkpointing, for good; the stack does so while it is attached."""
    if isinstance(model, PreTrainedModel) and model.is_gradient_checkpointing:
        model.disable_input_require_grads()


@inside.register(BaseTunerLayer)
def _around(layer: Any) -> nn.Module:
    """What a layer of PEFT's stands in for."""
    wrapped: nn.Module = layer.base_layer
    return wrapped


@contextmanager
def keeping_what_trains(model: nn.Module) -> Iterator[None]:
    """PEFT freezes and frees parameters as if there were no other adapter: put them back as they were."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, trains in before.items():
            parameter.requires_grad_(trains)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT warns of what is meant so here: several adapters, an adapter that is not its default one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
