from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import Stack, StackError, attach
from onegpu.adapters.base import load_options
from onegpu.adapters.device import Precision
from onegpu.adapters.specs import build

Fresh = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("name", ["plain", "tied", "bert"])
def test_every_tensor_of_the_model_is_trained_once_in_float32(fresh: Fresh, name: str) -> None:
    model = fresh(name, precision="bf16")
    stack = attach(model, ["full"])
    assert stack.trainable().keys() == dict(model.named_parameters()).keys()
    assert len({id(parameter) for parameter in stack.trainable().values()}) == len(stack.trainable())
    assert {parameter.dtype for parameter in stack.trainable().values()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_stays_the_stacks_own_so_that_it_is_saved_once(fresh: Fresh) -> None:
    stack = attach(fresh("bert"), ["full"])
    (attachment,) = stack.attachments
    assert stack.heads.keys() == {"classifier.weight", "classifier.bias"}
    assert not stack.heads.keys() & attachment.trainable().keys()


@pytest.mark.parametrize("spec", ["full", "lora"])
def test_a_fresh_one_leaves_the_outputs_as_they_are(fresh: Fresh, run: Callable[..., Tensor], spec: str) -> None:
    model = fresh("plain")
    before = run(model)
    attach(model, [spec])
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_weights_are_read_in_float32_and_computed_with_in_the_precision(
    tiny: dict[str, str], precision: Precision, autocast: torch.dtype | None
) -> None:
    options = load_options(str(tiny["plain"]), build(["full"]), kind="causal-lm", precision=precision)
    assert options.dtype is torch.float32
    assert options.autocast is autocast


def test_a_base_for_full_training_is_loaded_in_float32(fresh: Fresh) -> None:
    assert fresh("plain", "full", precision="bf16").dtype is torch.float32
    assert fresh("plain", "lora", precision="bf16").dtype is torch.bfloat16


def test_the_base_alone_is_there_until_the_first_step_only(llama: PreTrainedModel) -> None:
    stack = attach(llama, ["full"])
    with stack.base_only():
        pass
    stack.attachments[0].before_step(0)
    with pytest.raises(StackError, match="no copy of it as it was"), stack.base_only():
        pass


def test_training_moves_the_base_and_detaching_only_freezes_it(
    fresh: Fresh, run: Callable[..., Tensor], train: Callable[[Stack], None]
) -> None:
    model = fresh("plain")
    before = run(model)
    stack = attach(model, ["full"])
    train(stack)
    trained = run(model)
    stack.detach()
    assert not torch.equal(trained, before)
    assert torch.equal(run(model), trained)
    assert not any(parameter.requires_grad for parameter in model.parameters())
