import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from onegpu.adapters import (
    Attachment,
    PluginError,
    RecipeError,
    Stack,
    StackError,
    TargetError,
    attach,
    build,
    get,
    save,
)
from onegpu.adapters.contract import Adapter, Context, Rate
from onegpu.adapters.frozen_linear import FrozenLinear, packed_as
from onegpu.adapters.lora import LoRA
from onegpu.adapters.specs import check
from onegpu.adapters.structure import Layers, modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Train = Callable[[Stack], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

PREFIX: dict[str, Any] = {"prefix": {"length": 4}}
TRAINERS: dict[str, list[Any]] = {"lora": ["lora"], "prefix": [PREFIX], "both": ["lora", PREFIX]}
each_trainer = pytest.mark.parametrize("specs", TRAINERS.values(), ids=TRAINERS.keys())
each_base = pytest.mark.parametrize("packing", [[], ["int8"], ["nf4"]], ids=["float", "int8", "nf4"])


class Failing(Adapter):
    """Refuses every model."""

    def attach(self, model: nn.Module, context: Context) -> Attachment:
        raise StackError("not on this model")


class Unanswering(Adapter):
    """Forgets the rates it was given."""

    def rates(self, rates: Mapping[str, Rate], layers: Layers) -> dict[str, Rate]:
        return {}


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that must not change: frozen parameters and what is packed."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    packed = {n: b for n, b in model.named_buffers() if ".packed." in n}
    return {name: tensor.detach().clone() for name, tensor in (frozen | packed).items()}


# --- reading specifications


def test_a_name_a_mapping_and_an_instance_mean_the_same() -> None:
    specs: list[Any] = ["lora", {"lora": None}, {"lora": {}}, LoRA(), {"onegpu:lora": {}}]
    for spec in specs:
        (named,) = build([spec])
        assert (named.name, named.adapter) == ("lora", LoRA())
        assert named.entry is not None
        assert named.entry.distribution == "onegpu"


def test_an_instance_may_have_a_name_of_its_own() -> None:
    first, second = build(["lora", {"lora": {"name": "second", "rank": 2}}])
    assert (first.name, second.name) == ("lora", "second")


def test_a_class_that_nobody_registered_is_called_after_itself() -> None:
    (named,) = build([Failing()])
    assert (named.name, named.entry) == ("failing", None)


@pytest.mark.parametrize("spec", [3, {}, {"lora": {}, "prefix": {}}, {"lora": 8}, ["lora"], {1: {}}, None])
def test_anything_else_is_refused_with_its_place(spec: Any) -> None:
    with pytest.raises(RecipeError, match=r"^adapters\[1\]: write a name, or one name with its settings"):
        build(["lora", spec])


def test_an_unknown_key_is_named_with_its_path_and_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"^adapters\[1\]\.lora\.rnak: unknown key; did you mean 'rank'\?") as caught:
        build(["nf4", {"lora": {"rnak": 8}}])
    assert caught.value.exit_code == 2
    assert caught.value.faults[0][0] == ("lora", "rnak")


def test_all_faults_of_a_configuration_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"lora\.rank: .*lora\.dropout: .*lora\.rnak: "):
        build([{"lora": {"rank": 0, "dropout": 2.0, "rnak": 1}}])


def test_an_unknown_adapter_is_a_plugin_error() -> None:
    with pytest.raises(PluginError, match="did you mean 'lora'"):
        build(["loraa"])
    with pytest.raises(PluginError, match="did you mean 'prefix'"):
        get("prefx")


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(StackError, match="two adapters are called 'lora'; give one of them another `name`"):
        build(["lora", {"lora": {"rank": 2}}])


# --- what cannot work together


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["nf4", "int8", "lora"], "a base is packed once: choose one of nf4 and int8"),
        (["nf4", "full"], "full cannot work on what nf4 has packed"),
        (["full", "nf4"], "full cannot work on what nf4 has packed"),
        (["full", "lora"], "full trains the base itself, so lora beside it"),
        (["lora", "full"], "full trains the base itself, so lora beside it"),
        (["layerwise-lr"], "nothing would be trained"),
        (["nf4"], "nothing would be trained"),
        ([], "nothing would be trained"),
    ],
)
def test_an_impossible_stack_is_refused_before_weights_are_read(specs: list[str], message: str) -> None:
    with pytest.raises(StackError, match=message):
        check(build(specs))


