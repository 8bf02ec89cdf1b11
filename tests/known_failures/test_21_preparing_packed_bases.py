"""21. Preparing a packed base for training takes more memory than it saves.

Met: norms, embeddings and output embeddings are all widened to float32, which on a large vocabulary is gigabytes.

Here: attaching widens nothing of a packed base; only what trains is float32, and tied embeddings stay one tensor.

Also: tests/adapters/test_quantised.py, tests/adapters/test_base.py (footprint)
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from onegpu.adapters import attach, load_base
from onegpu.adapters.base import footprint


def _held(model: Any) -> dict[str, tuple[int, torch.dtype, torch.Size]]:
    return {n: (t.data_ptr(), t.dtype, t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("packing", ["nf4", "int8"])
@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_attaching_adds_the_adapter_and_widens_nothing(
    variant: str, packing: str, fresh: Callable[..., PreTrainedModel]
) -> None:
    model: Any = fresh(variant, packing, precision="bf16")
    before, size = _held(model), footprint(model).total
    assert torch.bfloat16 in {dtype for _, dtype, _ in before.values()}
    stack = attach(model, [packing, "lora"])
    added = sum(p.nbytes for p in stack.trainable().values())
    assert footprint(model).total == size + added
    stack.detach()
    assert _held(model) == before
    shared = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert shared is (variant == "tied")


def test_of_a_classifier_only_the_head_is_widened(bases: Any) -> None:
    model = load_base(str(bases["plain"]), ["nf4"], kind="sequence-classification", labels=["a", "b"], precision="bf16")
    before = _held(model)
    attach(model, ["nf4", {"lora": {"targets": ["q_proj"]}}])
    after = {name.replace(".base.", "."): held for name, held in _held(model).items() if "lora" not in name}
    changed = {name for name in before if after[name][1] != before[name][1]}
    assert changed == {"score.weight"}
