import json
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from onegpu.adapters import (
    ArtefactError,
    LoadOptions,
    OnegpuError,
    PluginError,
    Stack,
    StackError,
    artefact,
    attach,
    load,
    save,
)
from onegpu.adapters.artefact import confirm, fill, read
from onegpu.adapters.fingerprints import fingerprint
from onegpu.adapters.lora import LoRA
from onegpu.adapters.quantised import NF4

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]

TENSORS, CONFIG, MANIFEST, CARD = "adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PREFIX: dict[str, Any] = {"prefix": {"length": 4}}
TEXT_PREFIX: dict[str, Any] = {"prefix": {"length": 4, "text": "some text"}}

ROUND_TRIPS: list[tuple[str, list[str], list[Any]]] = [
    *(("plain", packing, specs) for packing in ([], ["nf4"]) for specs in (["lora"], [PREFIX], ["lora", PREFIX])),
    ("plain", [], ["full"]),
    ("plain", [], [{"lora": {"name": name, "rank": 2}} for name in ("a", "ab", "default")]),
    ("plain", ["int8"], ["lora", {"layerwise-lr": {"decay": 0.5}}]),
    ("tied", [], ["lora", PREFIX]),
    ("tied", [], ["full"]),
    ("wide-heads", [], ["lora", PREFIX]),
    ("gpt2", [], ["lora", PREFIX]),
    *(("bert", [], specs) for specs in ([], ["layerwise-lr"], ["lora"], [PREFIX], ["lora", PREFIX], ["full"])),
    ("bert", ["nf4"], ["lora"]),
    ("roberta", [], [PREFIX]),
]


