"""14. Dtypes drift, and hardware promises what it cannot do.

Met: fp16 weights under a loss scaler, bf16 weights that no small step can move, a base cast after it was wrapped, cards
that emulate bf16 and say they support it. Errors from deep inside, a loss of 0 or nan, an adapter that stays put.

Here: what trains is float32 over any base; the dtype to compute in follows the card's capability, and what it cannot do
is refused; a loss or gradient that is not finite ends the run in that step and names the module.

Also: tests/adapters/test_device.py, tests/recipes/test_proofs.py, tests/adapters/conformance/test_table.py (half bases)
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import DeviceError, ProofFailed, attach
from onegpu.adapters.device import Hardware, compute_dtype
from onegpu.recipes import Loaded, Outcome

T4, A100 = Hardware("cuda", (7, 5), "T4"), Hardware("cuda", (8, 0), "A100")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", [["lora"], [{"prefix": {"length": 3}}], ["dora"]], ids=str)
def test_over_a_half_base_a_small_step_moves_everything(
    stack: list[Any],
    dtype: torch.dtype,
    fresh: Callable[..., PreTrainedModel],
    ids: Tensor,
    noise: Callable[[Any], None],
) -> None:
    model: Any = fresh()
    model.to(dtype)
    attached = attach(model, stack)
    trainable = attached.trainable()
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    noise(trainable)  # off the zeros, beside which every step is large
    start = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-5, weight_decay=0.0)
    model(input_ids=ids).logits.float().log_softmax(-1)[..., 0].sum().backward()
    optimizer.step()
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {torch.float32}
    moved = {name: (p - start[name]).ne(0).float().mean().item() for name, p in trainable.items()}
    assert min(moved.values()) > 0.5, moved
    rounded = {n: (p.to(dtype) - start[n].to(dtype)).ne(0).float().mean().item() for n, p in trainable.items()}
    assert min(rounded.values()) < 0.5  # what would have been lost in the dtype of the base


def test_the_dtype_follows_what_the_card_computes_and_not_what_it_accepts() -> None:
    assert compute_dtype("auto", T4) == torch.float16
    assert compute_dtype("auto", A100) == torch.bfloat16
    with pytest.raises(DeviceError, match="only emulates bf16: use precision fp16, fp32 or auto"):
        compute_dtype("bf16", T4)
    with pytest.raises(DeviceError, match="fp16 needs a CUDA device"):
        compute_dtype("fp16", Hardware("cpu"))


def test_an_infinite_weight_ends_the_first_step_and_is_named(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], damaged: Callable[..., None]
) -> None:
    def plant(model: PreTrainedModel) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("inf")

    damaged(plant)
    with pytest.raises(ProofFailed, match=r"step 1: the loss is .*, first in model\.layers\.1\.mlp\.up_proj"):
        run(recipe())


def test_the_dtype_of_the_base_is_in_the_manifest(recipe: Callable[..., Loaded], run: Callable[..., Outcome]) -> None:
    manifest = json.loads((run(recipe(train={"precision": "bf16"})).adapter / "manifest.json").read_text("utf-8"))
    assert manifest["base"]["dtype"] == "bfloat16"
    assert manifest["run"]["train"]["precision"] == "bf16"
