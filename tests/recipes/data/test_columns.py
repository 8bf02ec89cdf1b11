from typing import Any

import pytest

from onegpu.adapters import RecipeError
from onegpu.recipes.data.columns import column_map
from onegpu.recipes.tasks import RowProblem

ROW: dict[str, Any] = {"en": "sea", "de": "Meer", "n": 3, "share": 0.25, "true": True, "nothing": None, "list": [1]}
NEEDS = ("prompt", "completion")


def _map(columns: dict[str, str], row: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return column_map(columns, **({"needs": NEEDS} | options)).map_row(ROW if row is None else row)


def test_only_what_the_task_reads_is_kept() -> None:
    row = {"completion": "b", "prompt": "a", "more": 1, "system": "s"}
    assert _map({}, row) == {"prompt": "a", "completion": "b"}
    assert _map({}, row, optional=("system", "weight")) == {"prompt": "a", "completion": "b", "system": "s"}


def test_columns_are_renamed_and_templates_filled() -> None:
    assert _map({"prompt": "Translate: {en}\n", "completion": "de"}) == {
        "prompt": "Translate: sea\n",
        "completion": "Meer",
    }


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{en}", "sea"),
        ("{en}{de}{en}", "seaMeersea"),
        ("{{{en}}} }}", "{sea} }"),
        ("{n} of {share}, {true}", "3 of 0.25, True"),
        ("{{nothing}}", "{nothing}"),
    ],
)
def test_a_template_is_filled_as_python_would(template: str, filled: str) -> None:
    assert _map({"prompt": template, "completion": "de"})["prompt"] == filled == template.format(**ROW)


def test_names_with_spaces_and_dashes_are_names() -> None:
    assert _map({"prompt": "{the text}", "completion": "{a-b}"}, {"the text": "x", "a-b": "y"}) == {
        "prompt": "x",
        "completion": "y",
    }


@pytest.mark.parametrize("template", ["{}", "{en.upper}", "{en[0]}", "{n:>5}", "{n:{en}}", "{en!r}", "{en", "en}", "{"])
def test_a_template_that_is_more_than_names_is_refused(template: str) -> None:
    with pytest.raises(RecipeError) as caught:
        column_map({"prompt": template}, needs=NEEDS)
    assert f"columns: prompt: template {template!r}: " in str(caught.value)


def test_a_column_that_the_task_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        column_map({"promt": "en"}, needs=NEEDS, optional=("system",))
    assert str(caught.value) == (
        "columns: the task has no column 'promt'; did you mean 'prompt'? (valid: completion, prompt, system)"
    )


@pytest.mark.parametrize(
    ("made_from", "problem"),
    [
        ("fr", "no column 'fr'"),
        ("{en} {fr}", "no column 'fr'"),
        ("nothing", "column 'nothing' is null"),
        ("{nothing}", "column 'nothing' is null"),
        ("{list}", "column 'list' is neither text nor a number: it cannot stand in a template"),
        ("{nan}", "column 'nan' is neither text nor a number: it cannot stand in a template"),
    ],
)
def test_a_row_that_lacks_what_is_needed_is_a_problem(made_from: str, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        _map({"prompt": made_from, "completion": "de"}, ROW | {"nan": float("nan")})
    assert str(caught.value) == problem


def test_an_optional_column_that_is_null_or_absent_is_left_out() -> None:
    row = {"prompt": "a", "completion": "b", "system": None, "x": None}
    assert set(_map({"weight": "{x}"}, row, optional=("system", "weight", "tools"))) == {*NEEDS}


def test_what_a_recipe_names_and_a_task_needs_is_declared() -> None:
    mapping = column_map({"prompt": "{en} {n}", "weight": "w"}, needs=NEEDS, optional=("weight", "system"))
    assert mapping.declared == {"en", "n", "completion", "w"}
