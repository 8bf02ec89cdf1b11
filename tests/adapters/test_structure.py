from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from onegpu.adapters import attach
from onegpu.adapters.structure import (
    Addition,
    Layers,
    Wrapper,
    head_modules,
    linear_shape,
    linears,
    modules,
    output_embeddings,
    swap,
    unwrap,
    weight,
)

Fresh = Callable[..., PreTrainedModel]

LLAMA_LINEARS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def _llama_classifier() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def test_linears_are_found_by_path_in_the_order_of_the_model(llama: PreTrainedModel) -> None:
    inside = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LLAMA_LINEARS]
    assert list(linears(llama)) == [*inside, "lm_head"]


def test_gpt2s_transposed_linears_count_too(fresh: Fresh) -> None:
    model = fresh("gpt2")
    found = linears(model)
    assert linear_shape(found["transformer.h.0.attn.c_attn"]) == (32, 96)
    assert weight(found["transformer.h.0.attn.c_attn"]).shape == (32, 96)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (3, 5)),
        (Conv1D(5, 3), (3, 5)),
        (Wrapper(Wrapper(nn.Linear(3, 5))), (3, 5)),
        (nn.Embedding(3, 5), None),
        (nn.Conv1d(3, 5, 1), None),
    ],
)
def test_the_shape_of_a_linear_is_inputs_then_outputs(module: nn.Module, shape: tuple[int, int] | None) -> None:
    assert linear_shape(module) == shape


def test_a_packed_linear_has_the_shape_of_the_float_one(fresh: Fresh) -> None:
    packed, floating = linears(fresh("plain", "nf4")), linears(fresh("plain"))
    assert {p: linear_shape(m) for p, m in packed.items()} == {p: linear_shape(m) for p, m in floating.items()}


def test_names_stay_those_of_the_base_whatever_is_attached(llama: PreTrainedModel) -> None:
    before = list(dict(modules(llama)))
    attach(llama, ["lora", {"lora": {"name": "second", "targets": ["q_proj"]}}, "prefix"])
    assert list(dict(modules(llama))) == before
    assert any(isinstance(module, Addition) for module in llama.modules())


def test_a_wrapper_is_looked_through_to_the_bases_own_module() -> None:
    base = nn.Linear(2, 2)
    assert unwrap(Wrapper(Wrapper(base))) is base
    assert unwrap(base) is base


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapper_is_in_the_mode_of_what_it_wraps(training: bool) -> None:
    assert Wrapper(nn.Linear(2, 2).train(training)).training is training


def test_a_swap_reaches_every_place_of_a_shared_module() -> None:
    shared, new = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    swap(model, {shared: new})
    assert model["a"] is new
    assert model["b"].get_submodule("0") is new


@pytest.mark.parametrize(
    ("name", "heads", "output"),
    [
        ("plain", (), "lm_head"),
        ("tied", (), "lm_head"),
        ("gpt2", (), "lm_head"),
        ("bert", ("classifier",), None),
        ("roberta", ("classifier",), None),
    ],
)
def test_heads_and_output_embeddings_are_told_from_the_backbone(
    fresh: Fresh, name: str, heads: tuple[str, ...], output: str | None
) -> None:
    model = fresh(name)
    assert head_modules(model) == heads
    assert output_embeddings(model) == output


def test_a_llama_classifier_has_one_head() -> None:
    assert head_modules(_llama_classifier()) == ("score",)


def test_a_model_that_is_no_transformers_model_or_a_bare_backbone_has_no_head(bert: PreTrainedModel) -> None:
    assert head_modules(nn.Sequential(nn.Linear(2, 2))) == ()
    assert output_embeddings(nn.Sequential(nn.Linear(2, 2))) is None
    assert head_modules(bert.base_model) == ()


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        (
            "plain",
            {
                "model.embed_tokens.weight": 0,
                "model.layers.0.self_attn.q_proj.weight": 1,
                "model.layers.1.mlp.down_proj.weight": 2,
                "model.norm.weight": 3,
                "lm_head.weight": 3,
            },
        ),
        (
            "bert",
            {
                "bert.embeddings.position_embeddings.weight": 0,
                "bert.embeddings.LayerNorm.weight": 0,
                "bert.encoder.layer.0.output.dense.bias": 1,
                "bert.encoder.layer.1.output.dense.bias": 2,
                "bert.pooler.dense.weight": 3,
                "classifier.weight": 3,
            },
        ),
        (
            "gpt2",
            {
                "transformer.wte.weight": 0,
                "transformer.wpe.weight": 0,
                "transformer.h.0.attn.c_attn.weight": 1,
                "transformer.h.1.ln_1.weight": 2,
                "transformer.ln_f.weight": 3,
            },
        ),
    ],
)
def test_depth_rises_from_the_embeddings_to_the_head(fresh: Fresh, name: str, depths: dict[str, int]) -> None:
    model = fresh(name)
    layers = Layers.of(model)
    assert layers.count == 2
    assert depths.keys() <= dict(model.named_parameters()).keys()
    assert {tensor: layers.depth(tensor) for tensor in depths} == depths


def test_an_encoder_comes_before_its_decoder() -> None:
    model = _t5()
    layers = Layers.of(model)
    assert layers.count == 4
    assert [layers.depth(f"{side}.block.{i}.x") for side in ("encoder", "decoder") for i in (0, 1)] == [1, 2, 3, 4]
    assert layers.depth("shared.weight") == 0
    assert layers.depth("decoder.final_layer_norm.weight") == 5


def test_layers_are_the_same_under_adapters(llama: PreTrainedModel) -> None:
    before = Layers.of(llama)
    attach(llama, ["lora", "prefix"])
    assert Layers.of(llama) == before


def test_ten_layers_are_ordered_by_number() -> None:
    layers = Layers((("layers", 12),), ())
    assert [layers.depth(f"layers.{i}.weight") for i in (1, 2, 10, 11)] == [2, 3, 11, 12]


def test_a_module_without_layers_is_all_head() -> None:
    layers = Layers.of(nn.Sequential(nn.Linear(2, 2)))
    assert layers.count == 0
    assert layers.depth("0.weight") == 1


def test_the_weight_of_a_wrapped_linear_is_the_bases_own() -> None:
    base = nn.Linear(2, 3)
    assert weight(Wrapper(base)) is base.weight
    assert weight(base).dtype is torch.float32
