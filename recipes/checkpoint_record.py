"""What state.json of a checkpoint may say. Anybody may have written one: it is checked before any of it is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onegpu.adapters import RecipeError
from onegpu.adapters.errors import brief
from onegpu.adapters.validation import faults

__all__ = ["checked"]

SHOWN = 3  # faults in one message
WORD = 2**32 - 1  # the largest number in a generator's state

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Word = Annotated[int, Field(ge=0, le=WORD)]
Place = Annotated[int, Field(ge=0, le=624)]  # within the 624 words of a Mersenne twister


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Selection(_Record):
    step: Positive | None
    scores: dict[str, Finite]
    waited: Count


class _Change(_Record):
    step: Count
    changed: list[str]


class _Proof(_Record):
    stepped: Count
    judged: Count
    proved: list[str]
    suspects: dict[str, str]


class _Progress(_Record):
    step: Positive
    scores: list[dict[str, Finite]]
    selection: _Selection
    changes: list[_Change]
    proof: _Proof

    @model_validator(mode="after")
    def _in_order(self) -> "_Progress":
        if self.selection.step is not None and self.selection.step > self.step:
            raise ValueError(f"the best step is {self.selection.step}, and only {self.step} were done")
        if self.selection.waited > len(self.scores):
            raise ValueError(f"{self.selection.waited} evaluations were waited for, and there are {len(self.scores)}")
        if late := [change.step for change in self.changes if change.step > self.step]:
            raise ValueError(f"something changed after step {late[0]}, and only {self.step} were done")
        return self


class _Optimizer(_Record):
    kind: str
    values: dict[str, Count]


class _Scaler(_Record):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    growth_factor: Finite
    backoff_factor: Finite
    growth_interval: Positive
    growth_tracker: Annotated[Count, Field(alias="_growth_tracker")]


class _Nothing(_Record):
    pass


class _Random(_Record):
    """The states of Python's and of numpy's generator, which check less of them than they rely on."""

    python: tuple[Literal[3], tuple[Word, ...], Finite | None]
    numpy: tuple[
        Literal["MT19937"], Annotated[list[Word], Field(min_length=624, max_length=624)], Place, Literal[0, 1], Finite
    ]

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, content: Any) -> Any:
        """JSON has lists only."""
        if not isinstance(content, dict):
            return content
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        if isinstance(python := found.get("python"), tuple):
            found["python"] = tuple(tuple(part) if isinstance(part, list) else part for part in python)
        return found

    @model_validator(mode="after")
    def _whole(self) -> "_Random":
        words = self.python[1]
        if len(words) != 625 or words[-1] > 624:
            raise ValueError("the state of Python's generator has 624 words and a place among them")
        return self


class _Environment(_Record):
    """Further keys are versions, by distribution."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | str]

    processes: Positive
    threads: Positive
    onegpu: str
    torch: str
    transformers: str
    bitsandbytes: str


class _State(_Record):
    progress: _Progress
    optimizer: _Optimizer
    scaler: _Scaler | _Nothing
    adapters: dict[str, dict[str, Any]]
    random: _Random
    environment: _Environment


def checked(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same, when it is what a checkpoint says.

    Args:
        path: of the file, for messages.

    Raises:
        RecipeError: it is not; each fault with its place.
    """
    try:
        _State.model_validate(content)
    except ValidationError as error:
        found = [f"{brief('.'.join(map(str, fault.path)))}: {fault.message}" for fault in faults(error, _State)]
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise RecipeError(
            f"{path} is not what a checkpoint says, although its checksums hold: {'; '.join(found[:SHOWN])}{more}"
        ) from None
    return dict(content)
