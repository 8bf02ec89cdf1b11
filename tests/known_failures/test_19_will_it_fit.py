"""19. Nobody can say whether it will fit, and memory ends at the start or at the first long batch.

Met: the longest row decides and comes late; layers are moved to the CPU in silence; calculators use wrong formulas. A
run dies after hundreds of steps, or takes ten times as long.

Here: rows beyond the longest length are told before weights are read; a base is on one device or refused; every adapter
says in bytes what it costs, without weights; running out of memory says what to change, and exits with code 3.

Not yet: `onegpu plan`, with activations and logits, and a measured step over the longest row at the start.

Also: tests/adapters/conformance/test_table.py (costs), tests/recipes/test_training.py
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import DeviceError, RecipeError, attach, build
from onegpu.recipes import Job, Loaded, Outcome, preflight

Fresh = Callable[..., PreTrainedModel]
COSTED: dict[str, list[Any]] = {
    "lora": [{"lora": {"rank": 4}}],
    "dora": [{"dora": {"rank": 4}}],
    "prefix": [{"prefix": {"length": 3}}],
    "full": ["full"],
}


def test_a_row_that_is_too_long_is_told_before_weights_are_read(
    recipe: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "load_base", lambda job: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="max_length is 100"):
        preflight(recipe(task={"max_length": 100}))
    with pytest.raises(RecipeError, match="max_length"):
        preflight(recipe(task={"max_length": 100_000}))  # more than the model has positions


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
@pytest.mark.parametrize("name", COSTED)
def test_an_adapter_costs_what_it_says_without_weights(name: str, variant: str, fresh: Fresh, bases: Any) -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(bases[variant]))
    (named,) = build(COSTED[name])
    cost = named.adapter.cost(skeleton)
    tensors = attach(fresh(variant), COSTED[name]).trainable().values()
    assert cost.gradients == sum(p.nbytes for p in tensors)
    assert cost.weights == (0 if name == "full" else cost.gradients)


def test_a_base_is_on_one_device(fresh: Fresh) -> None:
    for packing in ([], ["nf4"], ["int8"]):
        model = fresh("plain", *packing)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
        assert set(map(str, getattr(model, "hf_device_map", {"": "cpu"}).values())) == {"cpu"}


def test_running_out_of_memory_says_what_to_change(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], damaged: Callable[..., None]
) -> None:
    def exhaust(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    damaged(lambda model: model.register_forward_hook(exhaust))
    with pytest.raises(DeviceError, match=r"out of memory with 4 examples of up to \d+ tokens.*train.micro_batch to 2"):
        run(recipe(task={"packing": False}, train={"micro_batch": 4}))
