"""Damaged checkpoints are named and passed over; what changed is named, and in the manifest where it is accepted."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.adapters import (
    ArtefactError,
    Interrupted,
    OnegpuError,
    ProofFailed,
    RecipeError,
    Unavailable,
    artefact,
    registry,
)
from onegpu.adapters.files import damage, seal
from onegpu.recipes import Loaded, Outcome, preflight, run as run_loudly, training
from onegpu.recipes.training import Session

TRAIN = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 1, "best": {"metric": "loss"}, "learning_rate": 0.3}
UNALIKE = {"seconds", "peak_memory"}

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Bytes = Callable[[Path], dict[str, bytes]]


def _stop_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training._accumulate

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        if s.step + 1 == step:
            raise SystemError("the power went")
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)


@pytest.fixture
def loaded(chat_recipe: Recipe) -> Loaded:
    """Six steps with a checkpoint at every other one."""
    return chat_recipe(task={"evaluation": 0.2}, train=TRAIN)


@pytest.fixture
def begun(loaded: Loaded, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a run that died in its sixth step."""
    with monkeypatch.context() as patch:
        _stop_in(6, patch)
        with pytest.raises(SystemError):
            run(loaded)
    return tmp_path / "out"


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _gone(path: Path) -> None:
    path.unlink()


def _more(path: Path) -> None:
    (path.parent / "more.pt").write_bytes(b"\x80")


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in UNALIKE} for line in lines]


FILES = [
    *("adapter/adapter_model.safetensors", "adapter/manifest.json", "optimizer.safetensors", "random.safetensors"),
    *("state.json", "checksums.json"),
]


def test_every_damage_to_every_file_of_a_checkpoint_is_seen(begun: Path, tmp_path: Path) -> None:
    folder = begun / "checkpoints/step-000004"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*FILES, "adapter/adapter_config.json", "adapter/README.md"}
    assert damage(folder) is None
    for name in found:
        for number, spoil in enumerate((_truncated, _flipped, _gone, _more)):
            copy = tmp_path / f"{name.replace('/', '-')}-{number}"
            shutil.copytree(folder, copy)
            assert damage(copy) is None
            spoil(copy / name)
            assert damage(copy), (name, spoil)


@pytest.mark.parametrize("damaged", [["step-000004"], ["step-000004", "step-000002"], ["best"]], ids=str)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damaged: list[str],
    begun: Path,
    loaded: Loaded,
    run: Run,
    folder_bytes: Bytes,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    # Of step 3 or 4: the checkpoint of step 2 does not need it, and one of step 5 would be found anew.
    best = sorted(path for path in begun.glob("checkpoints/best-*") if path.name <= "best-000004")[-1]
    assert best.name in ("best-000003", "best-000004")
    for name in damaged:
        folder = best if name == "best" else begun / "checkpoints" / name
        _flipped(next(folder.rglob("*.safetensors")))
    capsys.readouterr()
    outcome = run_loudly(loaded, begun, resume=True)
    said = capsys.readouterr().out
    assert outcome is not None
    if damaged == ["best"]:
        assert f"step-000004: it needs {best.name}, and there" in said
    else:
        assert all(f"{name}: " in said for name in damaged)
    assert "has other bytes; set aside as damaged-000004" in said
    assert "resumed" in said
    assert ("after step 2" if len(damaged) == 1 else "from the start, as there is no checkpoint to use") in said
    straight = run(loaded, "straight")
    assert folder_bytes(outcome.adapter) == folder_bytes(straight.adapter)
    assert _records(begun) == _records(tmp_path / "straight")
    assert (begun / "checkpoints/damaged-000004").is_dir()


