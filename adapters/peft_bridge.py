"""One bridge to the methods of PEFT that change modules of the base: configured, attached and saved like our own.

PEFT's tuner puts its layers around the base's modules in place, so the model is called as before and other adapters
compose with it. A layer of PEFT's always sits directly on the base's module; our own wrappers go around it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .contract import Adapter, Attachment, Context
from .errors import StackError, TargetError, nearest
from .frozen_linear import FrozenLinear
from .peft_config import differing
from .structure import Layers, head_modules, inside, modules, swap, unwrap, without_wrappers
from .targets import ALL_LINEAR, matches, resolve, shortest_names

__all__ = ["Bridged", "Injected", "InjectedAttachment", "Method", "keeping_what_trains", "quiet_peft", "seeded"]

Kind = Literal["linears", "norms", "embeddings", "blocks"]
PREFIX = "base_model.model."  # of PEFT's keys, before the path of a module


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the bridge has to know of a method beyond PEFT's own classes."""

    peft_type: PeftType
    on: Kind = "linears"  # which modules it changes
    defaults: Mapping[str, Any] = field(default_factory=dict)  # that we start from instead of PEFT's
    leave_out: frozenset[str] = frozenset()  # settings of PEFT's that have no meaning here
    always: frozenset[str] = frozenset()  # settings that PEFT wants to read even where they are its defaults
    frozen: frozenset[str] = frozenset()  # what PEFT calls parameters of its layers that nobody trains

    @property
    def config_class(self) -> type[PeftConfig]:
        """PEFT's configuration class."""
        found: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]
        return found


class Bridged(Adapter):
    """What every method of PEFT has in common: its configuration, built from ours."""

    method: ClassVar[Method]

    def values(self) -> dict[str, Any]:
        """What the user may set, as PEFT's class takes it."""
        return self.model_dump(exclude={"name", "targets"})

    def peft_config(self, **model_facts: Any) -> Any:
        """PEFT's configuration, with what only the model can tell."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults that we set on purpose
            return self.method.config_class(**(self.values() | model_facts))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], targets: Sequence[str]) -> "Bridged | None":
        known = {key: value for key, value in config.items() if key in cls.model_fields}
        aimed = {"targets": list(targets)} if "targets" in cls.model_fields else {}
        return cls.model_validate(known | aimed) if len(known) == len(config) else None


class Injected(Bridged):
    """A method whose layers PEFT puts around modules of the base."""

    targets: str | list[str] = ALL_LINEAR
    """Which modules: names, patterns, or all of the kind that the method changes."""

    @model_validator(mode="after")
    def _peft_accepts_it(self) -> "Injected":
        try:
            self.peft_config(target_modules=["any"])
        except TypeError as cause:
            raise ValueError(str(cause)) from cause
        return self

    def check(self, skeleton: nn.Module) -> None:
        self.chosen(skeleton)
        try:
            attachment = self.attach(
                skeleton, Context(name=self.name or self.method.peft_type.value, layers=Layers((), ()), fresh=False)
            )
        except (NotImplementedError, RuntimeError):
            return  # it looks at weights when it starts, and these come later
        attachment.detach()

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules it changes, by logical path."""
        if self.method.on == "linears":
            return resolve(model, self.targets)
        return _named(model, self.targets, self.method.on)

    def attach(self, model: nn.Module, context: Context) -> "InjectedAttachment":
        chosen = self.chosen(model)
        facts = self.facts(model, chosen)
        with without_wrappers(model), keeping_what_trains(model), seeded(context.seed), quiet_peft():
            instance = _inject(self, model, self.peft_config(**facts), list(chosen), context)
        return self.attached(context, model, instance=instance, facts=facts)

    def facts(self, model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, Any]:
        """What the configuration says of this model."""
        names = shortest_names(model, list(chosen)) if self.method.on == "linears" else list(chosen)
        transposed = any(isinstance(unwrap(module), Conv1D) for module in chosen.values())
        known = {field.name for field in fields(self.method.config_class)}
        return {"target_modules": names} | (
            {"fan_in_fan_out": True} if transposed and "fan_in_fan_out" in known else {}
        )

    def start(self, peft: PeftModel, key: str, context: Context) -> None:
        """Change what PEFT starts from; for methods that look at data."""

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> "InjectedAttachment":
        """The attachment; a method with more to it has its own."""
        return InjectedAttachment(context.name, self, model, **parts)


