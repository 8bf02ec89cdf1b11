"""11. Wrong targets: patterns that match nothing, half of the model missed.

Met: one entry that matches hides another that does not; a key of a pattern of ranks matches nothing; experts that are
one large parameter are passed over; a head is adapted that nobody can serve.

Here: every entry must match a linear or it is named with the nearest one, before weights are read; `all-linear` leaves
out heads and refuses to pass over fused experts; the resolved list is in the manifest.

Also: tests/adapters/test_targets.py, tests/recipes/test_running.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from onegpu.adapters import OnegpuError, TargetError, attach, save
from onegpu.recipes import Job, Loaded, preflight

Fresh = Callable[..., PreTrainedModel]
MIXTRAL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_an_entry_that_matches_nothing_is_named_with_the_nearest(
    recipe: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "load_base", lambda job: pytest.fail("weights were read"))
    with pytest.raises(TargetError, match="target 'v_porj' matches no linear layer; did you mean 'v_proj'"):
        preflight(recipe([{"lora": {"targets": ["q_proj", "v_porj"]}}]))


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ([{"lora": {"targets": ["*.layers.9.*"]}}], r"'\*\.layers\.9\.\*' matches no linear"),
        ([{"lora": {"targets": ["^q_proj"]}}], r"'\^q_proj' matches no linear"),
        ([{"lora": {"targets": ["embed_tokens"]}}], "'embed_tokens' matches Embedding modules"),
        ([{"peft-lora": {"targets": ["q_proj"], "alpha_pattern": {"^q_proj": 100}}}], r"'\^q_proj' matches none"),
        ([{"peft-lora": {"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}}], "'k_proj' matches none"),
        (["lora", {"layerwise-lr": {"overrides": {"*.k_porj.*": 2.0}}}], r"'\*\.k_porj\.\*' matches no trainable"),
    ],
    ids=str,
)
def test_no_pattern_is_without_effect(stack: list[Any], message: str, fresh: Fresh) -> None:
    with pytest.raises(OnegpuError, match=message):
        attach(fresh(), stack).rates()


def test_experts_that_are_one_parameter_are_not_passed_over_in_silence() -> None:
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    with pytest.raises(TargetError, match=r"all-linear would leave model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        attach(model, ["lora"])
    named = attach(model, [{"lora": {"targets": ["q_proj", "v_proj"]}}])
    assert len(named.trainable()) == 2 * 2 * 2


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_all_linear_leaves_out_the_head_and_is_written_down(variant: str, fresh: Fresh, tmp_path: Path) -> None:
    stack = attach(fresh(variant), ["lora"])
    save(stack, tmp_path / "adapter")
    manifest = json.loads((tmp_path / "adapter/manifest.json").read_text("utf-8"))
    assert sorted(manifest["adapters"][0]["resolved"]["targets"]) == LINEARS
    assert len(stack.trainable()) == 2 * 2 * len(LINEARS)


def test_a_pattern_that_matches_has_an_effect(fresh: Fresh) -> None:
    settings = {
        "targets": ["q_proj", "k_proj"],
        "r": 4,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
    }
    shapes = {n: p.shape[0] for n, p in attach(fresh(), [{"peft-lora": settings}]).trainable().items() if "lora_A" in n}
    ranks = {".".join(name.split(".")[2:5:2]): rank for name, rank in shapes.items()}
    assert ranks == {"0.q_proj": 4, "0.k_proj": 2, "1.q_proj": 3, "1.k_proj": 2}
