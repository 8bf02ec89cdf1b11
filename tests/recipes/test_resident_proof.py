import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from onegpu.adapters import ProofFailed, artefact
from onegpu.adapters.artefact import attach_saved
from onegpu.adapters.files import damage
from onegpu.recipes import Loaded, Outcome, checkpoints, training
from onegpu.recipes.checkpoints import write_checkpoint
from onegpu.recipes.resident_proof import ResidentProof

LORA = {"lora": {"rank": 4, "dropout": 0.1}}
EVERY = {"steps": 4, "checkpoint_every": 2}

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the proofs of the checkpoints come to, as they are made."""
    found: list[Any] = []
    real = ResidentProof.__call__

    def prove(self: ResidentProof, folder: Path) -> float | None:
        error = real(self, folder)
        found.append(error)
        return error

    monkeypatch.setattr(ResidentProof, "__call__", prove)
    return found


@pytest.mark.parametrize(
    "stack", [[LORA], ["nf4", LORA, {"prefix": {"length": 3}}], [{"ia3": {"targets": ["k_proj"]}}]], ids=str
)
def test_each_checkpoint_gives_the_logits_of_the_live_model(
    stack: list[Any], chat_recipe: Recipe, run: Run, proofs: list[Any]
) -> None:
    run(chat_recipe(stack, train=EVERY))
    assert proofs == [0, 0]


def test_a_head_is_proved_too(class_recipe: Recipe, run: Run, proofs: list[Any]) -> None:
    run(class_recipe(train=EVERY))
    assert proofs == [0, 0]


def test_where_the_base_is_trained_only_the_bytes_are_compared(
    chat_recipe: Recipe, run: Run, proofs: list[Any]
) -> None:
    run(chat_recipe(["full"], train=EVERY))
    assert proofs == [None, None]


def _spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Change what is saved at step 4."""
    real = write_checkpoint

    def write(folder: Path, **live: Any) -> None:
        real(folder, **live)
        if live["progress"]["step"] == 4:
            change(folder / "adapter")

    monkeypatch.setattr(training, "write_checkpoint", write)


def _another_value(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def _another_setting(adapter: Path) -> None:
    """The bytes of the tensors are right, and what they are scaled by is not."""
    for name, key in (("manifest.json", "alpha"), ("adapter_config.json", "lora_alpha")):
        path = adapter / name
        content = json.loads(path.read_text("utf-8"))
        (content["adapters"][0]["config"] if name == "manifest.json" else content)[key] = 64
        path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("change", "told"),
    [(_another_value, "was not written as it is"), (_another_setting, "gives other logits")],
    ids=["bytes", "settings"],
)
def test_a_checkpoint_that_is_not_what_was_trained_is_kept_aside_and_not_resumed_from(
    change: Callable[[Path], None],
    told: str,
    chat_recipe: Recipe,
    run: Run,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded = chat_recipe([LORA], train=EVERY | {"steps": 6})
    with monkeypatch.context() as patch:
        _spoil(patch, change)
        with pytest.raises(ProofFailed, match=rf"step 4: .*{told}.*kept aside as .*unproved-000004") as caught:
            run(loaded)
    assert caught.value.exit_code == 4
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"step-000002", "unproved-000004"}
    assert not (tmp_path / "out/adapter").exists()
    assert folder_bytes(run(loaded, resume=True).adapter) == folder_bytes(run(loaded, "straight").adapter)
    assert {path.name for path in (tmp_path / "out/checkpoints").iterdir()} == {"step-000004", "step-000006"}


def _bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random.safetensors"])
@pytest.mark.parametrize("spoil", [_bit, _half])
def test_tensors_that_read_back_wrong_are_kept_aside_and_not_resumed_from(
    name: str,
    spoil: Callable[[Path], None],
    chat_recipe: Recipe,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    real: Any = vars(checkpoints)["save_file"]

    def save(tensors: Any, path: Path, **options: Any) -> None:
        real(tensors, path, **options)
        if path.name == name:
            spoil(path)

    monkeypatch.setattr(checkpoints, "save_file", save)
    told = rf"step 2: {name}.* was not written as it is.*kept aside as .*unproved-000002"
    with pytest.raises(ProofFailed, match=told) as caught:
        run(chat_recipe([LORA], train=EVERY))
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["unproved-000002"]


def test_the_proof_changes_neither_the_model_nor_random_numbers(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = ResidentProof.__call__

    def state(proof: ResidentProof) -> list[Any]:
        modes = [module.training for module in proof.stack.model.modules()]
        values = [p.detach().clone().tolist() for p in proof.stack.trainable().values()]
        return [modes, values, torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]

    def drawing(*args: Any, **options: Any) -> Any:
        torch.rand(1), random.random(), numpy.random.rand()  # as somebody's adapter may
        return attach_saved(*args, **options)

    def prove(self: ResidentProof, folder: Path) -> float | None:
        before = state(self)
        found = real(self, folder)
        seen.append(state(self) == before)
        return found

    monkeypatch.setattr(ResidentProof, "__call__", prove)
    monkeypatch.setattr("onegpu.recipes.resident_proof.attach_saved", drawing)
    run(chat_recipe([LORA, {"prefix": {"length": 3}}], train=EVERY))
    assert seen == [True, True]


def test_no_weight_of_the_base_is_copied_or_read_again(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = ResidentProof.__call__

    def prove(self: ResidentProof, folder: Path) -> float | None:
        assert self.untouched is not None
        own = {p.data_ptr() for p in self.stack.root.parameters()}
        sizes.append({p.data_ptr() in own for p in self.untouched.parameters()})
        return real(self, folder)

    monkeypatch.setattr(ResidentProof, "__call__", prove)
    run(chat_recipe(["nf4", LORA], train=EVERY))
    assert sizes == [{True}, {True}]


@pytest.mark.parametrize(
    "stack", [[LORA], [{"peft-lora": {"r": 2}}], ["lora", {"trainable-tokens": {"tokens": [5]}}]], ids=str
)
def test_saving_asks_no_network(
    stack: list[Any], chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def refuse(*args: Any, **options: Any) -> None:
        asked.append(args)
        raise OSError("no network here")

    real = artefact.save

    def save(*args: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            for name in ("connect", "connect_ex", "sendto"):
                patch.setattr(socket.socket, name, refuse)
            patch.setattr(socket, "getaddrinfo", refuse)
            real(*args, **options)

    monkeypatch.setattr(artefact, "save", save)
    run(chat_recipe(stack, train=EVERY))
    assert asked == []
    assert damage(tmp_path / "out/checkpoints/step-000004") is None
