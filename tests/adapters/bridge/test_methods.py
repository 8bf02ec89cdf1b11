"""Every method of PEFT, by name: registered, strict, and the same as stock PEFT in outputs, gradients and files."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.utils import PeftType
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import ADAPTERS, Stack, StackError, attach, build, entries, get, load, save
from onegpu.adapters.bridge.injected import Bridged
from onegpu.adapters.bridge.methods import ROWS
from onegpu.adapters.bridge.prompts import Prompt
from onegpu.adapters.conformance.table import PROOFS
from onegpu.adapters.conformance.tiny_models import FAMILIES, Family, batch, load as load_tiny, logits, losses, place
from onegpu.adapters.structure import family as family_of

NAMES = {e.value.partition(":")[2]: e.name for e in entries(ADAPTERS) if "bridge.methods" in e.value}
TASK_IDS = {PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING}  # stock PEFT must be told the task of each row

# What cannot be read by stock PEFT, or not from it, and why.
NOT_BOTH_WAYS = {
    (PeftType.TRAINABLE_TOKENS, "bert"): "PEFT saves no head beside it",
    (PeftType.SHADOW, "bert"): "PEFT gives the shadow a head of its own",
    (PeftType.MULTITASK_PROMPT_TUNING, "t5"): "stock PEFT itself fails on it",
}


def config_of(kind: PeftType) -> dict[str, Any]:
    name = NAMES[kind.value]
    return dict(PROOFS[name].config) if name in PROOFS else {}


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, and ours that its folders name no base
        yield


def moved(kind: PeftType, family: Family) -> Stack | None:
    """The method attached to a tiny model, with its tensors and the head moved off their start; None if refused."""
    try:
        stack = attach(load_tiny(family), [{NAMES[kind.value]: config_of(kind)}], seed=1)
    except StackError:
        return None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stack.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stack


def stock_outputs(model: PeftModel, kind: PeftType, family: Family) -> Tensor:
    inputs = batch(family)
    if kind in TASK_IDS:
        inputs |= {"task_ids": torch.zeros(len(inputs["input_ids"]), dtype=torch.long)}
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    # Prompts have logits of their own there, in front.
    return found[:, -inputs["input_ids"].shape[1] :] if family == "llama" else found


def test_every_type_of_peft_is_registered_once_under_its_name() -> None:
    assert NAMES.keys() == PeftType.__members__.keys() == {kind.value for kind in ROWS}
    ours = {"LORA": "peft-lora", "TRAINABLE_TOKENS": "peft-trainable-tokens"}
    assert all(ours.get(kind, kind.lower().replace("_", "-")) == name for kind, name in NAMES.items())


@pytest.mark.parametrize("kind", PeftType)
def test_its_settings_are_peft_s_own_and_strict(kind: PeftType) -> None:
    adapter: Any = get(NAMES[kind.value])
    assert issubclass(adapter, Bridged)
    (named,) = build([{NAMES[kind.value]: config_of(kind)}])
    theirs = set(adapter.method.config_class.__dataclass_fields__)
    assert adapter.model_fields.keys() - {"name", "targets"} <= theirs
    assert not adapter.model_fields.keys() & {"modules_to_save", "inference_mode", "task_type", "tokenizer_kwargs"}
    assert all(
        field.description for field in adapter.model_fields.values() if field is not adapter.model_fields["name"]
    )
    with pytest.raises(ValidationError, match="no_such"):
        adapter.model_validate({**config_of(kind), "no_such": 1})
    assert adapter.model_validate_json(named.adapter.model_dump_json()) == named.adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PeftType)
def test_it_is_stock_peft_in_outputs_gradients_and_files(kind: PeftType, family: Family, tmp_path: Path) -> None:
    if (stack := moved(kind, family)) is None:
        assert not peft_trains_it(kind, family), "refused, and stock PEFT can"
        return
    outputs = logits(stack.model, batch(family))
    save(stack, tmp_path / "ours", source=place(family))
    if (kind, family) in NOT_BOTH_WAYS:
        return

    prompt = isinstance(stack.named[0].adapter, Prompt)  # PEFT computes them no more once they are saved
    stock = PeftModel.from_pretrained(load_tiny(family), str(tmp_path / "ours"), is_trainable=not prompt)
    theirs = stock_outputs(stock, kind, family)
    # Of prompts, stock PEFT has no mask where ours says that everything is seen: another kernel on some processors.
    assert torch.allclose(theirs, outputs, rtol=1e-5, atol=1e-6) if prompt else torch.equal(theirs, outputs)
    if not prompt and stack.named[0].adapter.capabilities.row_by_row:  # the others draw at random while they train
        assert_same_gradients(stack, stock, kind, family)

    stock.save_pretrained(str(tmp_path / "theirs"))
    again = load(load_tiny(family), tmp_path / "theirs")
    assert torch.equal(logits(again.model, batch(family)), outputs)
    assert again.trainable()


def assert_same_gradients(stack: Stack, stock: PeftModel, kind: PeftType, family: Family) -> None:
    """Tensor by tensor."""
    losses(stack.model.train(), family).backward()
    losses(stock.train(), family).backward()
    theirs = {
        name.removeprefix("base_model.model.").removeprefix("base_model."): p for name, p in stock.named_parameters()
    }
    own = NAMES[kind.value]
    compared = 0
    for name, parameter in stack.trainable().items():
        if name in stack.heads:
            continue
        other = theirs.get(".".join("default" if part == own else part for part in name.split(".")))
        other = theirs.get(name.removesuffix(f".{own}")) if other is None else other  # no name of an adapter in it
        assert other is not None, name
        if parameter.grad is not None and other.grad is not None:
            difference = (parameter.grad - other.grad).norm()
            assert difference <= 1e-5 * max(float(other.grad.norm()), 1e-6), name
            compared += 1
    assert compared


def peft_trains_it(kind: PeftType, family: Family) -> bool:
    """Whether stock PEFT runs the method on this model with the same targets: a refusal of ours needs a ground."""
    if kind in (PeftType.XLORA, PeftType.CPT, PeftType.PREFIX_TUNING, PeftType.CARTRIDGE, PeftType.SHADOW):
        return False  # refused by declaration: see the reasons in the table
    (named,) = build([{NAMES[kind.value]: config_of(kind)}])
    model: PreTrainedModel = load_tiny(family)
    adapter: Any = named.adapter
    try:
        facts = adapter.facts(model, adapter.chosen(model)) if hasattr(adapter, "chosen") else {}
        stock = PeftModel(model, adapter.peft_config(**facts))
        stock_outputs(stock, kind, family)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("kind", PeftType)
def test_what_it_declares_of_a_kind_of_model_has_a_reason(kind: PeftType) -> None:
    capabilities = get(NAMES[kind.value]).capabilities
    for capability in (
        "encoders",
        "decoders",
        "encoder_decoder",
        "several",
        "planned",
        "half_bases",
        "quantised_bases",
    ):
        assert getattr(capabilities, capability) or capability in capabilities.reasons, capability


def test_a_refused_family_is_refused_before_weights() -> None:
    model = load_tiny("t5")
    assert family_of(model)[0] == "encoder_decoder"
    with pytest.raises(StackError, match="cartridge cannot work on a model with an encoder and a decoder: "):
        attach(model, ["cartridge"])


def test_peft_knows_no_type_that_this_test_does_not_see() -> None:
    assert len(PeftType) >= 45
    assert all(issubclass(get(name).method.config_class, PeftConfig) for name in NAMES.values())  # type: ignore[attr-defined]
