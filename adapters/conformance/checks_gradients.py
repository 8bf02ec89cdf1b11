"""Checks of gradients and outputs that must not depend on how a batch is laid out, or on how a base is stored."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import artefact
from ..frozen_linear import PackedWeight
from ..structure import modules
from . import tiny_models
from .case import (
    Case,
    Declared,
    Loop,
    adapters_only,
    assert_close,
    assert_equal,
    carry,
    gradients,
    trained,
)
from .fresh_process import scratch
from .tiny_models import ROWS, Precision

__all__ = ["accumulation", "checkpointing", "half_bases", "packing", "quantised_bases"]

ROUNDING = 1e-5  # of the gradient's norm, float32 summed in another order
HALF = 0.1  # of the gradient's norm, a base in half precision against one in float32
APART = 1e-4  # of the largest logit
HALVES: tuple[Precision, ...] = ("bf16", "fp16")
PACKED_BY = ("nf4", "int8")
SPLITS = ((3, 3), (1,) * len(ROWS))


def accumulation(case: Case) -> None:
    """The gradient of a window of ragged rows does not depend on how it is cut into passes."""
    stack = trained(case, case.start())
    whole = gradients(stack, case.family)
    for sizes in SPLITS:
        cut = gradients(stack, case.family, sizes)
        assert_close(cut, whole, ROUNDING, f"gradients of {len(ROWS)} rows cut into {sizes} and of one pass")


def packing(case: Case) -> None:
    """Rows packed into one sequence, with positions that start anew, get the logits they get on their own."""
    if case.family != "llama":
        raise Declared("it does not work on a model that only decodes")
    stack = trained(case, case.start())
    padded = case.logits(stack.model)
    packed = tiny_models.logits(
        stack.model,
        {
            "input_ids": torch.tensor([[token for row in ROWS for token in row]]),
            "position_ids": torch.tensor([[place for row in ROWS for place in range(len(row))]]),
            "use_cache": cast(Tensor, False),
        },
    )
    begin = 0
    for number, row in enumerate(ROWS):
        ours, theirs = packed[0, begin : begin + len(row)], padded[number, : len(row)]
        begin += len(row)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= APART, (
            f"row {number} packed behind others gets other logits: they differ by {error:.2g} of the largest one"
        )


def checkpointing(case: Case) -> None:
    """Gradient checkpointing, reentrant or not, switched on before or after attaching, gives the same gradients."""
    stack = trained(case, case.start())
    expected = gradients(stack, case.family)
    for reentrant in (True, False):
        kind = "reentrant" if reentrant else "not reentrant"
        model = cast(PreTrainedModel, stack.model)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(stack, case.family)
        model.activation_checkpointing_disable()
        assert_close(found, expected, ROUNDING, f"gradients with checkpointing ({kind}, switched on after attaching)")
        earlier = case.load()
        earlier.activation_checkpointing_enable({"use_reentrant": reentrant})
        again = case.attach(earlier)
        carry(stack, again)
        found = gradients(again, case.family)
        assert_close(found, expected, ROUNDING, f"gradients with checkpointing ({kind}, switched on before attaching)")


def quantised_bases(case: Case) -> None:
    """Over a packed base it trains, leaves the packed bytes alone, and is saved and loaded."""
    if case.capabilities.quantises:
        raise Declared("a base is packed once")
    for packing_adapter in PACKED_BY:
        _assert_works_packed(case, packing_adapter)


def _assert_works_packed(case: Case, packing_adapter: str) -> None:
    model = case.load(packed=packing_adapter)
    before = _packed_bytes(model)
    stack = case.attach(model, packed=packing_adapter)
    start = {name: p.detach().clone() for name, p in stack.trainable().items()}
    loop = Loop(stack, case.family)
    for _ in range(3):
        loop.backward()
        bad = next(
            (n for n, p in stack.trainable().items() if p.grad is not None and not p.grad.isfinite().all()), None
        )
        assert bad is None, f"on {packing_adapter}, the gradient of {bad} is not finite"
        resting = frozenset[str]().union(*(a.may_rest() for a in stack.attachments))
        loop.update()
    model.eval()
    still = [n for n, p in stack.trainable().items() if torch.equal(p, start[n]) and n not in resting]
    assert not still, f"on {packing_adapter}, {still[0]} does not move in three steps"
    for name, values in _packed_bytes(model).items():
        assert torch.equal(values, before[name]), f"training changes the packed weight {name} ({packing_adapter})"
    expected = case.logits(model)
    with scratch() as folder:
        artefact.save(stack, folder / "adapter")
        again = case.load(packed=packing_adapter)
        artefact.load(again, folder / "adapter")
        assert_equal(case.logits(again), expected, f"on {packing_adapter}, what was saved gives other outputs")


def _packed_bytes(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": buffer.clone()
        for path, module in modules(model)
        if isinstance(module, PackedWeight)
        for name, buffer in module.named_buffers()
    }


def half_bases(case: Case) -> None:
    """On a bf16 or fp16 base its tensors stay float32, outputs keep their dtype, gradients are about the same."""
    for precision in HALVES:
        _assert_works_in_half(case, precision)


def _assert_works_in_half(case: Case, precision: Precision) -> None:
    base = case.load(precision=precision)
    reference = trained(case, case.attach(case.load(precision=precision).float()))
    bare_dtype = case.logits(base).dtype
    stack = case.attach(base)
    carry(reference, stack)
    wrong = next((name for name, p in stack.trainable().items() if p.dtype != torch.float32), None)
    assert wrong is None, f"on a {precision} base {wrong} is not float32"
    logits = case.logits(stack.model)
    dtype = torch.float32 if stack.heads else bare_dtype  # heads compute in float32
    assert logits.dtype == dtype, f"on a {precision} base the outputs are {logits.dtype} instead of {dtype}"
    assert torch.isfinite(logits).all(), f"on a {precision} base the outputs are not finite"
    found, expected = gradients(stack, case.family), gradients(reference, case.family)
    bad = next((name for name, gradient in found.items() if not torch.isfinite(gradient).all()), None)
    assert bad is None, f"on a {precision} base the gradient of {bad} is not finite"
    own = adapters_only(stack).keys()
    assert_close(
        {n: g for n, g in found.items() if n in own},
        {n: g for n, g in expected.items() if n in own},
        HALF,
        f"gradients on a {precision} base and on the same one in float32",
    )