def test_a_run_that_is_resumed_at_its_end_was_proved_by_its_first_steps(
    loaded: Loaded, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._clip

    def clip(s: Session, *args: Any) -> float:
        if s.step + 1 == s.steps:
            signal.raise_signal(signal.SIGTERM)
        return real(s, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_clip", clip)
        with pytest.raises(Interrupted):
            run(loaded)
    outcome, straight = run(loaded, resume=True), run(loaded, "straight")
    proved = artefact.read(outcome.adapter).manifest.run["step_proof"]
    assert re.fullmatch(r"\d+ tensors had a gradient and moved", proved)  # no step is left to judge
    assert artefact.read(straight.adapter).manifest.run["step_proof"] == proved


def test_what_was_suspected_before_a_run_died_is_remembered(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = training._accumulate

    def cut(s: Session, window: Any, trainable: Any) -> tuple[float, float]:
        found = real(s, window, trainable)
        assert s.step < 3  # three steps in all are judged, however many processes did them
        next(p for name, p in trainable.items() if "lora_B" in name).grad = None
        s.proof._from_loss.discard(next(name for name in trainable if "lora_B" in name))
        return found

    loaded = chat_recipe(train={"steps": 6, "checkpoint_every": 2})
    monkeypatch.setattr(training, "_accumulate", cut)
    with monkeypatch.context() as patch:
        _stop_in(3, patch)
        with pytest.raises(SystemError):
            run(loaded)
    told = json.loads((tmp_path / "out/checkpoints/step-000002/state.json").read_text("utf-8"))["progress"]["proof"]
    assert (told["judged"], len(told["suspects"])) == (2, 1)
    with pytest.raises(ProofFailed, match="had no gradient in 3 steps"):  # the third in all, the first since
        run(loaded, resume=True)


def test_a_best_adapter_that_is_damaged_before_it_is_wanted_is_named(
    loaded: Loaded, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = training.keep_best

    def keep_best(s: Session) -> None:
        _flipped(next(s.folder.best(s.selection.step or 0).rglob("*.safetensors")))
        real(s)

    monkeypatch.setattr("onegpu.recipes.running.keep_best", keep_best)
    with pytest.raises(ArtefactError, match=r"best-\d+ was damaged .* has other bytes. Go on with --resume"):
        run(loaded)
    assert not (tmp_path / "out/adapter").exists()


def test_a_line_of_the_metrics_that_was_cut_off_or_spoilt_does_no_harm(
    begun: Path, loaded: Loaded, run: Run, tmp_path: Path
) -> None:
    with (begun / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": \xff')
    run(loaded, resume=True)
    run(loaded, "straight")
    assert _records(begun) == _records(tmp_path / "straight")


# --- changes ----------------------------------------------------------------------------------------------------------


def _changes(outcome: Outcome | None) -> Any:
    assert outcome is not None
    return artefact.read(outcome.adapter).manifest.run.get("changes")


def _accepting(loaded: Loaded, folder: Path) -> Outcome | None:
    return run_loudly(loaded, folder, resume=True, accept_changes=True)


def test_an_accepted_change_takes_effect_and_is_in_the_manifest(
    begun: Path, chat_recipe: Recipe, evaluations: Any, metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    changed = chat_recipe(task={"evaluation": 0.2}, train=TRAIN | {"learning_rate": 0.01, "schedule": "constant"})
    told = ["train.learning_rate: 0.3 -> 0.01", 'train.schedule: "cosine" -> "constant"']
    assert _changes(_accepting(changed, begun)) == [{"step": 4, "changed": told}]
    rates = [line["learning_rate"] for line in metrics(begun)]
    assert rates[0] == 0.3
    assert rates[4:] == [0.01, 0.01]
    assert (begun / "recipe.yaml").read_text("utf-8") == changed.as_yaml()


def test_a_change_is_remembered_by_the_resumed_run_when_it_is_resumed_again(
    begun: Path, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = chat_recipe(task={"evaluation": 0.2}, train=TRAIN | {"clip": 0.5, "steps": 9})
    with monkeypatch.context() as patch:
        _stop_in(8, patch)
        with pytest.raises(SystemError):
            _accepting(changed, begun)
    found = _changes(run(changed, resume=True))
    assert found == [{"step": 4, "changed": ["train.steps: 6 -> 9", "train.clip: 1.0 -> 0.5"]}]


def test_an_exact_resumption_says_nothing(begun: Path, loaded: Loaded) -> None:
    assert _changes(_accepting(loaded, begun)) is None


def test_how_often_checkpoints_are_written_may_change(begun: Path, chat_recipe: Recipe, run: Run) -> None:
    outcome = run(chat_recipe(task={"evaluation": 0.2}, train=TRAIN | {"checkpoint_every": 3}), resume=True)
    assert _changes(outcome) is None


def test_other_threads_are_accepted_when_the_user_says_so(begun: Path, loaded: Loaded) -> None:
    torch.set_num_threads(2)
    assert _changes(_accepting(loaded, begun)) == [{"step": 4, "changed": ["threads: 1 -> 2"]}]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"steps": 3}}, "the run did 4 steps already, and the recipe asks for 3"),
        ({"train": {"optimizer": "sgd"}}, "has the state of 'AdamW', and the recipe asks for SGD: start another run"),
        ({"adapters": [{"lora": {"rank": 5}}]}, "does not fit this run"),
    ],
    ids=str,
)
def test_what_no_flag_can_bridge_is_refused(
    changes: dict[str, Any], told: str, begun: Path, chat_recipe: Recipe, folder_bytes: Bytes
) -> None:
    before = folder_bytes(begun)
    settings = {"task": {"evaluation": 0.2}, **changes, "train": TRAIN | changes.get("train", {})}
    with pytest.raises(OnegpuError, match=told) as caught:
        _accepting(chat_recipe(**settings), begun)
    assert caught.value.exit_code == 2
    assert folder_bytes(begun) == before


def test_other_rows_in_a_file_that_is_held_out_are_refused(
    chat_recipe: Recipe, rows: list[dict[str, Any]], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(rows[0]).replace("Hi", "Ho") + "\n", "utf-8")  # in none of the rows to train on
    loaded = chat_recipe(task={"evaluation": str(held)}, train={"steps": 4, "checkpoint_every": 2})
    with monkeypatch.context() as patch:
        _stop_in(4, patch)
        with pytest.raises(SystemError):
            run(loaded)
    before = preflight(loaded).dataset.report()
    held.write_text(json.dumps(rows[0]).replace("Hi", "Ha") + "\n", "utf-8")
    assert preflight(loaded).dataset.report() == before  # nothing else tells them apart
    with pytest.raises(RecipeError, match=r"the rows changed since .*step-000002 was written"):
        run(loaded, resume=True)


def test_another_base_in_the_same_place_is_refused(
    chat_base: Path, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(chat_base, base)
    loaded = chat_recipe(base=base, train={"steps": 4, "checkpoint_every": 2})
    with monkeypatch.context() as patch:
        _stop_in(4, patch)
        with pytest.raises(SystemError):
            run(loaded)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"the base changed since .*step-000002 was written"):
        run(loaded, resume=True)
    assert _changes(_accepting(loaded, tmp_path / "out")) == [{"step": 2, "changed": ["the base"]}]


@pytest.fixture
def own_base(chat_base: Path, tmp_path: Path) -> Path:
    """A base that a test may change."""
    shutil.copytree(chat_base, tmp_path / "base")
    return tmp_path / "base"


def _other_template(base: Path) -> None:
    """Another sign between turns: no count of tokens tells."""
    path = base / "chat_template.jinja"
    written = path.read_text("utf-8").replace("<|im_end|>\n", "<|im_end|> ")
    assert written != path.read_text("utf-8")
    path.write_text(written, "utf-8")


def _other_stop(base: Path) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token_id": [1, 7]}), "utf-8")


@pytest.mark.parametrize(
    ("change", "told"),
    [(_other_template, "the tokenizer (chat template)"), (_other_stop, "the tokens that end an answer")],
    ids=["template", "stop token"],
)
def test_texts_that_would_be_read_otherwise_are_refused(
    change: Callable[[Path], None],
    told: str,
    own_base: Path,
    chat_recipe: Recipe,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded = chat_recipe(base=own_base, train={"steps": 4, "checkpoint_every": 2})
    with monkeypatch.context() as patch:
        _stop_in(4, patch)
        with pytest.raises(SystemError):
            run(loaded)
    change(own_base)
    with pytest.raises(RecipeError, match=f"{re.escape(told)} changed since .*step-000002 was written"):
        run(loaded, resume=True)
    assert _changes(_accepting(loaded, tmp_path / "out")) == [{"step": 2, "changed": [told]}]


def _declared_anew(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Every adapter as if another distribution, or another version of it, provided it."""
    real = registry.entries

    def entries(group: str) -> list[registry.Entry]:
        return [dataclasses.replace(entry, **changes) for entry in real(group)]

    patch.setattr(registry, "entries", entries)


def test_another_version_of_a_plugin_is_refused(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = {"steps": 4, "checkpoint_every": 2}
    _declared_anew(monkeypatch, distribution="other", version="1.0")
    with monkeypatch.context() as patch:
        _stop_in(4, patch)
        with pytest.raises(SystemError):
            run(chat_recipe(train=train))
    _declared_anew(monkeypatch, version="2.0")
    with pytest.raises(Unavailable, match=r"other was 1\.0 and is 2\.0"):
        run(chat_recipe(train=train), resume=True)


@pytest.mark.parametrize("name", ["device", "peft", "torch"])
def test_another_machine_is_refused(name: str, begun: Path, loaded: Loaded, run: Run) -> None:
    state = begun / "checkpoints/step-000004/state.json"
    content = json.loads(state.read_text("utf-8"))
    content["environment"][name] = "other"
    state.write_text(json.dumps(content), "utf-8")
    seal(state.parent)
    with pytest.raises(Unavailable, match=f"{name} was other and is "):
        run(loaded, resume=True)


def test_the_flag_without_resume_is_refused(onegpu: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = onegpu("run", "quickstart", "--accept-changes")
    assert code == 2
    assert "--resume" in err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
