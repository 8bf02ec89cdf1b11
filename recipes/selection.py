"""Which evaluation was the best, and whether to go on waiting for a better one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from onegpu.adapters import PluginError, RecipeError
from onegpu.adapters.errors import nearest

from .schema import Best
from .tasks import Direction

__all__ = ["Selection", "choose", "of_one_class"]


@dataclass
class Selection:
    """Follows one score through the evaluations of a run."""

    metric: str = ""
    direction: Direction = "lower"
    patience: float = math.inf  # evaluations
    min_delta: float = 0.0
    step: int | None = None  # of the best evaluation
    scores: dict[str, float] = field(default_factory=dict)  # all of that evaluation
    waited: int = 0  # evaluations since then

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.waited >= self.patience

    def expect(self, scores: Mapping[str, float]) -> None:
        """See, from the first evaluation on, that the score is there.

        Raises:
            PluginError: the task says that it has the score, and evaluations lack it.
        """
        if self.metric and self.metric not in scores:
            raise PluginError(f"the task says that it has a score {self.metric!r}, and its evaluations lack it")

    def look(self, step: int, scores: Mapping[str, float]) -> bool:
        """Take note of an evaluation; returns whether it is the best so far. Without a metric none is."""
        if not self.metric:
            return False
        gain = scores[self.metric] - self.scores.get(self.metric, math.nan)
        better = self.step is None or (gain if self.direction == "higher" else -gain) > self.min_delta
        if better:
            self.step, self.scores, self.waited = step, dict(scores), 0
        else:
            self.waited += 1
        return better

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: value for key, value in asdict(self).items() if key in ("step", "scores", "waited")}

    def resumed(self, state: Mapping[str, Any]) -> "Selection":
        """Going on from a checkpoint's `state`; without a metric (any more) there is no best to go back to."""
        return replace(self, **state) if self.metric else self


def choose(best: Best | None, directions: Mapping[str, Direction]) -> Selection:
    """A selection as the recipe wants it.

    Args:
        directions: the scores of the task, most important first, and which way each is better.

    Raises:
        RecipeError: the task has no such score.
    """
    if best is None:
        return Selection()
    known = {"loss": "lower", **directions}
    metric = best.metric or next(iter(directions))
    if metric not in known:
        raise RecipeError(f"metric: the task has no score {metric!r}{nearest(metric, known)}")
    direction: Direction = "higher" if known[metric] == "higher" else "lower"
    return Selection(metric, direction, best.patience or math.inf, best.min_delta)


def of_one_class(best: Best | None) -> bool:
    """Whether the score is that of a class (`f1.sports`): only the rows say which there are."""
    return best is not None and "." in (best.metric or "")
