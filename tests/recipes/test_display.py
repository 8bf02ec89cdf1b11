import io

import pytest
from rich.console import Console

from onegpu.recipes.display import Display, human_bytes

RECORD = {"step": 1, "loss": 1.5, "learning_rate": 2e-4, "tokens": 300, "seconds": 0.5}


def _display(*, terminal: bool) -> tuple[Display, io.StringIO]:
    display, out = Display(), io.StringIO()
    display.console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    return display, out


def test_a_quiet_display_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=True)
    display.line("data", "ten rows")
    with display.training(5, 0) as bar:
        bar.advance(RECORD)
    assert capsys.readouterr() == ("", "")


def test_a_line_is_written_as_it_is() -> None:
    display, out = _display(terminal=False)
    display.line("data", "[red]10 rows[/red] of " + "a/very/long/path/" * 12)
    assert out.getvalue() == "data      [red]10 rows[/red] of " + "a/very/long/path/" * 12 + "\n"


@pytest.mark.parametrize(("steps", "lines"), [(3, 3), (10, 10), (100, 10), (105, 11), (1, 1)])
def test_without_a_terminal_about_ten_steps_and_the_last_are_told(steps: int, lines: int) -> None:
    display, out = _display(terminal=False)
    with display.training(steps, 0) as bar:
        for step in range(1, steps + 1):
            bar.advance(RECORD | {"step": step})
    told = out.getvalue().splitlines()
    assert len(told) == lines
    assert told[-1].startswith(f"step {steps}")
    assert "loss 1.5000  lr 2.0e-04  600 tok/s  0 s left" in told[-1]


def test_on_a_terminal_a_bar_shows_loss_rate_and_speed() -> None:
    display, out = _display(terminal=True)
    with display.training(4, 2) as bar:
        bar.advance(RECORD | {"step": 3})
    assert "3/4" in out.getvalue()
    assert "loss 1.5000  lr 2.0e-04  600 tok/s" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (91_000_000, "91.0 MB"), (2.5e9, "2.50 GB"), (8e13, "80000.00 GB")],
)
def test_bytes_are_told_in_the_unit_that_fits(count: float, text: str) -> None:
    assert human_bytes(count) == text