@pytest.mark.parametrize("specs", [[], ["layerwise-lr"]])
def test_a_head_is_enough_to_train(fresh: Fresh, specs: list[str]) -> None:
    check(build(specs), has_head=True)
    assert attach(fresh("bert"), specs).trainable().keys() == {"classifier.weight", "classifier.bias"}


def test_a_packing_adapter_on_a_float_model_says_how_to_load_it(llama: PreTrainedModel) -> None:
    with pytest.raises(StackError, match=r"load the model with load_base\(\.\.\., \['nf4'\]\)"):
        attach(llama, ["nf4", "lora"])


def test_full_training_of_a_packed_model_is_refused(fresh: Fresh) -> None:
    with pytest.raises(StackError, match="full cannot work on a base packed as nf4"):
        attach(fresh("plain", "nf4"), ["full"])


# --- attaching twice


def test_the_same_name_twice_on_one_model_is_refused_until_it_is_detached(llama: PreTrainedModel) -> None:
    stack = attach(llama, ["lora"])
    with pytest.raises(StackError, match="'lora' is attached to this model already"):
        attach(llama, ["lora"])
    stack.detach()
    assert attach(llama, ["lora"]).trainable()


@pytest.mark.parametrize("wrapped", [True, False], ids=["what PEFT returns", "the model inside"])
def test_a_model_that_peft_has_wrapped_is_refused_until_it_is_unloaded(llama: PreTrainedModel, wrapped: bool) -> None:
    peft = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StackError, match="this model has an adapter of PEFT's own"):
        attach(peft if wrapped else llama, ["lora"])
    assert all(p.requires_grad == ("lora_" in name) for name, p in llama.named_parameters())
    attach(peft.unload(), ["lora"])


def test_names_stay_taken_though_nobody_kept_their_stacks(llama: PreTrainedModel) -> None:
    """So many that the memory of one stack is used again by another."""
    adapters = [LoRA(name=f"n{i}", rank=1, targets=["q_proj"]) for i in range(40)]
    for adapter in adapters:
        attach(llama, [adapter])
    for adapter in adapters:
        with pytest.raises(StackError, match=f"'{adapter.name}' is attached to this model already"):
            attach(llama, [adapter])


def test_a_second_stack_leaves_the_first_one_trainable(fresh: Fresh) -> None:
    model = fresh("bert")
    first = attach(model, ["lora"])
    second = attach(model, [PREFIX])
    assert all(p.requires_grad for p in (first.trainable() | second.trainable()).values())
    assert first.heads
    assert not second.heads  # a head has one owner
    assert not first.trainable().keys() & second.trainable().keys()


def test_a_model_can_be_freed_with_its_stack_attached(fresh: Fresh) -> None:
    model = fresh("plain")
    attach(model, ["lora"])
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


# --- attaching that fails


@pytest.mark.parametrize("name", ["plain", "bert"])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Failing(), StackError),
        ({"lora": {"name": "b", "targets": ["nowhere"]}}, TargetError),
        ({"prefix": {"text": "needs a tokenizer"}}, StackError),
    ],
)
def test_a_failure_half_way_leaves_the_model_as_it_was(
    fresh: Fresh, run: Run, name: str, bad: Any, error: type[Exception]
) -> None:
    model = fresh(name, precision="bf16")
    before, names = run(model), list(dict(model.named_modules()))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    with pytest.raises(error):
        attach(model, ["lora", PREFIX | {"prefix": {"length": 2, "name": "first"}}, bad])
    assert list(dict(model.named_modules())) == names
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert torch.equal(run(model), before)
    assert attach(model, ["lora"]).trainable()  # the name is free again


# --- the frozen base


@each_base
@each_trainer
def test_training_changes_no_bit_of_the_base(
    fresh: Fresh, run: Run, train: Train, specs: list[Any], packing: list[str]
) -> None:
    model = fresh("plain", *packing)
    output = run(model)
    stack = attach(model, [*packing, *specs])
    base, start = _base_tensors(model), {n: p.detach().clone() for n, p in stack.trainable().items()}
    train(stack)
    assert len(base) > 5
    now = _base_tensors(model)
    assert now.keys() == base.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())
    assert not [name for name, p in stack.trainable().items() if torch.equal(p, start[name])]
    stack.detach()
    assert torch.equal(run(model), output)


@each_base
@each_trainer
def test_exactly_what_the_stack_owns_is_trainable_and_it_is_float32(
    fresh: Fresh, specs: list[Any], packing: list[str]
) -> None:
    for name in ("plain", "bert"):
        model = fresh(name, *packing, precision="bf16")
        stack = attach(model, specs)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in stack.trainable().values()}
        assert {p.dtype for p in stack.trainable().values()} == {torch.float32}


