"""The bridge to PEFT beyond what every method shares: composition, refusals, and the methods that need more."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from onegpu.adapters import RecipeError, StackError, TargetError, attach, build, load, load_base, save
from onegpu.adapters.conformance.tiny_models import Family, batch, load as load_tiny, logits, losses, place
from onegpu.adapters.fingerprints import differences, fingerprint

Noise = Callable[[dict[str, nn.Parameter]], None]


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def model() -> PreTrainedModel:
    return load_tiny("llama")


def generated(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What is generated greedily, without the prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    found: Tensor = model.eval().generate(input_ids=ids, **settings)
    return found[:, ids.shape[1] :]


def out(model: nn.Module, family: Family = "llama") -> Tensor:
    return logits(model, batch(family))


# --- composition


@pytest.mark.parametrize("order", [["lora", "vera"], ["vera", "lora"]])
def test_it_composes_with_our_own_in_any_order(
    order: list[str], model: PreTrainedModel, noise: Noise, tmp_path: Path
) -> None:
    before, print_before = out(model), fingerprint(model)
    stack = attach(model, order)
    assert torch.equal(out(model), before)
    assert all(p.requires_grad for p in stack.trainable().values())
    noise(stack.trainable())
    both = out(model)
    save(stack, tmp_path / "a")
    assert differences(print_before, model) == ([], [])
    stack.detach()
    assert torch.equal(out(model), before)
    again = load(model, tmp_path / "a")
    assert torch.equal(out(model), both)
    first, second = again.attachments
    first.detach()
    assert not torch.equal(out(model), before)
    second.detach()
    assert torch.equal(out(model), before)


def test_what_two_add_to_a_linear_adds_up(model: PreTrainedModel, noise: Noise) -> None:
    stack = attach(model, [{"lora": {"targets": ["q_proj"]}}, {"peft-lora": {"targets": ["q_proj"]}}])
    noise(stack.trainable())
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 256)
    both = linear(x)
    stack.disable("lora")
    theirs = linear(x)
    stack.enable("lora")
    stack.disable("peft-lora")
    ours = linear(x)
    stack.disable()
    neither = linear(x)
    torch.testing.assert_close(both, ours + theirs - neither)


def test_two_methods_of_peft_cannot_share_a_module(model: PreTrainedModel) -> None:
    before = out(model)
    with pytest.raises(StackError, match=r"ia3 and another method of PEFT's both want model.layers.0.self_attn.q_proj"):
        attach(model, ["vera", "ia3"])
    assert torch.equal(out(model), before)
    stack = attach(model, [{"vera": {"targets": ["q_proj"]}}, {"ia3": {"targets": ["v_proj"]}}, "ln-tuning"])
    assert {name.rsplit(".", 2)[-1] for name in stack.trainable()} >= {"vera", "ia3"}


def test_two_of_one_kind_are_switched_and_removed_by_name(model: PreTrainedModel, noise: Noise) -> None:
    base = out(model)
    first = attach(model, [{"vera": {"name": "first"}}])
    noise(first.trainable())
    alone = out(model)
    stack = attach(model, [{"vera": {"name": "second"}}], seed=1)
    assert all(p.requires_grad for p in (*first.trainable().values(), *stack.trainable().values()))
    noise(stack.trainable())
    both = out(model)
    stack.disable()
    assert torch.equal(out(model), alone)
    stack.enable()
    assert torch.equal(out(model), both)
    first.detach()
    second_alone = out(model)
    assert not torch.equal(second_alone, base)
    stack.detach()
    assert torch.equal(out(model), base)


def test_a_model_can_have_one_where_the_method_says_so(model: PreTrainedModel) -> None:
    with pytest.raises(StackError, match=r"second would be the second of its kind, .*PEFT runs one at a time"):
        build_and_attach(model, [{"ln-tuning": {"name": "first"}}, {"ln-tuning": {"name": "second"}}])
    attach(model, [{"ln-tuning": {"name": "first"}}])
    with pytest.raises(StackError, match="a model can have one"):
        attach(model, [{"ln-tuning": {"name": "second"}}])


def build_and_attach(model: PreTrainedModel, specs: list[Any]) -> None:
    attach(model, build(specs))


# --- refusals


def test_what_peft_refuses_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    before, modules = out(model), [type(m) for m in model.modules()]
    with pytest.raises(StackError, match=r"c3a cannot be attached: The block size should be a factor"):
        attach(model, ["lora", "c3a"])
    assert torch.equal(out(model), before)
    assert [type(m) for m in model.modules()] == modules
    attach(model, [{"c3a": {"block_size": 64}}])


def test_a_second_instance_that_peft_refuses_leaves_the_first_as_it_was(model: PreTrainedModel, noise: Noise) -> None:
    first = attach(model, [{"peft-lora": {"name": "first"}}])
    noise(first.trainable())
    before = out(model)
    with pytest.raises(StackError, match=r"second cannot be attached: .*needs `samples`"):
        attach(model, [{"peft-lora": {"name": "second", "init_lora_weights": "eva"}}])
    assert torch.equal(out(model), before)
    assert all(p.requires_grad for p in first.trainable().values())
    second = attach(model, [{"peft-lora": {"name": "second"}}])
    assert torch.equal(out(model), before)
    second.detach()
    first.detach()
    assert not [m for m in model.modules() if "peft" in type(m).__module__]


def test_what_peft_refuses_is_refused_before_weights_are_read() -> None:
    with pytest.raises(StackError, match="block size should be a factor"):
        load_base(place("llama"), ["c3a"])


def test_targets_are_those_of_lora(model: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match=r"'q_prj' matches no linear layer; did you mean 'q_proj'"):
        attach(model, [{"vera": {"targets": ["q_prj"]}}])
    with pytest.raises(TargetError, match=r"'layernrm' matches none of the norms"):
        attach(model, [{"ln-tuning": {"targets": ["layernrm"]}}])
    stack = attach(model, [{"oft": {"targets": "*.layers.1.*_proj"}}])
    assert all(".layers.1." in name for name in stack.trainable())


def test_a_start_that_changes_the_base_names_the_adapter_to_take() -> None:
    with pytest.raises(RecipeError, match="init_lora_weights"):
        build([{"peft-lora": {"init_lora_weights": "pissa"}}])
    assert "`pissa`" in str(type(build(["peft-lora"])[0].adapter).model_fields["init_lora_weights"].description)


@pytest.mark.parametrize("setting", ["modules_to_save", "inference_mode", "bias", "target_modules", "fan_in_fan_out"])
def test_what_the_stack_decides_is_no_setting(setting: str) -> None:
    with pytest.raises(RecipeError, match=f"{setting}: unknown key"):
        build([{"vera": {setting: None}}])


def test_gradient_checkpointing_is_refused_where_it_would_be_wrong(model: PreTrainedModel) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(StackError, match=r"prefix-tuning cannot work under gradient checkpointing: .*`prefix`"):
        attach(model, ["prefix-tuning"])


def test_xlora_says_why_it_cannot_be_had(model: PreTrainedModel) -> None:
    with pytest.raises(StackError, match="it mixes LoRA folders that were trained before"):
        attach(model, ["xlora"])


# --- AdaLoRA


def test_adalora_trains_and_allocates_as_in_peft(tmp_path: Path) -> None:
    config = {"total_step": 8, "tfinal": 2, "init_r": 6, "target_r": 2, "targets": ["q_proj", "down_proj"]}
    model = load_tiny("llama")
    stack = attach(model, [{"adalora": config}])
    save(stack, tmp_path / "start", source=place("llama"))
    stock = PeftModel.from_pretrained(load_tiny("llama"), str(tmp_path / "start"), is_trainable=True)
    (attachment,) = stack.attachments
    tuner: Any = stock.base_model
    ours = torch.optim.AdamW(list(stack.trainable().values()), lr=0.05)
    theirs = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=0.05)
    ids = batch("llama")["input_ids"][:1, :4]
    for step in range(8):
        penalty = attachment.penalty()
        assert penalty is not None
        (model(input_ids=ids, labels=ids).loss + penalty).backward()
        stock(input_ids=ids, labels=ids).loss.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
        attachment.after_step(step)
        tuner.update_and_allocate(step)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
    named = dict(stock.named_parameters())
    zeros = 0
    for name, parameter in stack.trainable().items():
        other = named[
            "base_model.model." + ".".join("default" if part == "adalora" else part for part in name.split("."))
        ]
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)
        zeros += int((parameter == 0).sum()) if ".lora_E." in name else 0
    assert zeros >= 4 * (6 - 2), "no rank was taken away"
    save(stack, tmp_path / "end")
    before = out(model)
    stack.detach()
    load(model, tmp_path / "end")
    assert torch.equal(out(model), before)


# --- PEFT's LoRA


def test_activated_lora_is_stock_peft_s(model: PreTrainedModel, noise: Noise, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 11, 12, 7, 8], [5, 6, 7, 8, 9, 10], [11, 12, 5, 11, 12, 6]])  # without, in the middle
    base = logits(model, {"input_ids": ids})
    stack = attach(model, [{"peft-lora": {"alora_invocation_tokens": [11, 12]}}])
    noise(stack.trainable())
    ours = logits(model, {"input_ids": ids})
    assert torch.equal(ours[1], base[1])
    assert torch.equal(ours[0, :2], base[0, :2])
    assert not torch.equal(ours[0, 3:], base[0, 3:])
    save(stack, tmp_path / "a", source=place("llama"))
    stock = PeftModel.from_pretrained(load_tiny("llama"), str(tmp_path / "a")).eval()
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, ours)
    assert torch.equal(generated(stock, ids), generated(model, ids))


def test_eva_starts_from_data_as_in_peft(model: PreTrainedModel) -> None:
    samples = [batch("llama"), {k: v.roll(1, 0) for k, v in batch("llama").items()}]
    before = out(model)
    settings = {"peft-lora": {"init_lora_weights": "eva", "targets": ["q_proj", "down_proj"], "r": 4}}
    stack = attach(model, [settings], samples=samples)
    assert torch.equal(out(model), before)
    stock = get_peft_model(
        load_tiny("llama"),
        LoraConfig(r=4, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), target_modules=["q_proj", "down_proj"]),
    )
    initialize_lora_eva_weights(stock, samples, show_progress_bar=False)
    theirs = {n: p for n, p in stock.named_parameters() if "lora_A" in n}
    assert len(theirs) == 4
    for name, parameter in theirs.items():
        ours = stack.trainable()[name.removeprefix("base_model.model.").replace("default", "peft-lora")]
        assert ours.shape == (4, parameter.shape[1])
        torch.testing.assert_close(ours.T @ ours, parameter.T @ parameter, atol=1e-4, rtol=1e-3)  # signs are free


def test_eva_without_data_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(StackError, match=r"`eva` starts from data, so attach.. needs `samples`"):
        attach(model, [{"peft-lora": {"init_lora_weights": "eva"}}])
    assert not any(hasattr(m, "lora_A") for m in model.modules())


# --- IA3


def test_ia3_scales_the_inputs_of_what_it_is_told(model: PreTrainedModel) -> None:
    settings: dict[str, Any] = {"targets": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    stack = attach(model, [{"ia3": settings}])
    shapes = {name.split(".")[-3]: tuple(p.shape) for name, p in stack.trainable().items()}
    assert shapes == {"v_proj": (128, 1), "down_proj": (1, 512)}
    stack.detach()
    with pytest.raises(TargetError, match="matches none of the targets"):
        attach(model, [{"ia3": settings | {"feedforward_modules": ["up_proj"]}}])


# --- prompts


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning", "prefix-tuning", "cartridge"])
def test_generation_is_stock_peft_s(name: str, model: PreTrainedModel, noise: Noise, tmp_path: Path) -> None:
    stack = attach(model, [{name: {"num_virtual_tokens": 5}}])
    noise(stack.trainable())
    save(stack, tmp_path / "a", source=place("llama"))
    stock = PeftModel.from_pretrained(load_tiny("llama"), str(tmp_path / "a")).eval()
    ids = torch.tensor([[4, 9, 11, 12, 7, 8], [5, 6, 7, 8, 9, 10]])
    assert torch.equal(generated(model, ids), generated(stock, ids))


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning", "prefix"])
def test_left_padding_changes_nothing_that_is_generated(name: str, model: PreTrainedModel, noise: Noise) -> None:
    stack = attach(model, [name])
    noise(stack.trainable())
    row = [9, 11, 12, 7]
    padded = torch.tensor([[0, 0, 0, *row], [4, 5, 6, *row]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    together = generated(model, padded, mask)[0]
    alone = generated(model, torch.tensor([row]))[0]
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_logits_and_labels_keep_their_places(name: str, model: PreTrainedModel, noise: Noise, tmp_path: Path) -> None:
    stack = attach(model, [name])
    noise(stack.trainable())
    inputs = batch("llama")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # PEFT's last vector predicts the first token, where ours has no label to be judged by
    result = model.eval()(**inputs, labels=labels)
    assert result.logits.shape[:2] == inputs["input_ids"].shape
    save(stack, tmp_path / "a", source=place("llama"))
    stock = PeftModel.from_pretrained(load_tiny("llama"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(result.loss, stock(**inputs, labels=labels).loss)


def test_a_prompt_starts_from_a_text(model: PreTrainedModel) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}

    settings = {
        "prompt-tuning": {
            "num_virtual_tokens": 4,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "be so good",
        }
    }
    with pytest.raises(StackError, match="needs a tokenizer"):
        attach(model, [settings])
    stack = attach(model, [settings], tokenizer=tokenizer)
    (prompt,) = stack.trainable().values()
    table: Any = model.get_input_embeddings().weight
    assert torch.equal(prompt, table[torch.tensor([2, 2, 4, 2])])


def test_prompts_compose_with_lora_and_each_other(model: PreTrainedModel, noise: Noise, tmp_path: Path) -> None:
    before = out(model)
    stack = attach(model, ["lora", "prompt-tuning", {"p-tuning": {"num_virtual_tokens": 3}}, "layerwise-lr"])
    noise(stack.trainable())
    losses(model, "llama").backward()
    resting = set().union(*(a.may_rest() for a in stack.attachments))
    assert all(p.grad is not None and p.grad.any() for n, p in stack.trainable().items() if n not in resting)
    assert stack.rates()[next(n for n in stack.trainable() if n.endswith("prompt-tuning"))].multiplier < 0.8
    all_three = out(model)
    save(stack, tmp_path / "a")
    with stack.base_only():
        assert torch.equal(out(model), before)
    stack.detach()
    load(model, tmp_path / "a")
    assert torch.equal(out(model), all_three)
