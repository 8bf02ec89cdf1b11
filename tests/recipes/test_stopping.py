import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import Interrupted
from onegpu.recipes import Loaded, Outcome, training
from onegpu.recipes.stopping import SIGNALS, asked_to_stop, terminated_like_interrupted

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt), asked_to_stop() as asked:  # noqa: PT012  # the block is tested
        signal.raise_signal(number)
        assert asked == [number]
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_outside_of_training_both_signals_end_the_program_in_the_same_way() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


# Two: the evaluation before training, after which there is nothing to lose, and the last one, after the last step.
def test_an_interrupt_during_the_last_evaluation_loses_no_step(
    chat_recipe: Recipe,
    run: Run,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    train = {"steps": 3, "checkpoint_every": None, "evaluate_every": 2, "best": {"metric": "loss"}}
    loaded = chat_recipe(task={"evaluation": 0.2}, train=train)
    straight = run(loaded, "straight")
    real = training._evaluate

    def evaluate(session: Any) -> None:
        if session.step == 3:
            signal.raise_signal(signal.SIGTERM)
        real(session)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_evaluate", evaluate)
        with pytest.raises(Interrupted, match="interrupted after step 3"):
            run(loaded, "resumed")
    assert (tmp_path / "resumed/checkpoints/step-000003").is_dir()
    resumed = run(loaded, "resumed", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)
    assert resumed.after == straight.after
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("straight", "resumed")]
    assert lines[0] == lines[1]


def test_processes_that_are_asked_at_different_steps_stop_at_the_same_one(
    chat_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Accelerator:
        num_processes, device = 2, "cpu"

        def reduce(self, tensor: Any, how: str) -> Any:
            return tensor + 1  # the other process was asked

    class Session:
        accelerator = Accelerator()

    assert training._anyone(Session(), [])  # type: ignore[arg-type]
