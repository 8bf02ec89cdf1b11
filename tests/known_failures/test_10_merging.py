"""10. Merging silently changes the model.

Met: an update smaller than a step of the 4-bit grid is rounded away, or is added in half precision, or twice, or to
another base than it was trained on. The merged model is worse than the adapter.

Here: a packed base refuses to be merged into; elsewhere it is added in float32 and rounded once; a second merge is an
error, and detaching restores every bit. Keeping the adapter is the default.

Not yet: writing a merged model, with its measured difference, comes with export.

Also: tests/adapters/test_lora.py, tests/adapters/test_quantised.py, tests/adapters/conformance/test_table.py (merging)
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import Stack, StackError, attach

Fresh = Callable[..., PreTrainedModel]
Q = "model.layers.0.self_attn.q_proj.weight"


def _attached(model: PreTrainedModel, noise: Callable[[Any], None], *packing: str) -> Stack:
    stack = attach(model, [*packing, "lora"])
    noise(stack.trainable())
    return stack


@pytest.mark.parametrize("packing", ["nf4", "fp4", "int8"])
def test_a_packed_base_refuses_and_stays_what_it_was(
    packing: str, fresh: Fresh, logits: Callable[..., Tensor], noise: Callable[[Any], None]
) -> None:
    model = fresh("plain", packing)
    bare = logits(model)
    stack = _attached(model, noise, packing)
    expected = logits(model)
    with pytest.raises(StackError, match=r"packed|4-bit|int8"):
        stack.merge()
    assert torch.equal(logits(model), expected)
    stack.detach()
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_merged_it_says_the_same_and_only_once(
    variant: str, fresh: Fresh, logits: Callable[..., Tensor], noise: Callable[[Any], None]
) -> None:
    model = fresh(variant)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stack = _attached(model, noise)
    expected = logits(model)
    other = fresh(variant)
    undone = _attached(other, noise)
    stack.merge()
    assert torch.allclose(logits(model), expected, atol=1e-4)
    with pytest.raises((StackError, KeyError)):
        stack.merge()
    undone.detach()
    assert all(torch.equal(other.get_parameter(name), value) for name, value in before.items())


def test_in_half_precision_it_is_added_in_float32_and_rounded_once(fresh: Fresh, noise: Callable[[Any], None]) -> None:
    model = fresh("plain", precision="bf16")
    base = model.get_parameter(Q).detach().clone()
    stack = _attached(model, noise)
    tensors = stack.attachments[0].tensors()
    a, b = (tensors[f"base_model.model.{Q[:-7]}.lora_{which}.weight"] for which in "AB")
    exact = base.float() + 2.0 * (b @ a)
    stack.merge()
    assert torch.equal(model.get_parameter(Q), exact.bfloat16())
    assert not torch.equal(model.get_parameter(Q), base + (2.0 * (b @ a)).bfloat16())