@pytest.fixture
def saved(fresh: Fresh, noise: Noise, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA on the plain Llama: written once, and copied for each test to alter."""
    first = tmp_path_factory.getbasetemp() / "lora-on-plain"
    if not first.exists():
        stack = attach(fresh("plain"), ["lora"])
        noise(stack.trainable())
        save(stack, first, source="package:tiny/plain")
    return Path(shutil.copytree(first, tmp_path / "adapter"))


def _alter_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _alter_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _refused(model: nn.Module, folder: Path, message: str, error: type[OnegpuError] = ArtefactError) -> None:
    """Loading says why not, and leaves the model as it was."""
    names = list(dict(model.named_modules()))
    with pytest.raises(error, match=message):
        load(model, folder)
    assert list(dict(model.named_modules())) == names


# --- round trips


@pytest.mark.parametrize(("name", "packing", "specs"), ROUND_TRIPS, ids=str)
def test_what_was_saved_is_what_is_loaded(
    fresh: Fresh, run: Run, noise: Noise, tmp_path: Path, name: str, packing: list[str], specs: list[Any]
) -> None:
    model = fresh(name, *packing)
    untouched = run(model)
    stack = attach(model, [*packing, *specs])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    other = fresh(name, *packing)
    loaded = load(other, tmp_path / "adapter")
    assert torch.equal(run(other), run(model))
    assert not torch.equal(run(other), untouched)
    assert loaded.trainable().keys() == stack.trainable().keys()
    for key, parameter in loaded.trainable().items():
        assert torch.equal(parameter, stack.trainable()[key])
        assert parameter.requires_grad
    assert [n.name for n in loaded.named] == [n.name for n in stack.named]
    assert loaded.rates() == stack.rates()


def test_it_loads_in_a_fresh_process(
    fresh: Fresh, run: Run, noise: Noise, tiny: dict[str, Path], tmp_path: Path, ids: Tensor
) -> None:
    model = fresh("plain", "nf4")
    stack = attach(model, ["nf4", "lora", PREFIX])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    save_file({"ids": ids, "expected": run(model)}, tmp_path / "probe.safetensors")
    program = f"""
import torch
from safetensors.torch import load_file
from onegpu.adapters import load, load_base
torch.set_num_threads(1)
model = load_base({str(tiny["plain"])!r}, ["nf4"], precision="fp32")
load(model, {str(tmp_path / "adapter")!r})
probe = load_file({str(tmp_path / "probe.safetensors")!r})
with torch.no_grad():
    print(torch.equal(model(input_ids=probe["ids"]).logits, probe["expected"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert done.stderr == ""


def test_a_compiled_model_is_saved_under_the_same_keys(
    fresh: Fresh, run: Run, noise: Noise, tmp_path: Path, saved: Path
) -> None:
    model = fresh("plain")
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled), run(model), atol=1e-6, rtol=0)
    save(stack, tmp_path / "compiled", source="package:tiny/plain")
    assert _files(tmp_path / "compiled") == _files(saved)


def test_a_prefix_from_a_text_loads_without_a_tokenizer(fresh: Fresh, run: Run, noise: Noise, tmp_path: Path) -> None:
    model, other = fresh("plain"), fresh("plain")
    stack = attach(model, [TEXT_PREFIX], tokenizer=lambda text, add_special_tokens: {"input_ids": [5, 6, 7]})
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    load(other, tmp_path / "adapter")
    assert torch.equal(run(other), run(model))


def test_a_loaded_adapter_can_be_trained_on(
    fresh: Fresh, saved: Path, run: Run, train: Callable[[Stack], None], tmp_path: Path
) -> None:
    model, other = fresh("plain"), fresh("plain")
    stack = load(model, saved)
    before = run(model)
    train(stack)
    assert not torch.equal(run(model), before)
    save(stack, tmp_path / "again")
    load(other, tmp_path / "again")
    assert torch.equal(run(other), run(model))


def test_values_can_be_filled_into_an_attached_stack(fresh: Fresh, saved: Path, run: Run) -> None:
    model, other = fresh("plain"), fresh("plain")
    load(model, saved)
    stack = attach(other, ["lora"])
    fill(stack, saved)
    assert torch.equal(run(other), run(model))


def test_a_folder_that_does_not_fit_leaves_an_attached_stack_as_it_was(fresh: Fresh, saved: Path, run: Run) -> None:
    model = fresh("plain")
    stack = attach(model, [{"lora": {"rank": 3}}])
    before = run(model)
    with pytest.raises(ArtefactError, match="does not fit this model"):
        fill(stack, saved)
    assert torch.equal(run(model), before)


# --- what is written


def test_a_folder_holds_four_files_and_nothing_else(saved: Path) -> None:
    assert _files(saved).keys() == {TENSORS, CONFIG, MANIFEST, CARD}


def test_several_adapters_get_a_folder_each_under_one_manifest(fresh: Fresh, tmp_path: Path) -> None:
    stack = attach(fresh("bert"), ["lora", PREFIX, "layerwise-lr"])
    save(stack, tmp_path / "adapter")
    assert _files(tmp_path / "adapter").keys() == {
        MANIFEST,
        CARD,
        *(f"{name}/{file}" for name in ("lora", "prefix") for file in (TENSORS, CONFIG)),
    }
    heads = [
        f for f in ("lora", "prefix") if any("classifier" in k for k in load_file(tmp_path / "adapter" / f / TENSORS))
    ]
    assert heads == ["lora"]  # once, with the first


def test_the_metadata_of_tensors_is_one_key_so_that_bytes_repeat(saved: Path) -> None:
    with safe_open(saved / TENSORS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("specs", [["lora"], ["lora", PREFIX]], ids=["one", "two"])
def test_two_saves_give_the_same_bytes(fresh: Fresh, noise: Noise, tmp_path: Path, specs: list[Any]) -> None:
    for name in ("first", "second"):
        stack = attach(fresh("bert"), specs, seed=3)
        noise(stack.trainable())
        save(stack, tmp_path / name, run={"seed": 3, "metrics": {"b": 1.5, "a": 2}})
    assert _files(tmp_path / "first") == _files(tmp_path / "second")


def test_trained_tensors_are_saved_in_float32_over_a_bf16_base(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh("bert", precision="bf16"), ["lora"]), tmp_path / "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / TENSORS).values()} == {torch.float32}


def test_the_manifest_says_what_the_adapter_is_and_belongs_to(fresh: Fresh, tmp_path: Path) -> None:
    stack = attach(fresh("bert", "nf4"), ["nf4", {"lora": {"targets": ["query"]}}])
    save(stack, tmp_path / "a", source="hub/name", revision="abc", run={"seed": 5})
    manifest = read(tmp_path / "a").manifest
    assert (manifest.base.source, manifest.base.revision) == ("hub/name", "abc")
    assert (manifest.base.model_class, manifest.base.packed_as) == ("BertForSequenceClassification", "nf4")
    assert manifest.base.fingerprint == fingerprint(fresh("bert", "nf4"))
    nf4, lora = manifest.adapters
    assert (nf4.adapter, nf4.folder, nf4.config) == ("nf4", None, {"double_quantisation": True})
    assert (lora.adapter, lora.distribution, lora.folder, lora.api) == ("lora", "onegpu", ".", 1)
    assert lora.resolved["targets"] == ["query"]
    assert manifest.heads == ["classifier.bias", "classifier.weight"]
    assert {"onegpu", "torch", "transformers"} <= manifest.versions.keys()
    assert manifest.run == {"seed": 5}


def test_pefts_configuration_names_only_what_differs_from_its_defaults(saved: Path) -> None:
    content = json.loads((saved / CONFIG).read_text())
    assert content == {
        "base_model_name_or_path": "package:tiny/plain",
        "inference_mode": True,
        "lora_alpha": 32.0,
        "peft_type": "LORA",
        "r": 16,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize(
    ("specs", "line"),
    [
        (["lora"], 'PeftModel.from_pretrained(base, "DIR")'),
        (["lora", PREFIX], 'PeftModel.from_pretrained(base, "DIR", subfolder="lora")'),
        ([], None),
    ],
)
def test_the_card_says_how_to_load_it(fresh: Fresh, tmp_path: Path, specs: list[Any], line: str | None) -> None:
    save(attach(fresh("bert"), specs), tmp_path / "a", source="some/base")
    card = (tmp_path / "a" / CARD).read_text()
    assert 'base = load_base("some/base")' in card
    assert ("PeftModel" in card) is (line is not None)
    assert line is None or line in card


# --- saving that must not happen


def test_something_trainable_that_nobody_owns_is_not_lost_in_silence(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh("plain")
    stack = attach(model, ["lora"])
    model.get_parameter("model.norm.weight").requires_grad_(True)
    with pytest.raises(ArtefactError, match=r"model\.norm\.weight is trainable but belongs to no adapter"):
        save(stack, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_class_that_nobody_could_load_again_is_refused(fresh: Fresh, tmp_path: Path) -> None:
    class Mine(LoRA):
        """Registered by no distribution."""

    with pytest.raises(ArtefactError, match="mine: Mine is registered by no distribution"):
        save(attach(fresh("plain"), [Mine()]), tmp_path / "adapter")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["save_file", "write_json", "write_text"])
def test_a_save_that_fails_leaves_the_old_folder_whole(
    fresh: Fresh, saved: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    before = _files(saved.parent)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(artefact, step, fail)
    with pytest.raises(error):
        save(attach(fresh("plain"), ["lora"], seed=9), saved)
    assert _files(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_saving_and_loading_need_no_network(fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*args: object, **kwargs: object) -> None:
        raise AssertionError("somebody asked the network")

    model, other = fresh("plain"), fresh("plain")
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    stack = attach(model, ["lora"])
    save(stack, tmp_path / "adapter", source="someone/model")
    assert load(other, tmp_path / "adapter").trainable().keys() == stack.trainable().keys()


# --- damaged or altered folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({A_KEY.replace("q_proj", "q_prj"): t.pop(A_KEY)}),
            rf"{A_KEY} is missing; .*q_prj\.lora_A\.weight is not expected; did you mean '.*q_proj\.lora_A\.weight'",
        ),
        (lambda t: t.pop(A_KEY), f"{A_KEY} is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not expected"),
        (lambda t: t.update({A_KEY: t[A_KEY][:3].clone()}), rf"{A_KEY} is \(3, 32\) .* and \(16, 32\) .* is needed"),
        (lambda t: t.update({A_KEY: t[A_KEY].half()}), rf"{A_KEY} is .*float16, and .*float32 is needed"),
        (lambda t: t.clear(), r"is missing.*\(and 23 more\)"),
    ],
    ids=["renamed", "dropped", "added", "shape", "dtype", "emptied"],
)
def test_tensors_that_do_not_fit_are_named(
    fresh: Fresh, saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    _alter_tensors(saved, change)
    _refused(fresh("plain"), saved, message)


@pytest.mark.parametrize(
    ("specs", "file", "key"),
    [
        (["lora"], TENSORS, "base_model.model.classifier.weight"),
        ([], TENSORS, "base_model.model.classifier.bias"),
        ([PREFIX], TENSORS, "base_model.classifier.weight"),
        ([PREFIX], TENSORS, "prompt_embeddings"),
        (["lora", PREFIX], f"prefix/{TENSORS}", "prompt_embeddings"),
    ],
)
def test_heads_and_prefixes_are_checked_too(
    fresh: Fresh, tmp_path: Path, specs: list[Any], file: str, key: str
) -> None:
    save(attach(fresh("bert"), specs), tmp_path / "a")
    _alter_tensors((tmp_path / "a" / file).parent, lambda tensors: tensors.pop(key))
    model = fresh("bert")
    head = model.get_parameter("classifier.weight").detach().clone()
    _refused(model, tmp_path / "a", f"{key} is missing")
    assert torch.equal(model.get_parameter("classifier.weight"), head)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_tensors_are_damaged(fresh: Fresh, saved: Path, size: int) -> None:
    content = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(content[:size])
    _refused(fresh("plain"), saved, rf"{TENSORS} is damaged: ")


@pytest.mark.parametrize("file", [TENSORS, CONFIG])
def test_a_missing_file_is_named(fresh: Fresh, saved: Path, file: str) -> None:
    (saved / file).unlink()
    _refused(fresh("plain"), saved, f"{file} is missing")


@pytest.mark.parametrize("file", [MANIFEST, CONFIG])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_what_is_no_json_is_named(fresh: Fresh, saved: Path, file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    _refused(fresh("plain"), saved, f"{file} is not JSON")


def test_a_configuration_must_be_an_object(fresh: Fresh, saved: Path) -> None:
    (saved / CONFIG).write_text("[]")
    _refused(fresh("plain"), saved, "must hold one JSON object")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("base"), "base: this key is needed"),
        (lambda m: m.update(code="os.system"), "code: unknown key"),
        (lambda m: m.update(format=2), "format: must be 1, not 2"),
        (lambda m: m["adapters"][0].update(import_path="os"), "import_path: unknown key"),
        (lambda m: m.clear(), r"base: this key is needed; adapters: this key is needed"),
    ],
)
def test_a_manifest_is_read_strictly(
    fresh: Fresh, saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _alter_json(saved / MANIFEST, change)
    _refused(fresh("plain"), saved, message)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_idle_key_of_another_version_does_no_harm(fresh: Fresh, saved: Path, value: Any) -> None:
    _alter_json(saved / CONFIG, lambda config: config.update(new_key=value))
    assert load(fresh("plain"), saved).trainable()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_newthing", True),
        ("use_dora", True),
        ("r", 8),
        ("target_modules", ["q_proj"]),
        ("use_rslora", True),
        ("auto_mapping", {"parent_library": "os", "base_model_class": "system"}),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
    ],
)
def test_an_active_key_that_we_would_not_follow_is_refused(fresh: Fresh, saved: Path, key: str, value: Any) -> None:
    _alter_json(saved / CONFIG, lambda config: config.update({key: value}))
    _refused(fresh("plain"), saved, f"{CONFIG} says {key}: ")


@pytest.mark.parametrize(("key", "value"), [("use_rslora", False), ("r", None), ("peft_type", "")])
def test_a_key_of_ours_that_was_switched_off_is_noticed(fresh: Fresh, tmp_path: Path, key: str, value: Any) -> None:
    save(attach(fresh("plain"), [{"lora": {"rank_stabilised": True}}]), tmp_path / "a")
    _alter_json(tmp_path / "a" / CONFIG, lambda config: config.update({key: value}))
    _refused(fresh("plain"), tmp_path / "a", f"{CONFIG} says {key}: {value!r}, the manifest ")
    _alter_json(tmp_path / "a" / CONFIG, lambda config: config.pop(key))
    _refused(fresh("plain"), tmp_path / "a", f"{CONFIG} says {key}: None, the manifest ")


def test_a_setting_changed_in_the_manifest_only_is_noticed(fresh: Fresh, saved: Path) -> None:
    _alter_json(saved / MANIFEST, lambda manifest: manifest["adapters"][0]["config"].update(alpha=1.0))
    _refused(fresh("plain"), saved, f"{CONFIG} says lora_alpha: 32.0, the manifest 1.0")


@pytest.mark.parametrize("folder", ["../other", "/tmp", "sub/../../other", ".."])
def test_a_manifest_cannot_point_outside_its_folder(fresh: Fresh, saved: Path, folder: str) -> None:
    _alter_json(saved / MANIFEST, lambda manifest: manifest["adapters"][0].update(folder=folder))
    _refused(fresh("plain"), saved, "lies outside the artefact")


# --- nothing in a folder is executed


class Marker:
    """Unpickling one would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_pickles_are_neither_read_nor_executed(fresh: Fresh, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickles = {saved / name for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth")}
    for file in pickles:
        file.write_bytes(pickle.dumps(Marker(marker)))
    pickle.loads((saved / "optimizer.pt").read_bytes())
    assert marker.exists()  # the trap works
    marker.unlink()
    assert load(fresh("plain"), saved).trainable()
    (saved / TENSORS).unlink()
    _refused(fresh("plain"), saved, f"{TENSORS} is missing")
    (saved / MANIFEST).unlink()
    _refused(fresh("plain"), saved, "adapter_model.bin and adapter_config.json, which another program wrote")
    assert not marker.exists()


@pytest.mark.parametrize("content", [[], ["adapter_model.bin"], [CONFIG]])
def test_a_folder_of_another_program_is_no_adapter_folder(fresh: Fresh, tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).write_text("{}")
    _refused(fresh("plain"), tmp_path, "is not an adapter folder: it has no manifest.json")


@pytest.mark.parametrize(
    ("adapter", "distribution"), [("hostile:Thing", "onegpu"), ("Thing", "hostile"), ("hostile", "hostile")]
)
def test_a_manifest_can_name_no_code(
    fresh: Fresh, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, distribution: str
) -> None:
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    record = {"adapter": adapter, "distribution": distribution}
    _alter_json(saved / MANIFEST, lambda manifest: manifest["adapters"][0].update(record))
    _refused(fresh("plain"), saved, "needs the plugin", PluginError)
    assert "hostile" not in sys.modules


def test_a_missing_plugin_is_named_with_its_distribution_and_version(fresh: Fresh, saved: Path) -> None:
    record = {"adapter": "toy", "distribution": "toy-adapters", "version": "1.2"}
    _alter_json(saved / MANIFEST, lambda manifest: manifest["adapters"][0].update(record))
    message = "needs the plugin toy-adapters 1.2 for 'toy'; try `pip install 'toy-adapters>=1.2'`"
    _refused(fresh("plain"), saved, message, PluginError)


# --- the base


def _perturbed(model: PreTrainedModel, name: str = "model.embed_tokens.weight") -> PreTrainedModel:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[100] += 0.01
    return model


def test_another_base_is_refused_and_named(fresh: Fresh, saved: Path) -> None:
    message = r"was trained on package:tiny/plain, .*model\.norm\.weight has other values.*allow_base_mismatch=True"
    with torch.no_grad():
        other = fresh("plain")
        other.get_parameter("model.norm.weight")[0] += 0.01
    _refused(other, saved, message)


def test_a_linear_under_the_adapter_is_compared_too(fresh: Fresh, saved: Path) -> None:
    _refused(_perturbed(fresh("plain"), "model.layers.0.mlp.up_proj.weight"), saved, "up_proj.weight has other values")


def test_another_configuration_or_architecture_is_refused(fresh: Fresh, saved: Path) -> None:
    model = fresh("plain")
    model.config.rms_norm_eps = 1e-3
    _refused(model, saved, "its configuration differs")
    _refused(fresh("wide-heads"), saved, r"its configuration differs; .* \(and \d+ more\)")
    _refused(fresh("bert"), saved, "this model is another")


def test_the_bare_backbone_is_refused_even_when_the_mismatch_is_allowed(fresh: Fresh, saved: Path) -> None:
    _refused(fresh("plain").base_model, saved, r"it lacks lm_head\.weight; it lacks model\.embed_tokens\.weight")
    with pytest.raises(ArtefactError, match=r"base_model\.model\.model\.layers.* did you mean '.*'|is missing"):
        load(fresh("plain").base_model, saved, allow_base_mismatch=True)


def test_a_mismatch_can_be_allowed(fresh: Fresh, saved: Path) -> None:
    assert load(_perturbed(fresh("plain")), saved, allow_base_mismatch=True).trainable()


@pytest.mark.parametrize(
    ("trained", "used"),
    [
        ({}, {"precision": "bf16"}),
        ({"precision": "bf16"}, {}),
        ({"packing": ["nf4"]}, {}),
        ({}, {"packing": ["nf4"]}),
        ({"packing": ["nf4"]}, {"packing": ["int8"]}),
    ],
    ids=str,
)
def test_the_same_base_stored_otherwise_is_accepted_and_another_is_not(
    fresh: Fresh, run: Run, noise: Noise, tmp_path: Path, trained: dict[str, Any], used: dict[str, Any]
) -> None:
    def base(packing: list[str] | None = None, precision: str = "fp32") -> PreTrainedModel:
        return fresh("plain", *(packing or []), precision=precision)

    stack = attach(base(**trained), [*trained.get("packing", []), "lora"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    model = base(**used)
    before = run(model)
    loaded = load(model, tmp_path / "adapter")
    assert not torch.equal(run(model), before)
    assert all(torch.equal(p, stack.trainable()[name]) for name, p in loaded.trainable().items())
    _refused(_perturbed(base(**used)), tmp_path / "adapter", "embed_tokens.weight has other values")


def test_a_base_of_which_nothing_can_be_compared_is_refused(tmp_path: Path) -> None:
    """One linear, float when the adapter was trained and packed now: any other would look the same."""
    stack = attach(nn.Sequential(nn.Linear(64, 64, bias=False)), ["lora"])
    save(stack, tmp_path / "a", source="mine")
    packers: Any = bnb.nn
    packed = nn.Sequential(packers.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"))
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    (adopt,) = NF4().load_options(options, ()).after_load
    adopt(packed)
    _refused(packed, tmp_path / "a", "no tensor of it could be compared")


def test_that_packed_linears_cannot_be_compared_is_said(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh("plain", "nf4"), ["nf4", "lora"]), tmp_path / "a")
    with pytest.warns(
        UserWarning, match="packed as nf4, and this one is int8: 14 packed linears could not be compared"
    ):
        load(fresh("plain", "int8"), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(fresh("plain", "nf4"), tmp_path / "a")


def test_a_trained_base_belongs_to_the_base_it_was_before(fresh: Fresh, noise: Noise, tmp_path: Path) -> None:
    stack = attach(fresh("plain"), ["full"])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    assert read(tmp_path / "a").manifest.base.fingerprint == fingerprint(fresh("plain"))
    _refused(stack.model, tmp_path / "a", "'full' is attached|this model is another", OnegpuError)


def test_loading_twice_on_one_model_is_refused(fresh: Fresh, saved: Path) -> None:
    model = fresh("plain")
    load(model, saved)
    with pytest.raises(StackError, match="'lora' is attached to this model already"):
        load(model, saved)


def test_what_was_written_is_confirmed_against_what_is_live(
    llama: PreTrainedModel, noise: Noise, tmp_path: Path
) -> None:
    stack = attach(llama, ["lora"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    confirm(stack, tmp_path / "adapter")
    with torch.no_grad():
        next(iter(stack.trainable().values())).add_(1)
    with pytest.raises(ArtefactError, match="was not written as it is"):
        confirm(stack, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda tensors: tensors.pop(min(tensors)), "is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more is not expected"),
        (lambda tensors: tensors.update({min(tensors): torch.zeros(1)}), r"is \(1,\) torch.float32, and"),
        (lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].half()}), "torch.float16, and"),
    ],
)
def test_what_was_written_with_other_keys_or_shapes_is_named(
    spoil: Callable[[dict[str, Tensor]], Any], told: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    stack = attach(llama, ["lora"])
    save(stack, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=rf"was not written as it is: .*{told}"):
        confirm(stack, tmp_path / "adapter")


def test_the_path_of_the_base_may_be_edited_for_peft(llama: PreTrainedModel, tmp_path: Path) -> None:
    stack = attach(llama, ["lora"])
    save(stack, tmp_path / "adapter")
    stack.detach()
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}))
    load(llama, tmp_path / "adapter")