def test_how_the_base_is_packed_can_be_asked(fresh: Fresh) -> None:
    assert [packed_as(fresh("plain", *packing)) for packing in ([], ["int8"], ["nf4"], ["fp4"])] == [
        None,
        "int8",
        "nf4",
        "fp4",
    ]


def test_every_packed_linear_is_ours_under_adapters_too(fresh: Fresh) -> None:
    model = fresh("plain", "nf4")
    attach(model, ["lora"])
    assert packed_as(model) == "nf4"
    assert len([m for m in model.modules() if isinstance(m, FrozenLinear)]) == 14
    assert len(list(modules(model))) > 14


# --- gradient checkpointing


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("packing", "specs"),
    [*((packing, specs) for packing in ([], ["int8"], ["nf4"]) for specs in TRAINERS.values()), ([], ["full"])],
    ids=str,
)
def test_checkpointing_changes_no_gradient(
    fresh: Fresh,
    noise: Noise,
    gradients: Gradients,
    assert_same: AssertSame,
    packing: list[str],
    specs: list[Any],
    reentrant: bool,
    when: str,
) -> None:
    found = []
    for checkpointing in (False, True):
        model = fresh("plain", *packing).train()
        enable = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable(**enable)
        stack = attach(model, specs)
        noise(stack.attachments[0].trainable() if specs == ["full"] else stack.trainable())
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable(**enable)
        calls: list[object] = []
        layer = model.get_submodule("model.layers.0.input_layernorm")
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients(model, stack.trainable()))
        assert len(calls) == 1 + checkpointing  # the layer was computed again, or nothing was tested
        assert found[-1].keys() == stack.trainable().keys()
    assert_same(found[1], found[0])


def test_gradients_pass_a_reentrant_checkpoint_without_help_of_transformers(fresh: Fresh, gradients: Gradients) -> None:
    """Its own hook on the embeddings comes and goes between versions, and without one nothing is trained."""
    model = fresh("plain").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    stack = attach(model, ["lora"])
    assert gradients(model, stack.trainable()).keys() == stack.trainable().keys()


def test_a_detached_model_has_no_hook_of_ours(fresh: Fresh) -> None:
    for name in ("plain", "bert"):
        model = fresh(name)
        attach(model, ["lora", PREFIX]).detach()
        assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# --- heads


