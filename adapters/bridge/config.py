"""Turns a configuration class of PEFT's into fields of a strict one of ours: its names, defaults and help texts."""

import dataclasses
from collections.abc import Collection, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, create_model

__all__ = ["OWNED", "differing", "fields_of"]

# What the stack, the task or the model decides, for every method. The base's own biases are `bitfit`'s to train.
OWNED = frozenset(field.name for field in dataclasses.fields(PeftConfig)) | {
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "progressbar",
    "runtime_config",
    "runtime_offload_base_weight",
    "target_modules",
    "target_parameters",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    "trainable_token_indices",
}


def fields_of(config: type, leave_out: Collection[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Field definitions for `pydantic.create_model`, of everything that a user may set.

    Args:
        config: a dataclass of PEFT's.
        leave_out: fields that are not the user's.
        defaults: values that we start from instead of PEFT's.
    """
    hints = get_type_hints(config)
    return {
        field.name: _definition(field, hints[field.name], defaults)
        for field in dataclasses.fields(config)
        if field.name not in leave_out
    }


def differing(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults of PEFT's class; only these belong in a file."""
    usual = {field.name: _default(field) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if _plain(value) != _plain(usual[name])}


def _definition(field: "dataclasses.Field[Any]", hint: Any, defaults: Mapping[str, Any]) -> tuple[Any, Any]:
    default = defaults.get(field.name, _plain(_default(field)))
    annotation = _strict(hint)
    if default is None:
        annotation = annotation | None
    text = " ".join(str(field.metadata.get("help", "")).split()) or f"PEFT's `{field.name}`."
    return annotation, Field(default=default, description=text)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _strict(hint: Any) -> Any:
    """The same type in terms of what a recipe can say: no enumerations, tuples or classes of PEFT's."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union(inner)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal[tuple(member.value for member in hint)]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        settings = ConfigDict(frozen=True, extra="forbid", strict=True)
        return create_model(hint.__name__, __config__=settings, **fields_of(hint, (), {}))
    if hint is dict:
        return dict[str, Any]
    if origin is dict:
        return dict.__class_getitem__((str, _strict(inner[1])))
    if origin in (list, tuple):
        return list.__class_getitem__(_strict(inner[0]))
    return hint


def _union(members: tuple[Any, ...]) -> Any:
    enumerated = any(get_origin(_strict(member)) is Literal for member in members)  # then a bare `str` says no more
    kept = [_strict(m) for m in members if not (m is NoneType or (m is str and enumerated))]
    models = [m for m in kept if isinstance(m, type) and issubclass(m, BaseModel)]
    if models:  # where PEFT takes its class or a loose dict, only the strict form
        kept = models
    joined: Any = Union.__getitem__(tuple(kept))
    return joined | None if NoneType in members else joined
