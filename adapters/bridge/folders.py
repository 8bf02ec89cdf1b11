"""Folders that stock PEFT saved, read as stacks of ours: strictly, and without executing anything.

Such a folder has no manifest, so nothing says which base it belongs to; keys and shapes are all that can be compared.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType
from pydantic import ValidationError
from torch import Tensor, nn

from ..contract import Adapter
from ..errors import ArtefactError, OnegpuError
from ..manifest import CONFIG, TENSORS
from ..specs import get
from ..structure import head_modules, modules
from ..targets import ALL_LINEAR, resolve
from ..untrusted import inside, read_json, read_tensors
from .config import differing

__all__ = ["PeftFolder", "read_peft_folder"]

# Which of our adapters may be what a type of PEFT's is, where it is not the one of that name.
OURS: dict[str, tuple[str, ...]] = {
    "LORA": ("lora", "dora", "peft-lora"),
    "PREFIX_TUNING": ("prefix",),
    "TRAINABLE_TOKENS": ("trainable-tokens", "peft-trainable-tokens"),
    "CPT": ("prompt-tuning",),
    "P_TUNING": ("prompt-tuning",),
}
# What computed these is not in PEFT's files: what it came to is a plain prompt or prefix of so many vectors.
COMPUTED = frozenset({"CPT", "P_TUNING", "PREFIX_TUNING"})
AIMS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
# Settings that say how PEFT is run, or repeat what the model and the tensors say.
NO_MEANING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "modules_to_save", "num_layers",
     "num_attention_heads", "num_transformer_submodules", "peft_type", "peft_version", "revision", "runtime_config",
     "task_type", "token_dim", "tokenizer_name_or_path"}
)  # fmt: skip


@dataclass(frozen=True)
class PeftFolder:
    """What a folder of PEFT's comes to on a model."""

    folder: Path
    adapters: list[Adapter]  # that can do what it says; the first whose tensors it holds is the one
    tensors: dict[str, Tensor]


def read_peft_folder(folder: Path, model: nn.Module) -> PeftFolder:
    """What may be attached for a folder that stock PEFT saved, and its tensors.

    Raises:
        ArtefactError: it is damaged, of an unknown type, or says something that no adapter here can do.
        PluginError: the adapter that could is not installed.
    """
    with _untrusted(folder):
        return _read(folder, model)


@contextmanager
def _untrusted(folder: Path) -> Iterator[None]:
    """A stranger's settings may be of any type, and PEFT's own code trips over most: that is a fault of the folder."""
    try:
        yield
    except OnegpuError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its settings"
        raise ArtefactError(f"{folder}: {CONFIG} is wrong at {place}: {first['msg']}") from error
    except Exception as cause:
        raise ArtefactError(f"{folder}: {CONFIG} cannot be used: {type(cause).__name__}: {cause}") from cause


def _read(folder: Path, model: nn.Module) -> PeftFolder:
    config = read_json(inside(folder, CONFIG))
    kind = config["peft_type"]
    if kind not in PeftType.__members__:
        raise ArtefactError(f"{folder}: PEFT here knows no method {kind!r}; a newer PEFT may")
    tensors = read_tensors(inside(folder, TENSORS))
    _check_heads(folder, config, model)
    active = _active(folder, PeftType[kind], config)
    paths = _aimed_at(config, model)
    names = OURS.get(kind, (kind.lower().replace("_", "-"),))
    adapters = [found for name in names if (found := get(name).from_peft(active, paths)) is not None]
    if not adapters:
        raise ArtefactError(f"{folder}: no adapter here does what {kind} with {sorted(active)} says")
    return PeftFolder(folder, adapters, tensors)


def _active(folder: Path, kind: PeftType, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from PEFT's defaults and change what is computed.

    An unknown one that is empty comes from another version that does not use it; any other would change the method.
    """
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    foreign = sorted(key for key, value in config.items() if key not in known and value)
    if foreign:
        raise ArtefactError(f"{folder}: {CONFIG} says {foreign[0]}, which PEFT here does not know; a newer one may")
    given = {key: value for key, value in config.items() if key in known and key not in NO_MEANING | AIMS}
    if kind.value in COMPUTED:
        return {"num_virtual_tokens": config["num_virtual_tokens"]}
    return {key: value for key, value in differing(PEFT_TYPE_TO_CONFIG_MAPPING[kind], given).items() if value != {}}


def _aimed_at(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Full paths of the modules that PEFT would change."""
    if not config.get("target_modules"):
        return []
    if config["target_modules"] == ALL_LINEAR:
        return list(resolve(model, ALL_LINEAR))
    aim = SimpleNamespace(**{key: config.get(key) for key in AIMS})
    return [path for path, _ in modules(model) if check_target_module_exists(aim, path)]


def _check_heads(folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    saved = set(config.get("modules_to_save") or ())
    own = {name.rpartition(".")[2] for name in head_modules(model)}
    # PEFT lists both of its usual names for the head of a classifier, whichever the model has.
    if saved and not own:
        raise ArtefactError(f"{folder} holds a trained {min(saved)}, and {type(model).__name__} has no head")
    missing = sorted(own - saved)
    if missing:
        raise ArtefactError(
            f"{folder} holds no {missing[0]}, which {type(model).__name__} has: load its own model class"
        )
