"""What an adapter folder is made of, and how one is read: completely, strictly, and without executing anything."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .device import Precision
from .errors import ArtefactError
from .fingerprints import Fingerprint
from .validation import faults

__all__ = [
    "CONFIG",
    "MANIFEST",
    "TENSORS",
    "AdapterRecord",
    "BaseRecord",
    "Manifest",
    "Saved",
    "card",
    "is_peft_folder",
    "read",
    "read_json",
    "read_tensors",
]

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Record):
    """Which base an adapter belongs to."""

    source: str | None
    revision: str | None
    model_class: str
    dtype: str
    packed_as: str | None
    fingerprint: Fingerprint

    @property
    def precision(self) -> Precision:
        """What to load it with, so that it computes as it did."""
        return PRECISIONS[self.dtype.partition("/")[0]]


class AdapterRecord(_Record):
    """One adapter of the stack, with the plugin that provides it."""

    name: str
    adapter: str
    distribution: str
    version: str
    api: int
    config: dict[str, Any]
    folder: str | None  # where its tensors are, relative to the manifest; None for an adapter without any
    resolved: dict[str, Any]


class Manifest(_Record):
    """`manifest.json`."""

    format: Literal[1] = 1
    base: BaseRecord
    adapters: list[AdapterRecord]
    heads: list[str]
    versions: dict[str, str]
    run: dict[str, Any] = {}  # facts of the run that trained it: seed, data, metrics, probe


@dataclass(frozen=True)
class Saved:
    """An adapter folder as read: nothing in it was executed."""

    folder: Path
    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]  # by folder of the adapter
    configs: dict[str, dict[str, Any]]


def read(folder: str | Path) -> Saved:
    """Read an adapter folder and check that it is complete and well-formed.

    Raises:
        ArtefactError: with every fault found.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        others = [name for name in ("adapter_model.bin", CONFIG) if (folder / name).exists()]
        hint = (
            f"; it holds {' and '.join(others)}, which another program wrote (pickles are never read)" if others else ""
        )
        raise ArtefactError(f"{folder} is not an adapter folder: it has no {MANIFEST}{hint}")
    try:
        manifest = Manifest.model_validate(json.loads((folder / MANIFEST).read_text("utf-8")))
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, f.path))}: {f.message}" for f in faults(error, Manifest)]
        raise ArtefactError(f"{folder / MANIFEST}: {'; '.join(texts)}") from None
    except ValueError as error:
        raise ArtefactError(f"{folder / MANIFEST} is not JSON: {error}") from None
    names = [r.folder for r in manifest.adapters if r.folder is not None] or ["."]
    outside = [name for name in names if not (folder / name).resolve().is_relative_to(folder.resolve())]
    if outside:
        raise ArtefactError(f"{folder / MANIFEST}: the folder {outside[0]!r} lies outside the artefact")
    tensors = {name: read_tensors(folder / name / TENSORS) for name in names}
    configs = {name: read_json(folder / name / CONFIG) for name in names}
    return Saved(folder, manifest, tensors, configs)


def is_peft_folder(folder: Path) -> bool:
    """Whether PEFT wrote it: tensors that may be read, and a configuration with a type of PEFT's."""
    try:
        kind = json.loads((folder / CONFIG).read_text("utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return isinstance(kind, str) and (folder / TENSORS).is_file()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} is missing")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError) as cause:
        raise ArtefactError(f"{path} is damaged: {cause}") from cause
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing") from None
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise ArtefactError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} must hold one JSON object")
    return content


CARD = """# {stack} on {base}

Made by onegpu {version}. `manifest.json` says on which base, with which settings, data and versions.

```python
from onegpu.adapters import load, load_base

base = load_base("{base}")
stack = load(base, "DIR")
```
"""

PEFT_CARD = """
With stock PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "DIR"{subfolder})
```
"""


def card(manifest: Manifest, read_by_peft: Sequence[str]) -> str:
    """The model card; `read_by_peft` are the folders with a configuration of PEFT's."""
    stack = " + ".join(record.adapter for record in manifest.adapters) or "trained head"
    base = manifest.base.source or manifest.base.model_class
    text = CARD.format(stack=stack, base=base, version=manifest.versions["onegpu"])
    if read_by_peft:
        first = read_by_peft[0]
        text += PEFT_CARD.format(subfolder="" if first == "." else f', subfolder="{first}"')
    return text
