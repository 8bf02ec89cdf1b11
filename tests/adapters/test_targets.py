from collections.abc import Callable

import pytest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from onegpu.adapters import TargetError, attach
from onegpu.adapters.targets import matches, resolve, shortest_names

Fresh = Callable[..., PreTrainedModel]


def _last(paths: dict[str, nn.Module]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["self_attn.q_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["model.layers.1.self_attn.q_proj"], {"model.layers.1.self_attn.q_proj"}),
        (["*.layers.1.*.[qv]_proj"], {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
        (["*.0.mlp.*_proj", "lm_head"], {*(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")), "lm_head"}),
    ],
)
def test_names_and_patterns_resolve_to_full_paths(llama: PreTrainedModel, targets: str, expected: set[str]) -> None:
    assert resolve(llama, targets).keys() == expected


def test_a_name_matches_at_a_dot_only() -> None:
    assert matches("layers.0.q_proj", "q_proj")
    assert not matches("layers.0.q_proj", "proj")
    assert not matches("layers.0.q_proj", "layers.0")
    assert not matches("layers.10.q_proj", "0.q_proj")


def test_targets_come_in_the_order_of_the_model(llama: PreTrainedModel) -> None:
    found = list(resolve(llama, ["down_proj", "q_proj"]))
    assert found[0] == "model.layers.0.self_attn.q_proj"


def test_all_linear_leaves_out_the_output_embeddings(llama: PreTrainedModel) -> None:
    found = resolve(llama, "all-linear")
    assert len(found) == 14
    assert "lm_head" not in found


def test_all_linear_leaves_out_classification_heads(fresh: Fresh) -> None:
    for name in ("bert", "roberta"):
        found = resolve(fresh(name), "all-linear")
        assert {"query", "key", "value", "dense"} <= _last(found)
        assert not [path for path in found if path.startswith("classifier")]


def test_one_matching_entry_does_not_excuse_another(llama: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match=r"target 'v_porj' matches no linear layer; did you mean 'v_proj'"):
        resolve(llama, ["q_proj", "v_porj"])


def test_every_entry_without_a_match_is_named(llama: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match=r"'v_porj'.*'\*\.layers\.9\.\*'"):
        resolve(llama, ["v_porj", "q_proj", "*.layers.9.*"])


@pytest.mark.parametrize(("target", "kind"), [("embed_tokens", "Embedding"), ("input_layernorm", "LlamaRMSNorm")])
def test_a_module_that_is_no_linear_is_said_to_be_none(llama: PreTrainedModel, target: str, kind: str) -> None:
    with pytest.raises(TargetError, match=f"target '{target}' matches {kind} modules, and only linear layers"):
        resolve(llama, target)


def test_tied_output_embeddings_are_refused(fresh: Fresh) -> None:
    with pytest.raises(TargetError, match=r"'lm_head' shares its weight with the input embeddings"):
        resolve(fresh("tied"), ["q_proj", "lm_head"])
    assert "lm_head" in resolve(fresh("plain"), "lm_head")


def _mixture() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


def test_all_linear_does_not_pass_over_fused_experts_in_silence() -> None:
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp\.experts\.\w+ \(2, \d+, \d+\) unadapted"):
        resolve(_mixture(), "all-linear")


def test_the_rest_of_a_mixture_can_be_named() -> None:
    assert _last(resolve(_mixture(), ["q_proj", "v_proj"])) == {"q_proj", "v_proj"}


def test_a_convolution_is_no_fused_expert() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 3), "proj": nn.Linear(2, 2)})
    assert resolve(model, "all-linear").keys() == {"proj"}


def test_targets_under_an_adapter_are_found_again(llama: PreTrainedModel) -> None:
    before = list(resolve(llama, "all-linear"))
    attach(llama, ["lora", "prefix"])
    assert list(resolve(llama, "all-linear")) == before


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["*.layers.1.*.q_proj"]])
def test_the_shortest_names_mean_exactly_what_was_chosen(llama: PreTrainedModel, targets: str) -> None:
    chosen = resolve(llama, targets)
    names = shortest_names(llama, list(chosen))
    assert resolve(llama, names).keys() == chosen.keys()
    assert len(names) <= len(chosen)


def test_names_that_would_mean_the_head_too_are_written_out(fresh: Fresh) -> None:
    """RoBERTa's head has a `dense` like the layers: the short name would adapt it as well."""
    model = fresh("roberta")
    chosen = resolve(model, "all-linear")
    assert shortest_names(model, list(chosen)) == sorted(chosen)


def test_heads_are_passed_over_by_any_name(fresh: Callable[..., PreTrainedModel]) -> None:
    # RoBERTa's head has a `dense` of its own; it is trained whole, and PEFT would give other logits beside an update.
    chosen = resolve(fresh("roberta"), ["dense"])
    assert chosen
    assert not [path for path in chosen if path.startswith("classifier")]


def test_a_target_that_lies_in_the_head_only_is_refused(bert: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match="'classifier' belongs to the head"):
        resolve(bert, ["query", "classifier"])
