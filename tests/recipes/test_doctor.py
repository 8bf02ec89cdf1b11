import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onegpu.adapters import ADAPTERS
from onegpu.recipes import doctor
from onegpu.recipes.doctor import examine

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))


def test_everything_works_here() -> None:
    found = examine()
    assert [finding for finding in found if not finding.ok] == []
    assert {f.what for f in found} >= {"torch", "device", "precision", "packing", "8-bit adamw", "cache", "nf4", "chat"}


def test_a_check_that_fails_in_any_way_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, declare: Callable[..., None], onegpu: Command
) -> None:
    def broken() -> str:
        raise OSError("no kernel for this")

    monkeypatch.setattr(doctor, "_packing", broken)
    monkeypatch.setattr(doctor, "_eight_bit_step", broken)
    declare(ADAPTERS, "toy", "onegpu_no_such_module:Toy")
    code, out, _ = onegpu("doctor")
    assert code == 3
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 3
    assert "OSError: no kernel for this" in failed[0]
    assert "toy of other 1.0 is broken: ModuleNotFoundError" in failed[2]


def test_findings_are_json_on_demand(onegpu: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_packing", lambda: "not looked at")
    code, out, _ = onegpu("doctor", "--json")
    assert code == 0
    assert {"what": "packing", "ok": True, "detail": "not looked at"} in json.loads(out)


def test_a_library_that_is_not_there_is_a_finding(onegpu: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "a-library-of-nobody"))
    monkeypatch.setattr(doctor, "_packing", lambda: "not looked at")
    code, out, _ = onegpu("doctor")
    assert code == 3
    (failed,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert "pip install a-library-of-nobody" in failed
