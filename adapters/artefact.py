"""The adapter folder that people share: written whole or not at all, read strictly.

    adapter/
      adapter_model.safetensors   the trained tensors, heads included
      adapter_config.json         what stock PEFT reads, wherever PEFT knows the method
      manifest.json               base fingerprint, stack, versions, training facts
      README.md                   model card

Several adapters with tensors of their own get one subfolder each, under one manifest. Tensors are safetensors and
everything else is JSON: nothing is ever unpickled, and nothing in a folder can name code to import.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from . import registry
from .attaching import attach
from .contract import Adapter, Attachment
from .errors import ArtefactError, PluginError, brief
from .files import atomic_folder, there, write_json, write_text
from .fingerprints import Fingerprint, fingerprint
from .fitting import check_base, config_faults, finite_faults, misfit, refuse_excess, tensor_faults, vocabulary
from .frozen_linear import packed_as
from .manifest import CONFIG, MANIFEST, TENSORS, AdapterRecord, BaseRecord, Manifest, Saved, card, is_peft_folder, read
from .registry import ADAPTERS
from .specs import Named, build
from .stack import Stack
from .structure import head_modules

__all__ = ["MANIFEST", "attach_saved", "confirm", "fill", "load", "read", "save", "specs"]

LIBRARIES = ("onegpu", "torch", "transformers", "bitsandbytes", "safetensors")
TASK_TYPES = {
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def save(
    stack: Stack,
    folder: str | Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    base: Fingerprint | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter folder of a stack: all of it appears at once, or nothing does. Never touches the network.

    Args:
        source, revision: how the base was named; its own name when left out.
        base: the base's fingerprint, where it is known already; it is taken now when left out.
        run: facts of the run for the manifest; anything JSON.

    Raises:
        ArtefactError: something trainable would not be saved, or an adapter's class is not registered.
    """
    _refuse_unsaved(stack)
    files = _tensor_files(stack)
    source = source or getattr(getattr(stack.root, "config", None), "_name_or_path", None) or None
    manifest = _manifest(stack, files, source, revision, base or stack.base, run or {})
    with atomic_folder(Path(folder)) as partial:
        for name, (tensors, attachment) in files.items():
            place = partial / name
            place.mkdir(exist_ok=True)
            # One metadata key only: several come out in random order, and bytes would differ between equal runs.
            save_file(_apart(tensors), place / TENSORS, metadata={"format": "pt"})
            write_json(place / CONFIG, _config(stack, attachment, source))
        write_json(partial / MANIFEST, manifest.model_dump())
        by_peft = [name for name, (_, a) in files.items() if a is not None and a.peft_config() is not None]
        write_text(partial / "README.md", card(manifest, by_peft))


def load(model: nn.Module, folder: str | Path, *, allow_base_mismatch: bool = False) -> Stack:
    """Attach a saved stack to its base and give it the saved values. What it holds is trainable.

    Args:
        model: the base, from `load_base` or from transformers.
        folder: an adapter folder of ours, or one that stock PEFT saved (which does not say on which base).
        allow_base_mismatch: go on although the model is not the base that the adapter was trained on.

    Raises:
        ArtefactError: the folder is damaged, does not fit the model, or belongs to another base.
        PluginError: an adapter of the stack is not installed.
    """
    folder = Path(folder)
    if not there(folder / MANIFEST) and is_peft_folder(folder):
        return _load_from_peft(model, folder)
    saved = read(folder)
    mismatch = check_base(saved, model, allow=allow_base_mismatch)
    named = _named(saved, model)
    refuse_excess(folder, chain.from_iterable(t.values() for t in saved.tensors.values()), model, named)
    stack = _attached(model, named, saved)
    stack.base_mismatch = saved.manifest.base_mismatch + mismatch
    return stack


def attach_saved(model: nn.Module, saved: Saved) -> Stack:
    """Attach a stack that was read and give it the saved values, on a model that is known to be its base.

    Raises:
        ArtefactError: keys, shapes, dtypes or configurations differ; nothing is attached.
    """
    return _attached(model, _named(saved, model), saved)


def _named(saved: Saved, model: nn.Module) -> Sequence[Named]:
    return build([_spec(record) for record in _attachable(saved, model)])


def _attached(model: nn.Module, named: Sequence[Named], saved: Saved) -> Stack:
    stack = attach(model, named, fresh=False)
    try:
        _fill(stack, saved)
    except BaseException:
        stack.detach()
        raise
    return stack


