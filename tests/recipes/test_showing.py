import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from onegpu.recipes import Loaded, parse_recipe, preflight
from onegpu.recipes.showing import data_report, marked_text, report_lines

Row = dict[str, Any]
Jsonl = Callable[..., Path]


def _text(loaded: Loaded, shown: int = 3) -> str:
    return "\n".join(f"{label}: {text}" for label, text in report_lines(data_report(preflight(loaded), shown)))


def test_what_is_learned_stands_in_brackets(chat_recipe: Callable[..., Loaded]) -> None:
    report = data_report(preflight(chat_recipe()), 1)
    (example,) = report["examples"]
    assert example["place"] == "rows.jsonl:1"
    marked = marked_text(example["pieces"])
    assert "assistant\n[[Hello.<|im_end|>]]" in marked
    assert "[[Me.<|im_end|>]]" in marked
    assert "[[Hi" not in marked


def test_a_mark_may_name_what_is_learned() -> None:
    assert marked_text([("Ann", "B-PER"), (" came", None), ("!", "")]) == "[[Ann|B-PER]] came[[!]]"


def test_classes_are_counted_over_the_training_rows(class_recipe: Callable[..., Loaded]) -> None:
    report = data_report(preflight(class_recipe(task={"evaluation": 0.3})), 0)
    assert report["labels"] == {"weather": 3, "sports": 2, "money": 2}
    assert (report["train_examples"], report["evaluation_examples"]) == (7, 3)


def test_lengths_before_cutting_and_the_share_that_is_cut(class_recipe: Callable[..., Loaded]) -> None:
    # Ten texts of two to six words, with two special tokens each.
    text = _text(class_recipe(task={"max_length": 6, "too_long": "cut-right"}))
    assert "lengths: 6 tokens in the middle, 95 % up to 8, longest 8; cut to 6: 4 of 10 for train" in text


def test_what_is_cut_is_counted_on_every_side(class_recipe: Callable[..., Loaded]) -> None:
    text = _text(class_recipe(task={"max_length": 4, "too_long": "cut-right", "evaluation": 0.3, "test": 0.3}))
    assert "; cut to 4: 2 of 4 for train, 3 of 3 for evaluation, 3 of 3 for test" in text


def test_rows_that_are_read_in_windows_are_counted_as_rows(chat_base: Path, jsonl: Jsonl, tmp_path: Path) -> None:
    words = " ".join(["the cat sat on the mat and the dog"] * 8)
    rows = [{"text": f"{number} {words}"} for number in range(4)]
    task = {"language-modelling": {"data": str(jsonl(rows)), "evaluation": "none", "max_length": 32}}
    content = {"base": str(chat_base), "adapters": ["lora"], "task": task}
    loaded = parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path)
    examples = len(preflight(loaded).dataset.train)
    assert examples > 4
    assert f"rows: 4 for train (in {examples} examples)" in _text(loaded, 0)


def test_more_classes_than_a_line_holds_are_all_in_the_report(
    class_recipe: Callable[..., Loaded], jsonl: Jsonl
) -> None:
    rows = jsonl([{"text": f"text {number}", "label": f"class-{number}"} for number in range(40)], "many.jsonl")
    report = data_report(preflight(class_recipe(task={"data": str(rows)})), 0)
    assert len(report["labels"]) == 40
    (line,) = [text for label, text in report_lines(report) if label == "classes"]
    assert line.count("class-") == 30
    assert line.endswith(", ...")


def test_rows_that_cannot_be_used_are_listed_with_their_lines(
    chat_recipe: Callable[..., Loaded], rows: Sequence[Row], tmp_path: Path
) -> None:
    path = tmp_path / "odd.jsonl"
    good = [json.dumps(row) for row in rows] * 4
    path.write_text("\n".join([*good, "{broken", '{"messages": []}']) + "\n", "utf-8")
    text = _text(chat_recipe(task={"data": str(path)}))
    assert "odd.jsonl:41" in text
    assert "odd.jsonl:42" in text
    assert "duplicates: within train: 30" in text


def test_the_command_fits_a_terminal_and_prints_json(
    chat_recipe: Callable[..., Loaded], onegpu: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(chat_recipe().as_yaml(), "utf-8")
    code, out, err = onegpu("data", str(recipe), "--rows", "2")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = onegpu("data", str(recipe), "--rows", "2", "--json")
    assert len(json.loads(out)["examples"]) == 2


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_more_than_is_tolerated_is_refused(
    share: float, chat_recipe: Callable[..., Loaded], rows: Sequence[Row], onegpu: Any, tmp_path: Path
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join([*(json.dumps(row) for row in rows), "{broken"] * 2) + "\n", "utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(chat_recipe(task={"data": str(path), "tolerate": share}).as_yaml(), "utf-8")
    code, _, err = onegpu("data", str(recipe))
    assert code == 2
    assert "2 of 22 rows cannot be used" in err
    assert "odd.jsonl:11, odd.jsonl:22" in err


def test_what_a_class_or_a_number_or_a_tag_is_learned_from(class_base: Path, jsonl: Jsonl, tmp_path: Path) -> None:
    def first(task: Row, row: Row, other: Row) -> str:
        content = {
            "base": str(class_base),
            "adapters": ["lora"],
            "task": {name: {"data": str(jsonl([row, other])), "evaluation": "none"} | s for name, s in task.items()},
        }
        loaded = parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path)
        report = data_report(preflight(loaded), 1)
        return marked_text(report["examples"][0]["pieces"])

    text = {"text": "the cat"}
    classes = {"classification": {"predict": "classes"}}
    assert first({"classification": {}}, text | {"label": "x"}, text | {"label": "y"}) == "[[[CLS] the cat [SEP]|x]]"
    assert first(classes, text | {"label": ["x", "y"]}, text | {"label": ["x"]}) == "[[[CLS] the cat [SEP]|x, y]]"
    numbers = {"classification": {"predict": "number"}}
    assert first(numbers, text | {"label": 2.5}, text | {"label": 1}) == "[[[CLS] the cat [SEP]|2.5]]"
    tagged = {"tokens": ["the", "cat"], "tags": ["O", "B-PET"]}
    assert "[[cat [SEP] |B-PET]]" in first({"tagging": {}}, tagged, tagged | {"tokens": ["a", "dog"]})
