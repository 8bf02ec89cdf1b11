import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

from onegpu.adapters import RecipeError, Stack, StackError, attach, build, load, save

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

LENGTH = 5
PREFIX: dict[str, Any] = {"prefix": {"length": LENGTH}}
TOKENS = [9, 4, 33, 17, 60]
GLOBAL_HEADS: dict[str, Any] = {"global_head_dim": 16}  # transformers' types do not know it

llama_variants = pytest.mark.parametrize("name", ["plain", "tied", "wide-heads"])
encoders = pytest.mark.parametrize("name", ["bert", "roberta"])
each_side = pytest.mark.parametrize("side", ["left", "right"])


def _tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [int(token) for token in text.split()]}


def _mask(side: str) -> Tensor:
    """Two rows of 7 tokens, three of which are padding in the second row."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[1] = torch.tensor([1, 1, 1, 1, 0, 0, 0])
    return mask


def _counted(mask: Tensor) -> Tensor:
    """Positions that start at the first real token, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _explicit_cache(model: PreTrainedModel, stacks: list[Stack], batch: int = 2) -> DynamicCache:
    """transformers' own cache, holding the keys and values of the stacks' prefixes, the outermost first."""
    cache = DynamicCache(config=model.config)
    tensors = [list(stack.trainable().values()) for stack in stacks]
    for layer in range(len(tensors[0]) // 2):
        key, value = (
            torch.cat([t[2 * layer + i].detach().to(model.dtype) for t in tensors], dim=1)[None].expand(
                batch, -1, -1, -1
            )
            for i in (0, 1)
        )
        cache.update(key, value, layer)
    return cache


def _generate(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model.generate(**inputs)
    return found


@torch.no_grad()
def _strengthen(stack: Stack) -> None:
    """Until it decides which tokens are likeliest: the values of tiny random models are small."""
    for name, parameter in stack.trainable().items():
        if ".prefix_value." in name:
            parameter.mul_(30)


def _in_peft(stack: Stack, folder: Path, base: nn.Module) -> Any:
    save(stack, folder)
    model = PeftModel.from_pretrained(base, str(folder))
    _embedding(model).requires_grad_(True)  # PEFT loads a prefix frozen, whatever it is told
    return model


def _embedding(model: Any) -> nn.Parameter:
    found: nn.Parameter = model.prompt_encoder["default"].embedding.weight
    return found


def _as_peft(tensors: Mapping[str, Tensor]) -> Tensor:
    """Prefixes of all layers in PEFT's one matrix (length, layers * 2 * heads * size)."""
    stacked = torch.stack([t for name, t in tensors.items() if ".prefix_" in name])
    return stacked.permute(2, 0, 1, 3).flatten(1)


@llama_variants
def test_logits_are_exactly_those_of_a_cache_with_the_same_keys_and_values(
    fresh: Fresh, run: Run, noise: Noise, name: str
) -> None:
    model = fresh(name)
    stack = attach(model, [PREFIX])
    noise(stack.trainable())
    ours = run(model)
    base = fresh(name)
    cache = _explicit_cache(base, [stack])
    theirs = run(base, past_key_values=cache, position_ids=torch.arange(LENGTH, LENGTH + 7)[None])
    assert torch.equal(ours, theirs)
    assert (ours - run(base)).abs().max() > 1e-3


def test_in_bf16_logits_are_exactly_those_of_a_cache_too(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain", precision="bf16")
    stack = attach(model, [PREFIX])
    noise(stack.trainable())
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}
    base = fresh("plain", precision="bf16")
    base.set_attn_implementation("sdpa")  # as a prefix computes; a base in bf16 on a CPU has another one
    cache = _explicit_cache(base, [stack])
    theirs = run(base, past_key_values=cache, position_ids=torch.arange(LENGTH, LENGTH + 7)[None])
    assert theirs.dtype is torch.bfloat16
    assert torch.equal(run(model), theirs)


@each_side
def test_padding_is_looked_through(fresh: Fresh, run: Run, noise: Noise, ids: Tensor, side: str) -> None:
    model = fresh("plain")
    stack = attach(model, [PREFIX])
    noise(stack.trainable())
    mask = _mask(side)
    padded = run(model, attention_mask=mask, position_ids=_counted(mask))
    for row in (0, 1):
        real = mask[row].bool()
        alone = run(model, input_ids=ids[row, real][None])
        torch.testing.assert_close(padded[row, real], alone[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("masked", [None, "left", "right"])
@llama_variants
def test_outputs_and_gradients_are_those_of_peft(
    fresh: Fresh,
    tmp_path: Path,
    run: Run,
    noise: Noise,
    gradients: Gradients,
    assert_same: AssertSame,
    name: str,
    masked: str | None,
) -> None:
    stack = attach(fresh(name), [PREFIX])
    noise(stack.trainable())
    theirs = _in_peft(stack, tmp_path / "a", fresh(name))
    inputs = {} if masked is None else {"attention_mask": _mask(masked), "position_ids": _counted(_mask(masked))}
    _compare_with_peft(stack, theirs, run, gradients, assert_same, inputs)


@pytest.mark.parametrize("masked", [None, "right"])
@encoders
def test_encoders_equal_peft_too(
    fresh: Fresh,
    tmp_path: Path,
    run: Run,
    noise: Noise,
    gradients: Gradients,
    assert_same: AssertSame,
    ids: Tensor,
    name: str,
    masked: str | None,
) -> None:
    """With their trained head beside. RoBERTa counts its positions from the padding token on."""
    stack = attach(fresh(name), [PREFIX])
    noise(stack.trainable())
    theirs = _in_peft(stack, tmp_path / "a", fresh(name))
    inputs = {}
    if masked is not None:
        padding = {"bert": 0, "roberta": 1}[name]
        mask = _mask(masked)
        inputs = {"attention_mask": mask, "input_ids": ids.masked_fill(mask == 0, padding)}
    _compare_with_peft(stack, theirs, run, gradients, assert_same, inputs)


def test_gpt2_equals_peft_too(
    fresh: Fresh, tmp_path: Path, run: Run, noise: Noise, gradients: Gradients, assert_same: AssertSame
) -> None:
    stack = attach(fresh("gpt2"), [PREFIX])
    noise(stack.trainable())
    theirs = _in_peft(stack, tmp_path / "a", fresh("gpt2"))
    _compare_with_peft(stack, theirs, run, gradients, assert_same, {})


def _compare_with_peft(
    stack: Stack, theirs: Any, run: Run, gradients: Gradients, assert_same: AssertSame, inputs: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(run(stack.model, **inputs), run(theirs, **inputs), atol=1e-6, rtol=0)
    ours = {"prompt": _as_peft(gradients(stack.model, stack.trainable(), **inputs))}
    assert_same(ours, gradients(theirs, {"prompt": _embedding(theirs)}, **inputs))


@pytest.mark.parametrize("side", [None, "left"])
@llama_variants
def test_generation_equals_peft_and_does_not_depend_on_the_cache(
    fresh: Fresh, tmp_path: Path, noise: Noise, ids: Tensor, name: str, side: str | None
) -> None:
    model = fresh(name)
    stack = attach(model, [PREFIX])
    noise(stack.trainable())
    _strengthen(stack)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if side is None else _mask(side),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    ours = _generate(model, **inputs)
    assert ours.shape == (2, 15)
    assert torch.equal(_generate(model, **inputs, use_cache=False), ours)
    theirs = _in_peft(stack, tmp_path / "a", fresh(name))
    assert torch.equal(_generate(theirs, **inputs), ours)
    assert not torch.equal(_generate(fresh(name), **inputs), ours)


def test_generation_is_the_repeated_choice_of_the_likeliest_token(
    fresh: Fresh, run: Run, noise: Noise, ids: Tensor
) -> None:
    model = fresh("plain")
    noise(attach(model, [PREFIX]).trainable())
    by_hand = ids
    for _ in range(6):
        by_hand = torch.cat([by_hand, run(model, input_ids=by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(_generate(model, input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None), by_hand)


@pytest.mark.parametrize("name", ["plain", "tied", "wide-heads", "gpt2"])
def test_a_fresh_one_acts_like_its_text_as_a_prompt(fresh: Fresh, run: Run, ids: Tensor, name: str) -> None:
    model = fresh(name)
    prompt = torch.tensor(TOKENS).expand(2, -1)
    expected = run(model, input_ids=torch.cat([prompt, ids], dim=1))[:, LENGTH:]
    text = " ".join(map(str, TOKENS))
    attach(model, [{"prefix": {"length": LENGTH, "text": text}}], tokenizer=_tokenizer)
    torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("text", "tokens"), [("9 4", [9, 4, 9, 4, 9]), ("9 4 33 17 60 5 6", [9, 4, 33, 17, 60])], ids=["repeated", "cut"]
)
def test_a_text_is_brought_to_length(fresh: Fresh, run: Run, ids: Tensor, text: str, tokens: list[int]) -> None:
    model = fresh("plain")
    expected = run(model, input_ids=torch.cat([torch.tensor(tokens).expand(2, -1), ids], dim=1))[:, LENGTH:]
    attach(model, [{"prefix": {"length": LENGTH, "text": text}}], tokenizer=_tokenizer)
    torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("text", "tokenizer", "message"), [("5", None, "needs a tokenizer"), (" ", _tokenizer, "has no tokens")]
)
def test_a_text_that_gives_no_tokens_is_refused(
    llama: PreTrainedModel, text: str, tokenizer: Any, message: str
) -> None:
    with pytest.raises(StackError, match=message):
        attach(llama, [{"prefix": {"text": text}}], tokenizer=tokenizer)


@pytest.mark.parametrize("init", ["tokens", "normal"])
def test_the_same_seed_gives_the_same_start(fresh: Fresh, init: str) -> None:
    def start(seed: int) -> Tensor:
        stack = attach(fresh("plain"), [{"prefix": {"length": LENGTH, "init": init}}], seed=seed)
        return torch.cat([p.detach().flatten() for p in stack.trainable().values()])

    first = start(7)
    torch.manual_seed(99)  # the state of the program must not matter
    assert torch.equal(start(7), first)
    assert not torch.equal(start(8), first)


def test_normal_noise_is_normal(llama: PreTrainedModel) -> None:
    stack = attach(llama, [{"prefix": {"length": 64, "init": "normal"}}])
    values = torch.cat([p.detach().flatten() for p in stack.trainable().values()])
    assert values.mean().abs() < 0.1
    assert 0.9 < values.std() < 1.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["plain", "bert"])
def test_disabled_or_detached_the_base_is_what_it_was_to_the_bit(
    fresh: Fresh, run: Run, noise: Noise, name: str, attention: str
) -> None:
    model = fresh(name)
    model.set_attn_implementation(attention)
    before, names = run(model), list(dict(model.named_modules()))
    stack = attach(model, [PREFIX])
    noise(stack.attachments[0].trainable())  # not the head, which stays
    with_prefix = run(model)
    with stack.base_only():
        assert torch.equal(run(model), before)
        assert model.config._attn_implementation == attention
    assert torch.equal(run(model), with_prefix)
    stack.detach()
    assert torch.equal(run(model), before)
    assert model.config._attn_implementation == attention
    assert list(dict(model.named_modules())) == names


def test_eager_and_fused_attention_agree(fresh: Fresh, run: Run, noise: Noise) -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        model = fresh("plain")
        model.set_attn_implementation(attention)
        noise(attach(model, [PREFIX]).trainable())
        outputs.append(run(model))
    assert torch.equal(*outputs)  # ours takes the place of either


def test_an_attention_that_the_user_chose_between_two_prefixes_is_restored(fresh: Fresh, run: Run) -> None:
    model = fresh("plain")
    attach(model, [PREFIX]).detach()
    model.set_attn_implementation("eager")
    attach(model, [PREFIX]).detach()
    assert model.config._attn_implementation == "eager"


def test_attaching_keeps_training_and_evaluation_mode(fresh: Fresh) -> None:
    model = fresh("plain").train()
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    attach(model, [PREFIX]).detach()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_prefixes_stand_side_by_side_and_detach_in_either_order(
    fresh: Fresh, run: Run, noise: Noise, order: tuple[int, int]
) -> None:
    model, base = fresh("plain"), fresh("plain")
    before = run(model)
    stacks = [attach(model, [{"prefix": {"length": 3 + i, "name": name}}]) for i, name in enumerate("ab")]
    for stack in stacks:
        noise(stack.trainable())
    positions = torch.arange(7)[None]
    cache = _explicit_cache(base, [stacks[1], stacks[0]])  # the one attached last is the outermost
    theirs = run(base, past_key_values=cache, position_ids=positions + 7)
    torch.testing.assert_close(run(model), theirs, atol=1e-6, rtol=0)
    stacks[order[0]].detach()
    stays = stacks[order[1]]
    length = 3 + order[1]
    theirs = run(base, past_key_values=_explicit_cache(base, [stays]), position_ids=positions + length)
    assert torch.equal(run(model), theirs)
    stays.detach()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize(("queries", "causal"), [(7, True), (1, True), (3, True), (7, False)])
def test_without_a_mask_tokens_see_the_prefix_and_what_is_before_them(
    llama: PreTrainedModel, queries: int, causal: bool
) -> None:
    """Some architectures leave the mask to the attention function; fewer queries than keys mean a cache."""
    stack = attach(llama, [PREFIX])
    layer: Any = llama.get_submodule("model.layers.0.self_attn")
    layer.is_causal = causal
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    found, _ = ALL_ATTENTION_FUNCTIONS[llama.config._attn_implementation](layer, query, key, value, None)
    prefix_key, prefix_value = (p.detach().expand(2, -1, -1, -1) for p in list(stack.trainable().values())[:2])
    visible = torch.ones(queries, LENGTH + 7, dtype=torch.bool)
    if causal:
        visible = visible.tril(LENGTH + 7 - queries)
    expected = nn.functional.scaled_dot_product_attention(
        query, torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2), visible, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=0)


def test_given_positions_are_shifted_too(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain")
    noise(attach(model, [PREFIX]).trainable())
    assert torch.equal(run(model, position_ids=torch.arange(7)[None]), run(model))
    assert not torch.equal(run(model, position_ids=torch.arange(7)[None] * 5), run(model))


def test_embeddings_as_inputs_are_taken(fresh: Fresh, run: Run, noise: Noise, ids: Tensor) -> None:
    model = fresh("plain")
    noise(attach(model, [PREFIX]).trainable())
    embedded = model.get_input_embeddings()(ids).detach()
    assert torch.equal(run(model, input_ids=None, inputs_embeds=embedded), run(model))


def test_packed_rows_do_not_see_each_other(fresh: Fresh, run: Run, noise: Noise, ids: Tensor) -> None:
    """Positions that restart are how transformers is told of several rows in one; the prefix stands before each."""
    model = fresh("plain")
    noise(attach(model, [PREFIX]).trainable())
    packed = run(model, input_ids=ids.view(1, -1), position_ids=torch.arange(7).repeat(2)[None], use_cache=False)
    torch.testing.assert_close(packed.view(2, 7, -1), run(model), atol=1e-6, rtol=0)


def test_no_gradient_stays_away_from_a_prefix_and_none_reaches_the_base(
    fresh: Fresh, noise: Noise, gradients: Gradients
) -> None:
    model = fresh("plain")
    stack = attach(model, [PREFIX])
    noise(stack.trainable())
    found = gradients(model, stack.trainable())
    assert found.keys() == stack.trainable().keys()
    assert all(gradient.any() for gradient in found.values())
    assert not [n for n, p in model.named_parameters() if p.grad is not None and ".prefix_" not in n]


def test_a_model_of_several_head_sizes_keeps_its_own_shapes(
    tmp_path: Path, run: Run, noise: Noise, ids: Tensor
) -> None:
    config = Gemma4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=32,
        **GLOBAL_HEADS,
    )
    model, other = (Gemma4ForCausalLM(config).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    expected = run(model, input_ids=torch.cat([torch.tensor(TOKENS).expand(2, -1), ids], dim=1))[:, LENGTH:]
    spec = {"prefix": {"length": LENGTH, "text": " ".join(map(str, TOKENS))}}
    stack = attach(model, [spec], tokenizer=_tokenizer)
    assert {p.shape[-1] for p in stack.trainable().values()} == {8, 16}
    torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=0)
    assert stack.attachments[0].peft_config() is None  # PEFT's one matrix cannot hold it
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    load(other, tmp_path / "a")
    assert torch.equal(run(other), run(model))


def _deberta() -> PreTrainedModel:
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_deberta, "its attention is not in the public registry"),
        (_t5, "cannot work on a model with an encoder and a decoder"),
        (_gemma2, "softcap"),
    ],
)
def test_a_model_it_cannot_work_on_is_refused_and_left_as_it_was(
    make: Callable[[], PreTrainedModel], reason: str
) -> None:
    model = make()
    before, attention = list(dict(model.named_modules())), model.config._attn_implementation
    with pytest.raises(StackError, match=reason):
        attach(model, ["lora", PREFIX])
    assert list(dict(model.named_modules())) == before
    assert model.config._attn_implementation == attention


def test_a_module_of_ones_own_is_refused() -> None:
    with pytest.raises(StackError, match="needs a transformers model, not Sequential"):
        attach(nn.Sequential(nn.Linear(2, 2)), [PREFIX])


def test_a_model_can_be_freed_after_a_prefix_was_on_it(fresh: Fresh) -> None:
    """Some registry that kept a layer would keep its weights on the card."""
    model = fresh("plain")
    attach(model, [PREFIX]).detach()
    layer = weakref.ref(model.get_submodule("model.layers.0.self_attn"))
    del model
    gc.collect()
    assert layer() is None


def test_it_occupies_positions() -> None:
    (prefix, lora) = build([PREFIX, "lora"])
    assert prefix.adapter.positions() == LENGTH
    assert lora.adapter.positions() == 0


@pytest.mark.parametrize(("config", "place"), [({"length": 0}, "length"), ({"init": "zeros"}, "init")])
def test_a_setting_outside_its_range_is_refused(config: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError, match=rf"adapters\[0\]\.prefix\.{place}: must be"):
        build([{"prefix": config}])