@each_base
def test_a_head_is_float32_over_a_bf16_backbone_and_is_trained(
    fresh: Fresh, run: Run, gradients: Gradients, packing: list[str]
) -> None:
    for name in ("bert", "roberta"):
        model = fresh(name, *packing, precision="bf16")
        before = run(model)
        stack = attach(model, ["lora"])
        assert stack.heads
        assert {p.dtype for p in stack.heads.values()} == {torch.float32}
        output = run(model)
        assert output.dtype is torch.float32
        torch.testing.assert_close(output, before.float(), atol=0.01, rtol=0.05)
        found = gradients(model, stack.heads)
        assert found.keys() == stack.heads.keys()
        assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("specs", [[], ["lora"], ["layerwise-lr"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detaching_restores_a_trained_head(
    fresh: Fresh, run: Run, train: Train, precision: str, specs: list[str]
) -> None:
    model = fresh("bert", precision=precision)
    before, head = run(model), model.get_parameter("classifier.weight").detach().clone()
    stack = attach(model, specs)
    train(stack)
    assert not torch.equal(model.get_parameter("classifier.weight"), head.float())
    stack.detach()
    assert torch.equal(model.get_parameter("classifier.weight"), head)
    assert model.get_parameter("classifier.weight").dtype is head.dtype
    assert torch.equal(run(model), before)


def test_a_causal_model_has_no_head_to_train(llama: PreTrainedModel) -> None:
    assert attach(llama, ["lora"]).heads == {}


# --- rates and switches


@pytest.mark.parametrize("specs", [["lora"], ["lora", PREFIX], ["full"], []], ids=str)
def test_each_trainable_tensor_has_one_name_and_one_rate(fresh: Fresh, specs: Sequence[Any]) -> None:
    stack = attach(fresh("bert"), specs)
    trainable = stack.trainable()
    assert len({id(p) for p in trainable.values()}) == len(trainable)
    assert stack.rates().keys() == trainable.keys()


def test_weight_decay_is_for_matrices_only(fresh: Fresh) -> None:
    stack = attach(fresh("bert"), ["lora"])
    decays = {name: rate.weight_decay for name, rate in stack.rates(0.1).items()}
    assert decays.pop("classifier.bias") == 0.0
    assert set(decays.values()) == {0.1}


def test_an_adapter_must_answer_for_every_tensor(llama: PreTrainedModel) -> None:
    stack = attach(llama, [LoRA(), Unanswering()])
    with pytest.raises(StackError, match=r"unanswering: rates\(\) must answer for exactly the trainable tensors"):
        stack.rates()


def test_the_base_alone_is_restored_after_an_error_too(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain")
    before = run(model)
    stack = attach(model, ["lora", PREFIX])
    noise(stack.trainable())
    trained = run(model)
    with pytest.raises(KeyError), stack.base_only():  # noqa: PT012  # the block is tested
        assert torch.equal(run(model), before)
        raise KeyError
    assert torch.equal(run(model), trained)


def test_an_adapter_that_neither_merges_nor_switches_says_so(llama: PreTrainedModel) -> None:
    attachment = Attachment("mine", Failing(), llama)
    with pytest.raises(StackError, match="mine: this method cannot be merged"):
        attachment.merge()
    with pytest.raises(NotImplementedError):
        attachment.enabled(False)
    with pytest.raises(NotImplementedError):
        attachment.detach()


def test_nothing_can_train_the_base_itself_under_another_adapter(llama: PreTrainedModel) -> None:
    attach(llama, ["lora"])
    with pytest.raises(StackError, match="full trains the base itself, and 'lora' is attached"):
        attach(llama, ["full"])


def test_a_stack_is_detached_once(llama: PreTrainedModel) -> None:
    stack = attach(llama, ["lora"])
    stack.detach()
    with pytest.raises(StackError, match="not attached any more"):
        stack.detach()


# --- switching, removing, merging by name


def test_instances_are_switched_by_name(llama: PreTrainedModel, ids: torch.Tensor, noise: Noise) -> None:
    stack = attach(llama, [{"lora": {"name": "a"}}, {"lora": {"name": "b"}}, "prefix"])
    noise(stack.trainable())
    whole = llama(ids).logits
    stack.disable("a", "prefix")
    only_b = llama(ids).logits
    stack.disable("b")
    with stack.base_only():
        base = llama(ids).logits
    assert torch.equal(llama(ids).logits, base), "what was off before stays off afterwards"
    stack.enable("b")
    assert torch.equal(llama(ids).logits, only_b)
    with stack.base_only():
        assert torch.equal(llama(ids).logits, base)
    assert torch.equal(llama(ids).logits, only_b)
    stack.enable()
    assert torch.equal(llama(ids).logits, whole)
    with pytest.raises(StackError, match="no adapter 'prefx' is attached; did you mean 'prefix'"):
        stack.disable("prefx")


def test_one_instance_is_removed_and_the_rest_is_saved(
    llama: PreTrainedModel, ids: torch.Tensor, noise: Noise, tmp_path: Path
) -> None:
    stack = attach(llama, [{"lora": {"name": "a"}}, {"lora": {"name": "b"}}, "layerwise-lr"])
    noise(stack.trainable())
    stack.disable("a")
    only_b = llama(ids).logits
    stack.enable("a")
    stack.remove("a")
    assert torch.equal(llama(ids).logits, only_b)
    assert {name.rpartition(".")[2] for name in stack.trainable()} == {"b"}
    save(stack, tmp_path / "b")
    with pytest.raises(StackError, match="'b' is the only adapter"):
        stack.remove("b")
    attach(llama, [{"lora": {"name": "a"}}])  # the name is free again
    stack.detach()
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()


def test_a_stack_is_merged_as_one_and_its_head_stays_trained(
    bert: PreTrainedModel, ids: torch.Tensor, noise: Noise
) -> None:
    stack = attach(bert, ["lora", "bitfit"])
    noise(stack.trainable())
    before = bert(ids).logits
    stack.merge()
    torch.testing.assert_close(bert(ids).logits, before)
    assert not any(p.requires_grad for p in bert.parameters())
    attach(bert, ["lora"])


def test_what_cannot_be_merged_leaves_the_stack_attached(
    llama: PreTrainedModel, ids: torch.Tensor, noise: Noise
) -> None:
    stack = attach(llama, ["lora", "prefix"])
    noise(stack.trainable())
    before = llama(ids).logits
    with pytest.raises(StackError, match="prefix cannot be merged into the base"):
        stack.merge()
    assert torch.equal(llama(ids).logits, before)
    assert len(stack.attachments) == 2
