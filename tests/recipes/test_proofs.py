import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from onegpu.adapters import ProofFailed, Stack, artefact, attach, load_base
from onegpu.adapters.fingerprints import fingerprint
from onegpu.recipes import Loaded, Outcome, training
from onegpu.recipes.proofs import Probe, Untrained, frozen_base, round_trip
from onegpu.recipes.training import Session

LORA = {"lora": {"rank": 4}}
Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]


@pytest.fixture
def stack(chat_base: Path) -> Stack:
    """LoRA on the tiny chat base."""
    return attach(load_base(str(chat_base), precision="fp32"), [LORA])


def _during_steps(monkeypatch: pytest.MonkeyPatch, do: Callable[[Session, dict[str, nn.Parameter]], None]) -> None:
    """Do something after the gradient of every step was computed."""
    real = training._accumulate

    def accumulate(s: Session, window: Any, trainable: dict[str, nn.Parameter]) -> tuple[float, float]:
        found = real(s, window, trainable)
        do(s, trainable)
        return found

    monkeypatch.setattr(training, "_accumulate", accumulate)


def _failure(run: Run, loaded: Loaded) -> str:
    with pytest.raises(ProofFailed) as caught:
        run(loaded)
    assert caught.value.exit_code == 4
    return str(caught.value)


# --- frozen base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5])
def test_a_frozen_tensor_that_changes_ends_the_run_and_is_named(
    at: int, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def touch(s: Session, trainable: dict[str, nn.Parameter]) -> None:
        if s.step + 1 == at:
            with torch.no_grad():
                s.model.get_parameter("model.layers.1.input_layernorm.weight")[3] += 1e-3

    _during_steps(monkeypatch, touch)
    told = _failure(run, chat_recipe(train={"steps": 6}))
    assert told == "the base should be frozen, and it changed: model.layers.1.input_layernorm.weight has other values"
    assert not (tmp_path / "out/adapter").exists()


def test_a_packed_tensor_that_changes_is_named(chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(s: Session, trainable: dict[str, nn.Parameter]) -> None:
        next(b for n, b in s.model.named_buffers() if n.endswith("packed.values"))[0] ^= 1

    _during_steps(monkeypatch, touch)
    assert "model.layers.0.self_attn.q_proj.weight has other values" in _failure(run, chat_recipe(["nf4", LORA]))


def test_a_base_that_is_declared_to_train_may_change(chat_base: Path) -> None:
    full = attach(load_base(str(chat_base), precision="fp32"), ["full"])
    before = fingerprint(full.model)
    with torch.no_grad():
        next(iter(full.trainable().values())).add_(1)
    frozen_base(full, before)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def infinite_base(chat_base: Path, tmp_path: Path) -> Path:
    """The tiny chat base with an infinite weight in layer 1."""
    folder = tmp_path / "infinite"
    shutil.copytree(chat_base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("evaluation", ["none", 0.2])
def test_an_infinite_weight_stops_the_first_step_and_its_module_is_named(
    evaluation: Any, infinite_base: Path, chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    told = _failure(run, chat_recipe(base=infinite_base, task={"evaluation": evaluation}))
    assert "model.layers.1.mlp.down_proj" in told
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line for line in lines if line["step"] > 0] == []
    assert not (tmp_path / "out/adapter").exists()


def test_an_infinite_gradient_stops_the_run_and_its_tensor_is_named(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.v_proj.lora_B.lora"

    def spoil(s: Session, trainable: dict[str, nn.Parameter]) -> None:
        grad = trainable[name].grad
        if s.step == 1 and grad is not None:
            grad[0, 0] = float("inf")

    _during_steps(monkeypatch, spoil)
    assert _failure(run, chat_recipe(train={"steps": 5})) == f"step 2: the gradient of {name} is not finite"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("evaluation", ["none", 0.2])
def test_a_run_that_diverges_is_a_failed_proof_wherever_it_is_noticed(
    steps: int, evaluation: Any, chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    train = {"steps": steps, "optimizer": "sgd", "learning_rate": 1e30, "clip": None, "schedule": "constant"}
    _failure(run, chat_recipe(task={"evaluation": evaluation}, train=train))
    assert not (tmp_path / "out/adapter").exists()


# --- round trip -------------------------------------------------------------------------------------------------------


def _tampering(monkeypatch: pytest.MonkeyPatch, tamper: Callable[[Path], None]) -> None:
    """Change what was saved before it is proved."""
    real = artefact.save

    def save(stack: Any, folder: Any, **options: Any) -> None:
        real(stack, folder, **options)
        tamper(Path(folder) / "adapter_model.safetensors")

    monkeypatch.setattr(artefact, "save", save)


def _other_value(path: Path) -> None:
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})


def _missing_key(path: Path) -> None:
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _half_a_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("tamper", [_other_value, _missing_key, _half_a_file, Path.unlink])
def test_what_was_saved_wrongly_is_kept_aside_and_named(
    tamper: Callable[[Path], None], chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _tampering(monkeypatch, tamper)
    told = _failure(run, chat_recipe(train={"checkpoint_every": None}))
    aside = tmp_path / "out/adapter-unproved"
    assert told.endswith(f"(kept aside as {aside})")
    assert (aside / "manifest.json").is_file()
    assert not (tmp_path / "out/adapter").exists()


def test_what_no_token_of_the_probe_uses_is_read_back_too(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def zeroed(path: Path) -> None:
        path = path.parent / "trainable-tokens" / path.name
        save_file(
            {key: torch.zeros_like(rows) for key, rows in load_file(path).items()}, path, metadata={"format": "pt"}
        )

    _tampering(monkeypatch, zeroed)
    stack = [{"lora": {"rank": 4}}, {"trainable-tokens": {"tokens": ["~"]}}]
    told = _failure(run, chat_recipe(stack, train={"checkpoint_every": None}))
    assert "was not written as it is" in told
    assert told.endswith(f"(kept aside as {tmp_path / 'out/adapter-unproved'})")


def test_the_measured_error_of_the_round_trip_is_in_the_manifest(chat_recipe: Recipe, run: Run) -> None:
    outcome = run(chat_recipe())
    probe = json.loads((outcome.adapter / "manifest.json").read_text("utf-8"))["run"]["probe"]
    assert probe["round_trip_error"] == outcome.round_trip_error == 0.0
    assert len(probe["logits"]) == len(probe["top"]) == 8
    assert probe["logits"] == sorted(probe["logits"], reverse=True)


@pytest.mark.parametrize("change", [1e-2, float("nan"), float("inf")])
def test_a_model_with_other_logits_is_another_model(stack: Stack, change: float) -> None:
    probe = Probe.of(stack.model, {"input_ids": [0, 5, 9, 1]})
    assert round_trip(probe, stack.model) == 0.0
    with torch.no_grad():
        stack.model.get_parameter("model.norm.weight").mul_(1 + change)
    with pytest.raises(ProofFailed, match="gives other logits"):
        round_trip(probe, stack.model)


def test_probing_leaves_the_modes_of_the_modules_alone(stack: Stack) -> None:
    stack.model.train()
    stack.model.get_submodule("model.layers.0").eval()
    modes = [module.training for module in stack.model.modules()]
    Probe.of(stack.model, {"input_ids": [0, 5, 9, 1]})
    assert [module.training for module in stack.model.modules()] == modes


def test_a_base_that_was_only_rounded_or_stored_otherwise_has_changed(chat_base: Path) -> None:
    stack = attach(load_base(str(chat_base), precision="fp32"), ["lora"])
    before = fingerprint(stack.root)
    frozen_base(stack, before)
    norm = stack.root.get_parameter("model.norm.weight")
    norm.data = norm.data.bfloat16()  # all ones: not a value of it is another
    with pytest.raises(ProofFailed, match=r"it changed: model\.norm\.weight"):
        frozen_base(stack, before)


@pytest.mark.parametrize("part", ["vera_A", "inv_freq"])
def test_what_nobody_trains_stays_bit_for_bit(part: str, chat_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = attach(load_base(str(chat_base), precision="fp32"), ["vera"])
    untrained = Untrained.of(stack)
    untrained.check(stack)
    tensor = next(t for n, t in stack.model.named_buffers() if part in n)
    with torch.no_grad():
        tensor.view(-1)[0] += 1e-6
    with pytest.raises(ProofFailed, match=f"{part}.* is trained by nobody, and it changed"):
        untrained.check(stack)
    names = frozenset(n for n, t in stack.model.named_buffers() if t is tensor or part in n)
    monkeypatch.setattr(type(stack.attachments[0]), "may_change", lambda self: names)
    untrained.check(stack)  # as its adapter declares


def test_what_changes_on_the_way_ends_the_run(
    chat_recipe: Callable[..., Loaded], run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = training._accumulate

    def spoilt(s: Any, window: Any, trainable: Any) -> Any:
        if s.step == 3:  # after the look at the first judged step
            next(t for n, t in s.stack.model.named_buffers() if "vera_A" in n).add_(1e-3)
        return real(s, window, trainable)

    monkeypatch.setattr(training, "_accumulate", spoilt)
    with pytest.raises(ProofFailed, match=r"vera_A.* is trained by nobody, and it changed"):
        run(chat_recipe(["vera"], train={"steps": 4}))
    assert not (tmp_path / "out/adapter").exists()
