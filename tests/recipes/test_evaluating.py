import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import ArtefactError, RecipeError, load_base
from onegpu.adapters.artefact import save
from onegpu.recipes import Loaded, Outcome
from onegpu.recipes.evaluating import evaluate_folder

Row = dict[str, Any]
Run = Callable[..., Outcome]
Jsonl = Callable[..., Path]


def test_a_run_folder_scores_what_the_run_scored(chat_recipe: Callable[..., Loaded], run: Run, tmp_path: Path) -> None:
    outcome = run(chat_recipe(["nf4", {"lora": {"rank": 4}}], task={"evaluation": 0.3}))
    found = evaluate_folder(tmp_path / "out")
    assert (found.what, found.rows) == ("held-out rows", 3)
    assert found.adapter == pytest.approx(outcome.after, rel=1e-6)
    assert found.base == pytest.approx(outcome.before, rel=1e-6)
    assert found.shown[0] == "loss"


def test_test_rows_come_before_those_that_were_watched(
    class_recipe: Callable[..., Loaded], run: Run, tmp_path: Path
) -> None:
    outcome = run(class_recipe(task={"evaluation": 0.3, "test": 0.3}))
    found = evaluate_folder(tmp_path / "out")
    assert found.what == "test rows"
    assert found.adapter == pytest.approx(outcome.test, rel=1e-6)
    assert set(found.details["confusion"]) == {"money", "sports", "weather"}


@pytest.mark.parametrize("folder", ["out", "out/adapter"])
def test_other_rows_are_read_with_the_classes_of_the_run(
    folder: str, class_recipe: Callable[..., Loaded], run: Run, texts: Sequence[Row], jsonl: Jsonl, tmp_path: Path
) -> None:
    run(class_recipe(task={"evaluation": 0.3}, train={"steps": 1}))
    (tmp_path / "texts.jsonl").unlink()
    others = jsonl([row for row in texts if row["label"] == "sports"], "others.jsonl")
    found = evaluate_folder(tmp_path / folder, data=str(others))
    assert (found.what, found.rows) == (str(others), 3)
    assert found.adapter["loss"] > 0


def test_rows_that_cannot_be_scored_are_listed_and_the_others_counted(
    class_recipe: Callable[..., Loaded],
    run: Run,
    texts: Sequence[Row],
    onegpu: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    run(class_recipe(task={"evaluation": 0.3}, train={"steps": 1, "best": {}, "evaluate_every": 1}))
    lines = [json.dumps(row) for row in [*texts, *texts, *texts]]
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join([*lines, "{broken"]) + "\n", "utf-8")
    found = evaluate_folder(tmp_path / "out", data=str(others))
    assert found.rows == len(lines)
    assert list(found.dropped.values()) == [["others.jsonl:31"]]
    code, out, _ = onegpu("evaluate", str(tmp_path / "out"), "--data", str(others))
    assert code == 0
    assert out.splitlines()[1].startswith("  unusable: 1 row: ")
    assert "(others.jsonl:31)" in out


def test_a_class_that_the_run_never_saw_is_a_problem_of_its_row(
    class_recipe: Callable[..., Loaded], run: Run, texts: Sequence[Row], jsonl: Jsonl, tmp_path: Path
) -> None:
    run(class_recipe(train={"steps": 1}))
    others = jsonl([{"text": "the cat", "label": "animals"}] * 3, "others.jsonl")
    with pytest.raises(ValueError, match="its class"):
        evaluate_folder(tmp_path / "out", data=str(others))


def test_a_run_that_held_nothing_out_needs_rows(
    chat_recipe: Callable[..., Loaded], run: Run, rows: Sequence[Row], tmp_path: Path
) -> None:
    run(chat_recipe())
    with pytest.raises(RecipeError, match="held no rows out: name some with --data"):
        evaluate_folder(tmp_path / "out")
    assert evaluate_folder(tmp_path / "out", data=str(tmp_path / "rows.jsonl")).rows == len(rows)


def test_a_base_that_was_trained_itself_is_not_compared(
    chat_recipe: Callable[..., Loaded], run: Run, tmp_path: Path
) -> None:
    run(chat_recipe(["full"], task={"evaluation": 0.3}, train={"steps": 1}))
    assert evaluate_folder(tmp_path / "out").base == {}


def test_an_adapter_without_a_run_says_so(chat_base: Path, tmp_path: Path) -> None:
    from onegpu.adapters import attach

    save(attach(load_base(str(chat_base)), [{"lora": {"rank": 2}}]), tmp_path / "bare")
    with pytest.raises(ArtefactError, match="not written by a run"):
        evaluate_folder(tmp_path / "bare", data="rows.jsonl")


def test_the_command_prints_a_table_or_json(
    class_recipe: Callable[..., Loaded], run: Run, onegpu: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run(class_recipe(task={"evaluation": 0.3}, train={"steps": 1}))
    code, out, _ = onegpu("evaluate", str(tmp_path / "out"))
    assert code == 0
    assert out.splitlines()[0] == "3 held-out rows"
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = onegpu("evaluate", str(tmp_path / "out"), "--json")
    found = json.loads(out)
    assert found["adapter"].keys() == found["base"].keys() >= {"loss", "accuracy", "macro_f1"}
    code, _, err = onegpu("evaluate", str(tmp_path))
    assert code == 2
    assert "Traceback" not in err