def specs(manifest: Manifest) -> list[dict[str, Any]]:
    """The stack of a saved adapter, for `load_base`; every plugin of it was found.

    Raises:
        PluginError: one is not installed; the message says which, and how to get it.
    """
    return [_spec(record) for record in manifest.adapters]


def _spec(record: AdapterRecord) -> dict[str, Any]:
    _installed(record)
    return {_pick(record): record.config | {"name": record.name}}


def fill(stack: Stack, folder: str | Path) -> None:
    """Give an attached stack the values of a folder that holds exactly its tensors.

    Raises:
        ArtefactError: keys, shapes, dtypes or configurations differ; the stack keeps its values.
    """
    _fill(stack, read(folder))


def confirm(stack: Stack, folder: str | Path) -> Saved:
    """Read a folder that was just written, and compare it with what is live, bit for bit; returns what was read.

    Raises:
        ArtefactError: naming the first tensor that differs, is missing, or belongs to no adapter.
    """
    saved = read(folder)
    written = {f"{name}/{key}": t for name, tensors in saved.tensors.items() for key, t in tensors.items()}
    live = {f"{name}/{key}": t for name, (own, _) in _tensor_files(stack).items() for key, t in own.items()}
    if faults := tensor_faults(live, written):
        raise ArtefactError(f"{folder} was not written as it is: {faults[0].removeprefix('./')}")
    for key, tensor in live.items():
        if not torch.equal(tensor.cpu(), written[key]):
            raise ArtefactError(f"{folder}: {key.removeprefix('./')} was not written as it is")
    return saved


def _tensor_files(stack: Stack) -> dict[str, tuple[dict[str, Tensor], Attachment | None]]:
    """Folder -> (tensors, whose). Heads travel with the first."""
    carriers = [(a, a.tensors()) for a in stack.attachments]
    carriers = [(a, tensors) for a, tensors in carriers if tensors]
    files: dict[str, tuple[dict[str, Tensor], Attachment | None]] = {}
    for attachment, tensors in carriers:
        files["." if len(carriers) == 1 else attachment.name] = (dict(tensors), attachment)
    if stack.heads:
        tensors, first = next(iter(files.values()), ({}, None))
        prefix = first.head_prefix if first else Attachment.head_prefix
        tensors |= {f"{prefix}{name}": p.detach() for name, p in stack.heads.items()}
        files = files or {".": (tensors, None)}
    return files


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: some methods share a tensor between layers, and a file cannot."""
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        alone = tensor.cpu().contiguous()
        found[key] = alone.clone() if alone.untyped_storage().data_ptr() in seen else alone
        seen.add(found[key].untyped_storage().data_ptr())
    return found


def _refuse_unsaved(stack: Stack) -> None:
    owned = {id(p) for p in stack.trainable().values()}
    strays = [n for n, p in stack.root.named_parameters() if p.requires_grad and id(p) not in owned]
    if strays:
        raise ArtefactError(f"{strays[0]} is trainable but belongs to no adapter, so it would be lost: freeze it")
    if not owned:
        raise ArtefactError("nothing is trainable, so there is nothing to save")


def _manifest(
    stack: Stack,
    files: Mapping[str, tuple[dict[str, Tensor], Attachment | None]],
    source: str | None,
    revision: str | None,
    base: Fingerprint | None,
    run: Mapping[str, Any],
) -> Manifest:
    attachments = {a.name: a for a in stack.attachments}
    folders = {a.name: folder for folder, (_, a) in files.items() if a is not None}
    records = []
    for n in stack.named:
        if n.entry is None:
            raise ArtefactError(
                f"{n.name}: {type(n.adapter).__name__} is registered by no distribution, so nobody could load it"
            )
        attachment = attachments.get(n.name)
        records.append(
            AdapterRecord(
                name=n.name,
                adapter=n.entry.name,
                distribution=n.entry.distribution,
                version=n.entry.version,
                api=n.adapter.api,
                config=(attachment.adapter if attachment else n.adapter).model_dump(mode="json", exclude={"name"}),
                folder=folders.get(n.name),
                resolved=attachment.resolved() if attachment else {},
            )
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in stack.root.parameters() if not p.requires_grad}
    return Manifest(
        base=BaseRecord(
            source=source,
            revision=revision,
            model_class=type(stack.root).__name__,
            dtype="/".join(sorted(dtypes)) or "float32",
            packed_as=packed_as(stack.root),
            vocabulary=vocabulary(stack.root),
            fingerprint=base or fingerprint(stack.root),
        ),
        adapters=records,
        heads=sorted(stack.heads),
        base_mismatch=stack.base_mismatch,
        versions={name: version(name) for name in LIBRARIES},
        run=dict(run),
    )


def _config(stack: Stack, attachment: Attachment | None, source: str | None) -> dict[str, Any]:
    """`adapter_config.json`: PEFT's keys where PEFT knows the method, otherwise just our name for it."""
    peft = attachment.peft_config() if attachment else None
    if peft is None:
        return {"peft_type": None, "onegpu_adapter": attachment.name if attachment else None}
    config = {"base_model_name_or_path": source, "inference_mode": True, **peft}
    class_name = type(stack.root).__name__
    task_type = next((task for task, names in TASK_TYPES.items() if class_name in names.values()), None)
    if task_type:
        config["task_type"] = task_type
    if stack.heads:
        owned = [head for head in head_modules(stack.root) if any(name.startswith(f"{head}.") for name in stack.heads)]
        config["modules_to_save"] = sorted(owned)
    return config


