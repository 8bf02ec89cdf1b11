"""9. Tied embeddings are pulled apart, and then overwritten.

Met: an adapter on one of two embeddings that share a weight; the model is fine while it lives, and what is merged and
saved is tied again when it is read, and says one token for ever.

Here: a target that shares its weight is refused, with both ways out; adapters that touch embeddings keep them shared;
merged, saved and read by transformers, the model is the same.

Also: tests/adapters/test_targets.py, tests/adapters/test_trainable_tokens.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onegpu.adapters import TargetError, attach

Fresh = Callable[..., PreTrainedModel]
# Trained on a tied model, each leaves the two tied.
STACKS: dict[str, list[Any]] = {
    "lora": ["lora"],
    "trainable-tokens": [{"trainable-tokens": {"tokens": [5, 6]}}],
    "bias of norms, PEFT's": ["ln-tuning"],
}


def _shared(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def test_a_target_that_shares_its_weight_is_refused_with_both_ways_out(fresh: Fresh) -> None:
    with pytest.raises(
        TargetError, match=r"shares its weight with the input embeddings.* Untie them .*, or leave it out"
    ):
        attach(fresh("tied"), [{"lora": {"targets": ["q_proj", "lm_head"]}}])
    untied = attach(fresh("plain"), [{"lora": {"targets": ["q_proj", "lm_head"]}}])
    assert any("lm_head" in name for name in untied.trainable())


@pytest.mark.parametrize("name", STACKS)
def test_merged_saved_and_read_elsewhere_it_is_the_same_model(
    name: str, fresh: Fresh, logits: Callable[..., Tensor], noise: Callable[[Any], None], tmp_path: Path
) -> None:
    model: Any = fresh("tied")
    before = logits(model)
    stack = attach(model, STACKS[name])
    noise(stack.trainable())
    expected = logits(model)
    assert not torch.allclose(expected, before, atol=1e-2)
    stack.merge()
    assert _shared(model)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(again), expected, atol=1e-4)


def test_full_training_leaves_them_tied(fresh: Fresh, ids: Tensor) -> None:
    model: Any = fresh("tied")
    stack = attach(model, ["full"])
    start = model.get_input_embeddings().weight.detach().clone()
    model(input_ids=ids).logits.log_softmax(-1)[..., 0].sum().backward()
    torch.optim.SGD(stack.trainable().values(), lr=0.01).step()
    assert _shared(model)
    assert not torch.equal(model.get_input_embeddings().weight, start)