class _Shared:
    """PEFT's model of one method on one base, shared by the instances of that method."""

    def __init__(self, peft: PeftModel, method: PeftType) -> None:
        self.peft, self.method = peft, method
        self.on: dict[str, bool] = {}  # key of an instance -> whether it is switched on
        self.users: dict[nn.Module, list[str]] = {}  # layer of PEFT's -> keys of the instances that use it


@dataclass
class Instance:
    """One adapter inside PEFT's model of its method."""

    shared: _Shared
    key: str  # what PEFT calls it; contains nothing that PEFT would take for something else
    layers: list[nn.Module]
    parameters: dict[str, nn.Parameter]  # what it trains, by readable name


class InjectedAttachment(Attachment):
    """One named instance of a method of PEFT's. Several of one method share PEFT's model, under different keys."""

    adapter: Injected

    def __init__(
        self, name: str, adapter: Injected, model: nn.Module, *, instance: Instance, facts: dict[str, Any]
    ) -> None:
        super().__init__(name, adapter, model, instance.parameters)
        self.shared, self.key, self.layers, self.facts = instance.shared, instance.key, instance.layers, facts
        self._zero_at_start = [p for p in self.parameters.values() if not p.is_meta and not p.any()]

    def tensors(self) -> dict[str, Tensor]:
        """The keys are those of PEFT's file format."""
        with without_wrappers(self.model), quiet_peft():
            found: dict[str, Tensor] = get_peft_model_state_dict(
                self.shared.peft, adapter_name=self.key, save_embedding_layers=False
            )
        return {name: tensor.detach() for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with without_wrappers(self.model), keeping_what_trains(self.model), quiet_peft():
            result: Any = set_peft_model_state_dict(self.shared.peft, dict(tensors), adapter_name=self.key)
        if result.unexpected_keys:
            raise StackError(f"{self.name}: PEFT has no place for {result.unexpected_keys[0]}")

    def enabled(self, on: bool) -> None:
        self.shared.on[self.key] = on
        _activate(self.shared)

    def may_rest(self) -> frozenset[str]:
        """A factor has no gradient while the one it is multiplied by is zero, as most methods start."""
        at_start = bool(self._zero_at_start) and not any(p.any() for p in self._zero_at_start)
        return frozenset(self.parameters) if at_start else frozenset()

    def roles(self) -> dict[str, str]:
        """The factors of LoRA and its kin, by what PEFT calls their container."""
        containers = {"lora_A": "A", "lora_B": "B"}
        return {
            name: role
            for name in self.parameters
            for container, role in containers.items()
            if container in name.split(".")
        }

    def merge(self) -> None:
        if not self.adapter.capabilities.mergeable:
            super().merge()
        if any(isinstance(unwrap(layer), FrozenLinear) for layer in self.layers):
            raise StackError(f"{self.name}: the base is packed; load it without quantisation to merge")
        if any(len(self.shared.users[layer]) > 1 for layer in self.layers):
            raise StackError(f"{self.name} shares its layers with another instance: detach that first")
        with torch.no_grad(), quiet_peft():
            for layer in _tuned(self.layers):
                layer.merge(adapter_names=[self.key])
        self.detach()

    def detach(self) -> None:
        _withdraw(self.model, self.shared, self.key)

    def resolved(self) -> dict[str, Any]:
        return {"targets": self.facts["target_modules"]}

    def peft_config(self) -> dict[str, Any] | None:
        if not self.adapter.capabilities.peft_readable:
            return None
        method = self.adapter.method
        known = {field.name for field in fields(method.config_class)}
        if "modules_to_save" not in known and head_modules(self.model):
            return None  # PEFT would not read the head
        values = self.adapter.values()
        written = {key: values[key] for key in method.always} | differing(method.config_class, values)
        return {"peft_type": method.peft_type.value} | written | self.facts


# By model and method. It must not keep either alive: the attachments do.
_SHARED: "WeakValueDictionary[tuple[int, PeftType], _Shared]" = WeakValueDictionary()


def _inject(
    adapter: Injected, model: nn.Module, config: PeftConfig, paths: Sequence[str], context: Context
) -> Instance:
    """Let PEFT put its layers around the modules at `paths`; all of them or none."""
    name, place = context.name, (id(model), adapter.method.peft_type)
    shared = _SHARED.get(place)
    _refuse_shared_modules(model, paths, shared, name)
    key = _free_key(shared)
    before = {id(p) for p in model.parameters()} | ({id(p) for p in shared.peft.parameters()} if shared else set())
    modules_before = {id(m) for m in (shared.peft if shared else model).modules()}
    try:
        if shared is None:
            shared = _Shared(PeftModel(model, config, key), adapter.method.peft_type)
            _SHARED[place] = shared
        else:
            shared.peft.add_adapter(key, config)
        adapter.start(shared.peft, key, context)
    except (ValueError, TypeError, KeyError, ImportError, AssertionError, AttributeError) as cause:
        fresh = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and id(m) not in modules_before]
        swap(model, {layer: _around(layer) for layer in fresh})
        raise StackError(f"{name} cannot be attached: {cause}") from cause
    finally:
        vars(model).pop("peft_config", None)  # PEFT leaves a note there, and takes it for its own the next time
        _drop_input_hook(model)
    layers = [model.get_submodule(path) for path in paths]
    for module in shared.peft.modules():
        if id(module) not in modules_before:
            module.training = model.training  # new modules start in training mode, whatever the model is in
    for layer in layers:
        shared.users.setdefault(layer, []).append(key)
    for tuned in _tuned(layers):
        tuned.set_adapter([key])  # frees what this instance trains
    trained = _trained(shared, key, name, before, adapter.method.frozen)
    shared.on[key] = True
    _activate(shared)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return Instance(shared, key, layers, trained)


