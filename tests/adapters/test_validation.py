import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onegpu.adapters.validation import Fault, faults


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    depth: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rank: int = Field(default=1, ge=1)
    targets: str | list[str] = "all"
    needed: bool
    inner: Inner = Inner()
    weights: dict[str, float] | None = None

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("Name at least one target")
        return value


def _faults(**given: object) -> list[Fault]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(given)
    return list(faults(caught.value, Outer))


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"rnak": 2}, ("rnak",), "unknown key; did you mean 'rank'? (valid: inner, needed, rank, targets, weights)"),
        ({"inner": {"dpeth": 2}}, ("inner", "dpeth"), "unknown key; did you mean 'depth'? (valid: depth)"),
        ({"rank": 0}, ("rank",), "must be greater than or equal to 1, not 0"),
        ({"rank": "8"}, ("rank",), "must be a valid integer, not '8'"),
        ({"inner": {"depth": None}}, ("inner", "depth"), "must be a valid integer, not None"),
        ({"targets": []}, ("targets",), "name at least one target, not []"),
    ],
)
def test_a_fault_names_its_place_and_what_is_valid(given: dict[str, object], path: tuple[str], message: str) -> None:
    assert _faults(needed=True, **given) == [Fault(path, message)]


def test_a_missing_key_is_said_to_be_needed() -> None:
    assert _faults() == [Fault(("needed",), "this key is needed")]


def test_all_faults_are_found_at_once() -> None:
    assert {fault.path for fault in _faults(rank=0, rnak=1)} == {("rank",), ("rnak",), ("needed",)}


def test_the_tried_types_of_a_union_are_no_part_of_the_path() -> None:
    found = _faults(needed=True, targets=3)
    assert {fault.path for fault in found} == {("targets",)}
    assert {fault.message for fault in found} == {"must be a valid string, not 3", "must be a valid list, not 3"}


def test_an_item_of_a_list_is_named_by_its_index() -> None:
    assert Fault(("targets", 1), "must be a valid string, not 2") in _faults(needed=True, targets=["a", 2])


def test_a_value_of_a_mapping_is_named_by_its_key() -> None:
    assert _faults(needed=True, weights={"a": "x"}) == [Fault(("weights", "a"), "must be a valid number, not 'x'")]


def test_paths_start_where_the_part_stands_in_the_whole() -> None:
    with pytest.raises(ValidationError) as caught:
        Inner.model_validate({"depth": "x"})
    (fault,) = faults(caught.value, Inner, ("adapters", 1))
    assert fault.path == ("adapters", 1, "depth")
