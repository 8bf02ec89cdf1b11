from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onegpu.adapters import Interrupted, PluginError, ProofFailed, RecipeError, artefact
from onegpu.recipes import Loaded, Outcome, training
from onegpu.recipes.schema import Best
from onegpu.recipes.selection import Selection, choose
from onegpu.recipes.tasks.classification import Classification

Run = Callable[..., Outcome]
Evaluations = Callable[[Path], list[dict[str, Any]]]
STACKS: dict[str, list[Any]] = {
    "lora": [{"lora": {"rank": 4}}],
    "prefix": [{"prefix": {"length": 2, "init": "normal"}}],
    "full": ["full"],
    "lisa": [{"lisa": {"active": 1, "interval": 1}}],
    "vera": [{"vera": {"r": 4, "targets": ["q_proj", "v_proj"]}}],
    "dora": [{"dora": {"rank": 4}}],
    "pissa": [{"pissa": {"rank": 4}}],
    "olora": [{"olora": {"rank": 4}}],
    "trainable-tokens": [{"trainable-tokens": {"tokens": ["a", "e"]}}],
    "lora-plus and layerwise-lr": [{"lora": {"rank": 4}}, "lora-plus", "layerwise-lr"],
    "int8": ["int8", {"lora": {"rank": 4}}],
    "fp4 and loftq": ["fp4", {"loftq": {"rank": 4}}],
    "ia3": [{"ia3": {}}],
    "nf4 and two": ["nf4", {"lora": {"rank": 4}}, {"prefix": {"length": 2, "init": "normal"}}],
}
CONSTANT = {"schedule": "constant", "evaluate_every": 1}


def _looked(selection: Selection, *values: float) -> list[bool]:
    return [selection.look(step, {"f1": value}) for step, value in enumerate(values, 1)]


def test_the_best_score_is_kept_and_ties_keep_the_first() -> None:
    selection = choose(Best(), {"f1": "higher"})
    assert _looked(selection, 0.2, 0.5, 0.5, 0.4) == [True, True, False, False]
    assert (selection.step, selection.scores, selection.waited) == (2, {"f1": 0.5}, 2)
    assert not selection.exhausted


def test_a_loss_is_better_when_it_is_lower() -> None:
    selection = choose(Best(metric="loss"), {"f1": "higher"})
    assert [selection.look(step, {"loss": loss}) for step, loss in enumerate((3.0, 2.0, 2.5))] == [True, True, False]


def test_a_gain_below_min_delta_does_not_count() -> None:
    selection = choose(Best(min_delta=0.1), {"f1": "higher"})
    assert _looked(selection, 0.5, 0.55, 0.61) == [True, False, True]


def test_patience_is_counted_from_the_last_better_score() -> None:
    selection = choose(Best(patience=2), {"f1": "higher"})
    exhausted = []
    for step, value in enumerate((0.1, 0.0, 0.2, 0.1, 0.1)):
        selection.look(step, {"f1": value})
        exhausted.append(selection.exhausted)
    assert exhausted == [False, False, False, False, True]


def test_it_goes_on_from_what_a_checkpoint_kept() -> None:
    first = choose(Best(patience=2), {"f1": "higher"})
    _looked(first, 0.5, 0.4)
    again = choose(Best(patience=2), {"f1": "higher"}).resumed(first.state())
    assert not again.look(3, {"f1": 0.45})
    assert again.exhausted


def test_an_unknown_score_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no score 'macro_f'; did you mean 'macro_f1'"):
        choose(Best(metric="macro_f"), {"accuracy": "higher", "macro_f1": "higher"})


@pytest.mark.parametrize("metric", ["matthews", "macro_recall", "f1.sports"])
def test_a_run_is_judged_by_any_score_of_its_evaluations(
    metric: str, class_recipe: Callable[..., Loaded], run: Run, evaluations: Evaluations, tmp_path: Path
) -> None:
    settings = CONSTANT | {"steps": 6, "learning_rate": 0.03, "best": {"metric": metric}}
    outcome = run(class_recipe(task={"evaluation": 0.5}, train=settings))
    found = [line["evaluation"][metric] for line in evaluations(tmp_path / "out")][1:]
    assert len(set(found)) > 1, found
    assert outcome.after[metric] == max(found)


