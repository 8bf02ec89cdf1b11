"""Loads a base model, as the loading stage of a stack wants it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .compatibility import Circumstances, refuse_unfit
from .contract import SAFELY, LoadOptions
from .device import Attention, Hardware, Precision, attention_of, compute_dtype, detect
from .errors import OnegpuError, RecipeError, noted, together
from .frozen_linear import FrozenLinear
from .isolation import answerable
from .pretrained import read_config, readable, refuse_detours
from .quiet import quietly
from .sources import Source, locate
from .specs import Named, Spec, build
from .structure import head_modules, output_embeddings

__all__ = [
    "Footprint",
    "Kind",
    "any_skeleton",
    "choose_attention",
    "footprint",
    "load_base",
    "load_options",
    "refuse_foreign_packing",
    "settled",
    "skeleton_of",
]

Kind = Literal[
    "causal-lm",
    "masked-lm",
    "sequence-to-sequence",
    "sequence-classification",
    "token-classification",
    "question-answering",
]
AUTO: dict[Kind, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-to-sequence": transformers.AutoModelForSeq2SeqLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}


def load_base(
    source: str | Source,
    adapters: Sequence[Spec | Named] = (),
    *,
    kind: Kind = "causal-lm",
    labels: Sequence[str] | None = None,
    precision: Precision = "auto",
    attention: Attention = "auto",
    revision: str | None = None,
    seed: int = 0,
    hardware: Hardware | None = None,
) -> PreTrainedModel:
    """Read a base model in one piece onto one device, frozen in spirit: `attach` decides what trains.

    Args:
        source: a local folder, a hub id (with `revision`), `package:NAME/path`, or a GGUF file.
        adapters: the stack; those of the loading stage (`nf4`) take part.
        kind: which head the model has.
        labels: names of the classes, for a classification head.
        precision: dtype of everything that is not packed.
        attention: which of transformers' implementations.
        seed: of a head that the checkpoint does not have.

    Raises:
        RecipeError: the source is wrong, or the checkpoint lacks tensors of the backbone.
        DeviceError: the device cannot do what was asked for.
    """
    hardware = hardware or detect()
    found = source if isinstance(source, Source) else locate(source, revision=revision)
    place = found.materialise()
    options = load_options(
        place,
        build(adapters),
        kind=kind,
        precision=precision,
        attention=attention,
        hardware=hardware,
        revision=found.revision,
    )
    extra: dict[str, Any] = {"attn_implementation": options.attention}
    if options.quantization_config is not None:
        extra |= {"quantization_config": options.quantization_config, "device_map": {"": options.device}}
    with quietly(), torch.random.fork_rng(), readable(f"the weights of base {found.written!r} cannot be read"):
        torch.manual_seed(seed)
        extra["config"] = _labelled(read_config(place, found.revision), labels)
        model, info = AUTO[kind].from_pretrained(
            place, dtype=options.dtype, revision=found.revision, output_loading_info=True, **SAFELY, **extra
        )
    _refuse_random_backbone(model, info["missing_keys"], found.written)
    for step in options.after_load:
        step(model)
    if options.quantization_config is not None:
        _forget_quantizer(model)
    loaded: PreTrainedModel = model.to(options.device)
    return loaded


def _labelled(config: PreTrainedConfig, labels: Sequence[str] | None) -> PreTrainedConfig:
    """The same with names of the classes, where there are any."""
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
    return config


def _forget_quantizer(model: PreTrainedModel) -> None:
    """The packed layers are ours now; to transformers and whoever trains it this is an ordinary model again."""
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # by these, trl would round all that trains to bfloat16
        vars(model).pop(mark, None)


def load_options(
    place: str,
    stack: Sequence[Named],
    *,
    kind: Kind,
    precision: Precision,
    attention: Attention = "auto",
    hardware: Hardware | None = None,
    revision: str | None = None,
) -> LoadOptions:
    """What the stack makes of the loading options, and whether it can work on this base at all.

    Reads the configuration of the base, not its weights.

    Raises:
        RecipeError, TargetError, StackError, DeviceError: it cannot; with every fault.
    """
    hardware = hardware or detect()
    dtype = compute_dtype(precision, hardware)
    skeleton = skeleton_of(place, kind, revision)
    refuse_foreign_packing(skeleton, place, stack)
    choose_attention(skeleton, attention)
    return settled(skeleton, stack, dtype=dtype, attention=attention, hardware=hardware)


def settled(
    skeleton: PreTrainedModel,
    stack: Sequence[Named],
    *,
    dtype: torch.dtype,
    attention: Attention = "auto",
    hardware: Hardware,
    checkpointing: bool = False,
    at: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
) -> LoadOptions:
    """The loading options after every adapter of the stack had its say and was found to work on this base.

    Args:
        skeleton: the model without weights.
        dtype: of everything that no adapter packs.
        attention: which of transformers' implementations, one that `choose_attention` took.
        checkpointing: whether activations will be computed anew.
        at: the place of the adapter of that number, for messages.

    Raises:
        TargetError, StackError, PluginError: one or more cannot; with every fault of each.
    """
    options = LoadOptions(dtype=dtype, device=hardware.device)
    output = output_embeddings(skeleton)
    # A packed head could not be trained, and packed logits are coarse.
    keep = (*head_modules(skeleton), *([output] if output else []))
    found: list[OnegpuError] = []
    for index, named in enumerate(stack):
        circumstances = Circumstances(model=skeleton, device=hardware.kind, checkpointing=checkpointing)
        with noted(found), at(index):
            refuse_unfit([named], circumstances)
            with answerable(named.name, named.entry, "check"):
                named.adapter.check(skeleton)
        with noted(found), at(index), answerable(named.name, named.entry, "load_options"):
            options = named.adapter.load_options(options, keep)
    options = replace(options, attention=attention_of(attention, options.autocast or options.dtype, hardware))
    in_use = options.attention or skeleton.config._attn_implementation
    for index, named in enumerate(stack):
        with noted(found), at(index):
            refuse_unfit([named], Circumstances(dtype=options.dtype, attention=in_use))
    if found:
        raise together(found)
    return options


def choose_attention(skeleton: PreTrainedModel, asked: Attention) -> None:
    """Let a model without weights have the attention that was asked for.

    Raises:
        RecipeError: it is none of this model's.
    """
    if asked == "auto":
        return
    kind = type(skeleton).__name__
    with quietly(), readable(f"{kind} has no attention {asked}"):
        skeleton.set_attn_implementation(asked)
    if skeleton.config._attn_implementation != asked:  # transformers warns, and leaves it as it was
        raise RecipeError(f"the attention of {kind} cannot be chosen: leave it on auto")


def skeleton_of(place: str, kind: Kind, revision: str | None) -> PreTrainedModel:
    """The model without weights, on torch's meta device.

    Raises:
        RecipeError: it cannot be used as this kind of model.
    """
    unusable = f"base {place!r} cannot be used as a {kind} model"
    try:
        with readable(unusable):
            refuse_detours(place, revision)
            config = read_config(place, revision)
            with torch.device("meta"):
                skeleton: PreTrainedModel = AUTO[kind].from_config(config)
    except RecipeError as error:
        if _needs_code(place, revision):
            raise RecipeError(
                f"{unusable}: it needs Python code of its own (`auto_map` in its config.json), which is never executed"
            ) from error
        raise
    return skeleton


def _needs_code(place: str, revision: str | None) -> bool:
    with suppress(RecipeError), readable("its configuration"):
        config, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
        return "auto_map" in config
    return False


def any_skeleton(place: str, revision: str | None) -> PreTrainedModel | None:
    """The model without weights as whatever it can be used as; None for what cannot be used at all."""
    for kind in AUTO:
        with suppress(RecipeError):
            return skeleton_of(place, kind, revision)
    return None


def refuse_foreign_packing(skeleton: PreTrainedModel, place: str, stack: Sequence[Named]) -> None:
    """A checkpoint that is packed on disk would otherwise run through its packer's own layers.

    Raises:
        RecipeError: it is packed, and the stack does not say so.
    """
    packing = getattr(skeleton.config, "quantization_config", None)
    if packing is None:
        return
    method = packing.get("quant_method") if isinstance(packing, dict) else packing.quant_method
    if str(getattr(method, "value", method)) != "bitsandbytes":
        raise RecipeError(f"base {place!r} is packed by {method!r}, which is not supported: take the unpacked model")
    if not any(n.adapter.capabilities.quantises for n in stack):
        raise RecipeError(f"base {place!r} is packed by bitsandbytes on disk: add its adapter (nf4, fp4 or int8)")


def _refuse_random_backbone(model: nn.Module, missing: Sequence[str], written: str) -> None:
    heads = tuple(f"{head}." for head in head_modules(model))
    random = sorted(key for key in missing if not key.startswith(heads))
    if random:
        more = f" and {len(random) - 1} more" if len(random) > 1 else ""
        raise RecipeError(
            f"base {written!r}: the checkpoint has no weights for {random[0]}{more}; they would be random"
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes that a loaded base occupies."""

    packed: int  # the packed linears, scales included
    packed_as_bf16: int  # what the same linears would take in bf16
    other: int  # everything that is not packed
    parameters: int  # how many there are, packed ones included

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.other


def footprint(model: nn.Module) -> Footprint:
    """Measure a loaded base; shared tensors count once."""
    packed = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    tensors = {t.data_ptr(): t.nbytes for m in packed for t in m.packed.buffers()}
    everything = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    unpacked = {t.data_ptr(): t.numel() for t in model.parameters()}
    elements = sum(m.in_features * m.out_features for m in packed)
    return Footprint(
        packed=sum(tensors.values()),
        packed_as_bf16=2 * elements,
        other=sum(size for pointer, size in everything.items() if pointer not in tensors),
        parameters=elements + sum(count for pointer, count in unpacked.items() if pointer not in tensors),
    )