def _trained(shared: _Shared, key: str, name: str, before: set[int], frozen: frozenset[str]) -> dict[str, nn.Parameter]:
    """The new parameters that PEFT trains, in float32, named after their places in the base."""
    found = {}
    for path, parameter in shared.peft.named_parameters():
        if frozen & set(path.split(".")):
            parameter.requires_grad_(False)
        elif id(parameter) not in before and parameter.requires_grad:
            parameter.data = parameter.data.float()
            found[_readable(path, key, name)] = parameter
    if not found:
        raise StackError(f"{name}: PEFT left nothing to train with these settings")
    return found


def _readable(path: str, key: str, name: str) -> str:
    inner = path.removeprefix(PREFIX).removeprefix("base_model.")
    return ".".join(name if part == key else part for part in inner.split("."))


def _free_key(shared: _Shared | None) -> str:
    taken = shared.on if shared else {}
    return next(key for key in (f"onegpu{i}" for i in range(len(taken) + 1)) if key not in taken)


def _refuse_shared_modules(model: nn.Module, paths: Sequence[str], shared: _Shared | None, name: str) -> None:
    own = set(shared.users) if shared else set()
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, BaseTunerLayer) and module not in own:
            raise StackError(
                f"{name} and another method of PEFT's both want {path}, and a module can have one: choose other "
                "targets for one of them"
            )


def _activate(shared: _Shared) -> None:
    """Make PEFT's layers use the instances that are switched on, and train what trained before."""
    with keeping_what_trains(shared.peft):
        for layer, keys in shared.users.items():
            assert isinstance(layer, BaseTunerLayer)
            on = [key for key in keys if shared.on[key]]
            if on:
                layer.set_adapter(on)
            layer.enable_adapters(bool(on))


def _withdraw(model: nn.Module, shared: _Shared, key: str) -> None:
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
        _activate(shared)
    else:
        _SHARED.pop((id(model), shared.method), None)


def _tuned(layers: Iterable[nn.Module]) -> Iterator[BaseTunerLayer]:
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


def _named(model: nn.Module, targets: str | Sequence[str], kind: Kind) -> dict[str, nn.Module]:
    """The modules of a kind that `targets` name (`all` for every one), heads and their like left out."""
    heads = head_modules(model)
    among = {
        path: module
        for path, module in modules(model)
        if KINDS[kind](unwrap(module), model) and not any(path == h or path.startswith(f"{h}.") for h in heads)
    }
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for entry in wanted:
        hits = {path for path in among if entry == "all" or matches(path, entry)}
        if not hits:
            names = sorted({path.rpartition(".")[2] for path in among})
            raise TargetError(f"target {entry!r} matches none of the {kind}{nearest(entry, names)}")
        chosen |= hits
    return {path: module for path, module in among.items() if path in chosen}


def _is_norm(module: nn.Module, model: nn.Module) -> bool:
    """Something with one scale per feature and nothing inside: LayerNorm, RMSNorm, whatever a model calls its own."""
    own = dict(module.named_parameters(recurse=False))
    return not list(module.children()) and "weight" in own and own["weight"].ndim == 1


def _is_embedding(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and module is unwrap(model.get_input_embeddings())


def _is_block(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


KINDS: dict[str, Callable[[nn.Module, nn.Module], bool]] = {
    "norms": _is_norm,
    "embeddings": _is_embedding,
    "blocks": _is_block,
}
