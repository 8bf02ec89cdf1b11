"""One bridge to the methods of PEFT that change modules of the base: configured, attached and saved like our own.

PEFT's tuner puts its layers around the base's modules in place, so the model is called as before and other adapters
compose with it. A layer of PEFT's always sits directly on the base's module; our own wrappers go around it.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contract import Adapter, Attachment, Context
from ..errors import StackError, TargetError, nearest
from ..frozen_linear import FrozenLinear
from ..structure import Layers, head_modules, unwrap, without_wrappers
from ..targets import ALL_LINEAR, Kind, as_list, resolve, resolve_kind, shortest_names
from .config import differing
from .tuner import Instance, activate, inject, keeping_what_trains, quiet_peft, seeded, tuned, withdraw

__all__ = ["Bridged", "Injected", "InjectedAttachment", "Method"]


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

    def aims(self, skeleton: nn.Module) -> dict[str, list[str]]:
        return {entry: list(self.chosen(skeleton, entry)) for entry in as_list(self.targets)}

    def check(self, skeleton: nn.Module) -> None:
        self.chosen(skeleton)
        try:
            attachment = self.attach(
                skeleton, Context(name=self.name or self.method.peft_type.value, layers=Layers((), ()), fresh=False)
            )
        except (NotImplementedError, RuntimeError):
            return  # it looks at weights when it starts, and these come later
        attachment.detach()

    def chosen(self, model: nn.Module, entry: str | None = None) -> dict[str, nn.Module]:
        """The modules it changes, by logical path; or those of one entry.

        Raises:
            TargetError: an entry of `targets`, or a key of a setting by pattern, matches none.
        """
        wanted = self.targets if entry is None else entry
        linears = self.method.on == "linears"
        found = resolve(model, wanted) if linears else resolve_kind(model, wanted, self.method.on)
        if entry is None:
            self._refuse_idle_patterns(found)
        return found

    def _refuse_idle_patterns(self, paths: Collection[str]) -> None:
        """PEFT passes over a key of `rank_pattern` and its kin that matches no module, and says nothing."""
        by_part = self.method.peft_type == PeftType.OSF  # there a key matches any part of a path
        for setting, value in self.values().items():
            for key in value if setting.endswith("_pattern") and isinstance(value, dict) else ():
                if not any(key in path if by_part else _ends_with(path, key) for path in paths):
                    names = {path.rpartition(".")[2] for path in paths}
                    raise TargetError(f"{setting}: {key!r} matches none of the targets{nearest(key, names)}")

    def attach(self, model: nn.Module, context: Context) -> "InjectedAttachment":
        chosen = self.chosen(model)
        facts = self.facts(model, chosen)
        with without_wrappers(model), keeping_what_trains(model), seeded(context.seed), quiet_peft():
            instance = inject(
                model,
                self.peft_config(**facts),
                list(chosen),
                method=self.method.peft_type,
                name=context.name,
                start=lambda peft, key: self.start(peft, key, context),
                frozen=self.method.frozen,
            )
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


def _ends_with(path: str, pattern: str) -> bool:
    """As PEFT's get_pattern_key: the pattern is a regular expression over the end of a path, from a dot on."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
    except re.error:
        return False


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
        activate(self.shared)

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
            for layer in tuned(self.layers):
                layer.merge(adapter_names=[self.key])
        self.detach()

    def detach(self) -> None:
        withdraw(self.model, self.shared, self.key)

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