def _attachable(saved: Saved, model: nn.Module) -> list[AdapterRecord]:
    """The records to attach: an adapter that only packs the base is left out where the model is a float one."""
    records = []
    for record in saved.manifest.adapters:
        entry = _installed(record)
        capabilities = registry.load(entry, Adapter).capabilities
        if not (capabilities.quantises and packed_as(model) is None):
            records.append(record)
    return records


def _installed(record: AdapterRecord) -> registry.Entry:
    try:
        return registry.find(ADAPTERS, _pick(record))
    except PluginError:
        raise PluginError(
            f"this adapter needs the plugin {record.distribution} {record.version} for {brief(record.adapter)}; "
            f"try `pip install '{record.distribution}>={record.version}'`"
        ) from None


def _pick(record: AdapterRecord) -> str:
    return f"{record.distribution}:{record.adapter}"


def _load_from_peft(model: nn.Module, folder: Path) -> Stack:
    from .bridge.folders import read_peft_folder  # PEFT is slow to import, and our own folders do not need it

    theirs = read_peft_folder(folder, model)
    warnings.warn(
        f"{folder} was saved by PEFT and does not name the base it was trained on: only keys and shapes were compared",
        stacklevel=3,
    )
    for adapter in theirs.adapters:
        named = build([adapter])
        refuse_excess(folder, theirs.tensors.values(), model, named)
        stack = attach(model, named, fresh=False)
        expected = _tensor_files(stack)
        faults = tensor_faults(expected.get(".", ({}, None))[0], theirs.tensors) or finite_faults(theirs.tensors)
        if not faults:
            _take(stack, expected, {".": theirs.tensors})
            return stack
        stack.detach()
    raise misfit(folder, faults)


def _fill(stack: Stack, saved: Saved) -> None:
    expected = _tensor_files(stack)
    faults = [f"{name} is missing" for name in sorted(expected.keys() - saved.tensors.keys())]
    faults += [f"{name} belongs to no adapter" for name in sorted(saved.tensors.keys() - expected.keys())]
    for name, (own, attachment) in expected.items():
        if name in saved.tensors:
            faults += tensor_faults(own, saved.tensors[name])
            faults += config_faults(_config(stack, attachment, saved.manifest.base.source), saved.configs[name])
    if not faults:  # only now may values be looked at: what fits is no larger than the adapter
        faults = [fault for name in expected for fault in finite_faults(saved.tensors[name])]
    if faults:
        raise misfit(saved.folder, faults)
    _take(stack, expected, saved.tensors)


@torch.no_grad()
def _take(
    stack: Stack,
    expected: Mapping[str, tuple[dict[str, Tensor], Attachment | None]],
    tensors: Mapping[str, dict[str, Tensor]],
) -> None:
    """Give a stack values that were found to fit."""
    for name, (_, attachment) in expected.items():
        values = dict(tensors[name])
        prefix = attachment.head_prefix if attachment else Attachment.head_prefix
        for head, parameter in stack.heads.items():
            if (value := values.pop(f"{prefix}{head}", None)) is not None:
                parameter.copy_(value)
        if attachment is not None:
            attachment.load_tensors(values)