def test_a_further_score_may_be_better_where_it_is_lower(
    class_recipe: Callable[..., Loaded], run: Run, jsonl: Callable[..., Path], evaluations: Evaluations, tmp_path: Path
) -> None:
    rows = jsonl([{"text": f"text {number}", "label": number / 4} for number in range(12)], "numbers.jsonl")
    task = {"data": str(rows), "predict": "number", "evaluation": 0.3}
    settings = CONSTANT | {"steps": 6, "learning_rate": 0.3, "best": {"metric": "mean_squared_error"}}
    outcome = run(class_recipe(task=task, train=settings))
    found = [line["evaluation"]["mean_squared_error"] for line in evaluations(tmp_path / "out")][1:]
    assert outcome.after["mean_squared_error"] == min(found) < max(found)


def test_a_task_without_classes_has_no_score_of_one(chat_recipe: Callable[..., Loaded], run: Run) -> None:
    with pytest.raises(RecipeError, match=r"no score 'f1\.sports'"):
        run(chat_recipe(task={"evaluation": 0.3}, train=CONSTANT | {"best": {"metric": "f1.sports"}}))


def test_a_class_of_which_nothing_is_held_out_is_no_judge(
    class_recipe: Callable[..., Loaded], jsonl: Callable[..., Path], run: Run
) -> None:
    held = jsonl([{"text": "one more", "label": "money"}], "held.jsonl")
    recipe = class_recipe(task={"evaluation": str(held)}, train=CONSTANT | {"best": {"metric": "f1.sports"}})
    with pytest.raises(RecipeError, match=r"no row that is held out has what 'f1\.sports' is about"):
        run(recipe)


