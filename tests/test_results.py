"""The page of results says what the kept runs say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_results_is_what_the_command_writes(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    subprocess.run([sys.executable, ROOT / "benchmarks/tasks.py", "table", page], check=True)
    assert page.read_text("utf-8") == (ROOT / "docs/results.md").read_text("utf-8")
