"""What an adapter folder is made of, and how one is read: completely, strictly, and without executing anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from .device import Precision
from .errors import ArtefactError, brief, nearest
from .files import there
from .fingerprints import Fingerprint
from .untrusted import inside, read_json, read_tensors
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
]

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
SHOWN = 5  # faults in one message
PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


Short = Annotated[str, Field(pattern=r"^[\w.+!-]{1,100}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseRecord(_Record):
    """Which base an adapter belongs to."""

    source: str | None
    revision: str | None
    model_class: str
    dtype: str
    packed_as: str | None
    vocabulary: int | None = None  # entries
    fingerprint: Fingerprint

    @property
    def named(self) -> str:
        """Its name, for messages."""
        return f"{self.source}@{self.revision}" if self.source and self.revision else self.source or self.model_class

    @property
    def precision(self) -> Precision:
        """What to load it with, so that it computes as it did.

        Raises:
            ArtefactError: there is no such precision.
        """
        name = self.dtype.partition("/")[0]
        if name not in PRECISIONS:
            raise ArtefactError(f"{MANIFEST} says base.dtype: {brief(self.dtype)}{nearest(name, PRECISIONS)}")
        return PRECISIONS[name]


class AdapterRecord(_Record):
    """One adapter of the stack, with the plugin that provides it."""

    name: str
    adapter: str
    distribution: Short  # these two are advised to be installed
    version: Short
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
    base_mismatch: list[str] = []  # of adapters that its values came from: how their bases differed, where allowed
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
    _refuse_foreign(folder)
    manifest = _manifest(folder)
    names = [r.folder for r in manifest.adapters if r.folder is not None] or ["."]
    tensors: dict[str, dict[str, Tensor]] = {}
    configs: dict[str, dict[str, Any]] = {}
    found = []
    for name in dict.fromkeys(names):
        try:
            tensors[name] = read_tensors(inside(folder, f"{name}/{TENSORS}"))
        except ArtefactError as fault:
            found.append(str(fault))
        try:
            configs[name] = read_json(inside(folder, f"{name}/{CONFIG}"))
        except ArtefactError as fault:
            found.append(str(fault))
    if found:
        raise ArtefactError(_listed(found))
    return Saved(folder, manifest, tensors, configs)


def _refuse_foreign(folder: Path) -> None:
    if not there(folder / MANIFEST):
        others = [name for name in ("adapter_model.bin", CONFIG) if there(folder / name)]
        hint = (
            f"; it holds {' and '.join(others)}, which another program wrote (pickles are never read)" if others else ""
        )
        raise ArtefactError(f"{str(folder)[:300]} is not an adapter folder: it has no {MANIFEST}{hint}")


def _manifest(folder: Path) -> Manifest:
    path = inside(folder, MANIFEST)
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, f.path))[:200]}: {f.message}" for f in faults(error, Manifest)]
        raise ArtefactError(f"{path}: {_listed(texts)}") from None


def _listed(texts: Sequence[str]) -> str:
    more = f" (and {len(texts) - SHOWN} more)" if len(texts) > SHOWN else ""
    return f"{'; '.join(texts[:SHOWN])}{more}"


def is_peft_folder(folder: Path) -> bool:
    """Whether PEFT wrote it: tensors that may be read, and a configuration with a type of PEFT's."""
    try:
        kind = read_json(inside(folder, CONFIG)).get("peft_type")
    except ArtefactError:
        return False
    return isinstance(kind, str) and (folder / TENSORS).is_file()


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
