from itertools import pairwise

from onegpu.recipes.data.samples.choosing import every_class_first, first_each, mixed, undisputed, unique


def test_rows_are_chosen_and_ordered() -> None:
    rows = [{"q": 1, "a": 1}, {"q": 2, "a": 1}, {"a": 1, "q": 1}, {"q": 1, "a": 2}]
    assert unique(rows) == [rows[0], rows[1], rows[3]]
    assert first_each(rows, lambda row: int(row["q"])) == rows[:2]
    assert undisputed(rows, lambda row: int(row["q"])) == [rows[1]]
    assert every_class_first(rows, lambda row: [str(row["a"])]) == [rows[0], rows[3], rows[1], rows[2]]


def test_mixing_keeps_all_rows_and_does_not_depend_on_their_order() -> None:
    rows = [{"text": str(n)} for n in range(50)]
    order = [int(row["text"]) for row in mixed(rows)]
    assert mixed(rows) == mixed(rows[::-1])
    assert sorted(order) == list(range(50))
    assert sum(after == before + 1 for before, after in pairwise(order)) < 5