def test_a_score_that_a_task_promises_and_lacks_ends_the_run_at_its_first_evaluation(
    class_recipe: Callable[..., Loaded], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Classification.directions
    monkeypatch.setattr(Classification, "directions", lambda self, labels: real(self, labels) | {"luck": "higher"})
    with pytest.raises(PluginError, match="says that it has a score 'luck', and its evaluations lack it"):
        run(class_recipe(task={"evaluation": 0.3}, train=CONSTANT | {"best": {"metric": "luck"}}))


def test_a_class_that_there_is_not_has_no_score(class_recipe: Callable[..., Loaded], run: Run, tmp_path: Path) -> None:
    settings = CONSTANT | {"steps": 1, "best": {"metric": "f1.sport"}}
    with pytest.raises(RecipeError, match=r"no score 'f1\.sport'; did you mean 'f1\.sports'") as caught:
        run(class_recipe(task={"evaluation": 0.3}, train=settings))
    assert "\n" not in str(caught.value)  # told once
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_what_is_saved_is_the_adapter_of_the_best_evaluation(
    stack: list[Any],
    chat_recipe: Callable[..., Loaded],
    run: Run,
    evaluations: Evaluations,
    saved_tensors: Callable[[Path], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    # So fast that it overshoots: the best is not the last.
    settings = CONSTANT | {"learning_rate": 0.3, "steps": 5}
    kept = run(chat_recipe(stack, task={"evaluation": 0.3}, train=settings | {"best": {"metric": "loss"}}), "kept")
    losses = {line["step"]: line["evaluation"]["loss"] for line in evaluations(tmp_path / "kept") if line["step"]}
    best = min(losses, key=losses.__getitem__)
    facts = artefact.read(kept.adapter).manifest.run
    assert (facts["steps"], facts["scores"]["loss"], kept.after["loss"]) == (best, losses[best], losses[best])
    straight = run(chat_recipe(stack, task={"evaluation": 0.3}, train=settings | {"steps": best}), "straight")
    wanted, found = saved_tensors(straight.adapter), saved_tensors(kept.adapter)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_run_ends_when_nothing_gets_better(
    chat_recipe: Callable[..., Loaded], run: Run, evaluations: Evaluations, tmp_path: Path
) -> None:
    settings = CONSTANT | {"learning_rate": 0.3, "steps": 30, "best": {"metric": "loss", "patience": 2}}
    run(chat_recipe(task={"evaluation": 0.3}, train=settings))
    losses = [line["evaluation"]["loss"] for line in evaluations(tmp_path / "out")][1:]
    assert len(losses) < 30
    assert min(losses) == losses[-3]


def test_a_resumed_run_keeps_the_same_best(
    chat_recipe: Callable[..., Loaded],
    run: Run,
    saved_tensors: Callable[[Path], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = CONSTANT | {"learning_rate": 0.3, "steps": 6, "checkpoint_every": 2, "best": {"metric": "loss"}}
    loaded = chat_recipe(task={"evaluation": 0.3}, train=settings)
    straight = run(loaded, "straight")
    real, calls = training._evaluate, 0

    def killed(session: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # after step 4, before its checkpoint
            raise Interrupted("killed")
        real(session)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_evaluate", killed)
        with pytest.raises(Interrupted):
            run(loaded, "resumed")
    resumed = run(loaded, "resumed", resume=True)
    wanted, found = saved_tensors(straight.adapter), saved_tensors(resumed.adapter)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert resumed.after == straight.after


def test_best_without_rows_held_out_is_refused(chat_recipe: Callable[..., Loaded], run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is held out to choose by"):
        run(chat_recipe(task={"evaluation": "none"}, train={"best": {}, "evaluate_every": 1}))
    assert not (tmp_path / "out").exists()


def test_test_rows_are_scored_once_with_what_was_kept(
    class_recipe: Callable[..., Loaded], run: Run, tmp_path: Path
) -> None:
    outcome = run(class_recipe(task={"evaluation": 0.3, "test": 0.3}, train=CONSTANT | {"best": {}, "steps": 3}))
    assert 0 <= outcome.test["accuracy"] <= 1
    facts = artefact.read(outcome.adapter).manifest.run
    assert facts["test"] == outcome.test
    assert facts["data"]["test_rows"] == 3


def test_a_checkpoint_says_the_step_that_its_adapter_is_of(
    chat_recipe: Callable[..., Loaded], run: Run, evaluations: Evaluations, tmp_path: Path
) -> None:
    settings = CONSTANT | {"learning_rate": 0.3, "steps": 5, "checkpoint_every": 3, "best": {"metric": "loss"}}
    run(chat_recipe(task={"evaluation": 0.3}, train=settings))
    losses = {line["step"]: line["evaluation"]["loss"] for line in evaluations(tmp_path / "out")}
    facts = artefact.read(tmp_path / "out/checkpoints/step-000003/adapter").manifest.run
    assert min(range(4), key=losses.__getitem__) < 3  # the best so far was before it
    assert (facts["steps"], facts["scores"]["loss"]) == (3, losses[3])


def _zeros(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    zeros = {key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}
    save_file(zeros, path, metadata={"format": "pt"})


def test_the_best_adapter_is_proved_before_it_is_one_to_come_back_to(
    chat_recipe: Callable[..., Loaded], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = vars(training)["seal"]

    def spoilt(folder: Path) -> None:
        _zeros(folder / "adapter")  # before the checksums are taken: they would hold
        real(folder)

    monkeypatch.setattr(training, "seal", spoilt)
    settings = CONSTANT | {"steps": 3, "checkpoint_every": None, "best": {"metric": "loss"}}
    with pytest.raises(
        ProofFailed, match=r"step 1: .*was not written as it is .kept aside as .*unproved-000001"
    ) as caught:
        run(chat_recipe(task={"evaluation": 0.3}, train=settings))
    assert caught.value.exit_code == 4
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["unproved-000001"]
    assert not (tmp_path / "out/adapter").exists()


def test_what_does_not_come_back_as_it_was_is_not_saved_as_the_best(
    chat_recipe: Callable[..., Loaded], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = artefact.fill

    def forgetful(stack: Any, folder: Path) -> None:
        real(stack, folder)
        with torch.no_grad():
            next(iter(stack.trainable().values())).add_(1.0)

    monkeypatch.setattr(artefact, "fill", forgetful)
    settings = CONSTANT | {"steps": 2, "best": {"metric": "loss"}}
    with pytest.raises(ProofFailed, match=r"the adapter of step \d did not come back as it was"):
        run(chat_recipe(task={"evaluation": 0.3}, train=settings))
    assert not (tmp_path / "out/adapter").exists()
