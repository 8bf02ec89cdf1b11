"""Where an adapter can work: what it declares, against the base, the device and the settings it would work with.

Everything is decided from declarations and from the model without weights, so it is known before any weight is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import StackError
from .frozen_linear import packed_as
from .specs import Named
from .structure import family

__all__ = ["Circumstances", "circumstances_of", "refuse_unfit", "unfit"]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What an adapter would have to work with; None for what is not known yet, or decided elsewhere."""

    model: nn.Module | None = None  # its kind counts, not its weights
    packed: str | None = None  # what its linears are packed as
    dtype: torch.dtype | None = None  # of what is not packed
    device: str | None = None  # torch's name of its kind
    attention: str | None = None  # transformers' name of the implementation
    checkpointing: bool = False  # activations are computed anew in the backward pass


def circumstances_of(model: nn.Module) -> Circumstances:
    """Those of a model that is in memory."""
    transformer = model if isinstance(model, PreTrainedModel) else None
    floats = next((p for p in model.parameters() if p.is_floating_point()), None)
    return Circumstances(
        model=model,
        packed=packed_as(model),
        dtype=floats.dtype if floats is not None else None,
        device=floats.device.type if floats is not None and not floats.is_meta else None,
        attention=getattr(transformer.config, "_attn_implementation", None) if transformer else None,
        checkpointing=bool(transformer and transformer.is_activation_checkpointing),
    )


def refuse_unfit(stack: Sequence[Named], circumstances: Circumstances) -> None:
    """Refuse adapters that declare that they cannot work like this; all of them, with every reason.

    Raises:
        StackError: with the reasons.
    """
    if told := [text for named in stack for text in unfit(named, circumstances)]:
        raise StackError("; ".join(told))


def unfit(named: Named, circumstances: Circumstances) -> Iterator[str]:
    """Each thing that an adapter declares it cannot do, and would have to."""
    declared, c = named.adapter.capabilities, circumstances

    def refusal(capability: str, what: str) -> str:
        return f"{named.name} cannot work {what}{declared.because(capability)}"

    if c.model is not None:
        capability, kind = family(c.model)
        if not getattr(declared, capability):
            yield refusal(capability, f"on {kind}")
    if c.packed is not None and not declared.quantised_bases:
        yield refusal("quantised_bases", f"on a base packed as {c.packed}")
    if c.dtype in (torch.bfloat16, torch.float16) and not declared.half_bases:
        short = str(c.dtype).removeprefix("torch.")
        yield refusal("half_bases", f"on a base in {short}") + "; load it in float32"
    if c.device is not None and c.device not in declared.devices:
        yield refusal("devices", f"on a device of kind {c.device} (works on {', '.join(declared.devices)})")
    if c.attention is not None and declared.attentions is not None and c.attention not in declared.attentions:
        yield refusal("attentions", f"with {c.attention} attention (works with {', '.join(declared.attentions)})")
    if c.checkpointing and not declared.checkpointing:
        yield refusal("checkpointing", "under gradient checkpointing")
