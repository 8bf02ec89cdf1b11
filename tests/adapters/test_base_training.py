"""What `full` and `lisa` have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onegpu.adapters import Stack, StackError, attach, load, save
from onegpu.adapters.base import load_options
from onegpu.adapters.base_training import body
from onegpu.adapters.device import Precision
from onegpu.adapters.specs import build

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]

KINDS = ["full", "lisa"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "tied", "gpt2", "bert"])
def test_all_of_the_body_is_trained_in_float32_and_the_head_is_the_stacks(fresh: Fresh, name: str, kind: str) -> None:
    model = fresh(name, precision="bf16")
    stack = attach(model, [kind])
    (attachment,) = stack.attachments
    assert attachment.trainable().keys() == body(model).keys()
    assert attachment.trainable().keys() | stack.heads.keys() == dict(model.named_parameters()).keys()
    assert not attachment.trainable().keys() & stack.heads.keys()
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "autocast"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_weights_are_read_in_float32_and_computed_with_in_the_precision(
    tiny: dict[str, Path], precision: Precision, autocast: torch.dtype | None, kind: str
) -> None:
    options = load_options(str(tiny["plain"]), build([kind]), kind="causal-lm", precision=precision)
    assert options.dtype is torch.float32
    assert options.autocast is autocast


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_nothing_by_itself_and_the_base_is_there_until_the_first_step(
    fresh: Fresh, run: Run, train: Callable[[Stack], None], kind: str
) -> None:
    model = fresh("plain")
    before = run(model)
    stack = attach(model, [kind])
    assert torch.equal(run(model), before)
    with stack.base_only():
        assert torch.equal(run(model), before)
    stack.attachments[0].before_step(0)
    train(stack)
    with pytest.raises(StackError, match="no copy of it as it was"), stack.base_only():
        pass
    trained = run(model)
    assert not torch.equal(trained, before)
    stack.detach()
    assert torch.equal(run(model), trained)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_saved_and_loaded(
    fresh: Fresh, run: Run, train: Callable[[Stack], None], tmp_path: Path, kind: str
) -> None:
    stack = attach(fresh("tied"), [kind])
    train(stack)
    save(stack, tmp_path / "a")
    again = load(fresh("tied"), tmp_path / "a")
    assert torch.equal(run(again.model), run(stack.model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_and_a_second_trainer_are_refused(fresh: Fresh, kind: str) -> None:
    with pytest.raises(StackError, match=f"{kind} cannot work on what nf4 has packed"):
        attach(fresh("plain"), ["nf4", kind])
    with pytest.raises(StackError, match="packed as nf4: a packed weight cannot be stepped"):
        attach(fresh("plain", "nf4"), [kind])
    with pytest.raises(StackError, match=f"{kind} trains the base itself, so lora beside it"):
        attach(fresh("plain"), [kind, "lora"])


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_nothing_to_merge(llama: PreTrainedModel, kind: str) -> None:
    with pytest.raises(StackError, match="cannot be merged into the base: it trains the base's own weights"):
        attach(llama, [kind]).attachments[0].merge()


@pytest.mark.parametrize("kind", ["full", {"lisa": {"active": 2}}], ids=str)
def test_only_what_did_not_run_in_a_step_may_rest_in_it(fresh: Fresh, run: Run, kind: Any) -> None:
    model = fresh("plain")
    both = model.get_submodule("model.layers")
    assert isinstance(both, nn.ModuleList)
    first = both[:1]
    stack = attach(model, [kind])
    (attachment,) = stack.attachments
    assert attachment.may_rest() == frozenset()
    for step, chosen in enumerate((both, first, both)):
        attachment.before_step(step)
        model.get_submodule("model").layers = chosen
        run(model)
        idle = {name for name in stack.trainable() if name.startswith("model.layers.1.")} if chosen is first else set()
        assert attachment.may_rest() == idle
    stack.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["full", {"lisa": {"active": 2}}], ids=str)
def test_key_biases_may_rest_as_softmax_ignores_them(fresh: Fresh, kind: Any) -> None:
    model = fresh("bert")
    (attachment,) = attach(model, [kind]).attachments
    attachment.before_step(0)
    model(input_ids=torch.tensor([[5, 9, 7, 3]])).logits[0, 0].backward()
    resting = attachment.may_rest()
    assert {name.split("encoder.layer.")[-1] for name in resting} == {f"{n}.attention.self.key.bias" for n in (0, 1)}
    norms = {name: p.grad.norm().item() for name, p in attachment.parameters.items() if p.grad is not None}
    assert norms.keys() == attachment.parameters.keys()
    assert max(norms[name] for name in resting) < 1e-6 < min(n for name, n in norms.items() if name not in resting)
