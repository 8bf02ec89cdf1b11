import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onegpu.adapters import ADAPTERS, API, RECIPES, TASKS, Adapter, PluginError, entries, get
from onegpu.adapters.registry import VARIABLE, entry_of, find, load, unmatched, unqualified

BUILT_IN = {"lora", "prefix", "layerwise-lr", "full", "int8", "nf4", "fp4"}
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

Declare = Callable[..., None]


class ByHand(Distribution):
    """A distribution that is installed nowhere."""

    def __init__(self, name: str, version: str) -> None:
        self.text = f"Name: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


class Toy(Adapter):
    api = 1


class Old(Adapter):
    api = API - 1


class New(Adapter):
    api = API + 1


class Silent(Adapter):
    """States no level at all."""


@pytest.fixture(autouse=True)
def _all_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """`declare(("toy", "plug:Toy", "toy-dist", "1.0"), ...)` makes these the only entry points there are."""

    def only(*declarations: tuple[str, str, str, str]) -> None:
        points = []
        for name, value, distribution, version in declarations:
            point = EntryPoint(name, value, ADAPTERS)
            vars(point).update(dist=ByHand(distribution, version))
            points.append(point)
        monkeypatch.setattr(metadata, "entry_points", lambda *, group: [p for p in points if p.group == group])

    return only


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module that holds the classes above."""
    module = ModuleType("onegpu_test_plug")
    vars(module).update(Toy=Toy, Old=Old, New=New, Silent=Silent)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_the_built_in_adapters_are_declared_like_a_third_partys_and_load() -> None:
    ours = [entry for entry in entries(ADAPTERS) if entry.distribution == "onegpu"]
    assert {entry.name for entry in ours} >= BUILT_IN
    for entry in ours:
        assert issubclass(get(entry.name), Adapter)
        assert entry.version == metadata.version("onegpu")


@pytest.mark.parametrize("group", [ADAPTERS, TASKS, RECIPES])
def test_what_is_installed_is_what_the_project_declares(group: str) -> None:
    """They differ after an edit of pyproject.toml without a new installation, or when an old one shadows it."""
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"].get(group, {})
    installed = {entry.name: entry.value for entry in entries(group) if entry.distribution == "onegpu"}
    assert installed == declared


def test_a_listing_is_sorted_and_knows_distribution_and_version(declare: Declare) -> None:
    declare(("b", "m:B", "two", "2.0"), ("a", "m:A", "one", "1.0"))
    assert [(entry.name, entry.origin, entry.value) for entry in entries(ADAPTERS)] == [
        ("a", "one 1.0", "m:A"),
        ("b", "two 2.0", "m:B"),
    ]


def test_a_listing_imports_no_plugin(declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_plugin.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    declare(("loud", "loud_plugin:Loud", "loud", "1"))
    assert [entry.name for entry in entries(ADAPTERS)] == ["loud"]
    assert "loud_plugin" not in sys.modules


def test_an_unknown_name_is_answered_with_the_nearest(declare: Declare) -> None:
    declare(("toy", "m:Toy", "toys", "1"), ("other", "m:Other", "toys", "1"))
    with pytest.raises(
        PluginError, match=r"no adapter is called 'tpy'; did you mean 'toy'\? \(valid: other, toy\)"
    ) as e:
        find(ADAPTERS, "tpy")
    assert e.value.exit_code == 3


def test_a_name_offered_twice_names_both_and_how_to_pick(declare: Declare) -> None:
    declare(("lora", "m:A", "onegpu", "0.1"), ("lora", "m:B", "rival", "2.0"))
    with pytest.raises(PluginError, match=r"onegpu 0.1 and rival 2.0; write onegpu:lora or rival:lora"):
        find(ADAPTERS, "lora")


def test_a_distribution_before_the_name_picks_one(declare: Declare) -> None:
    declare(("lora", "m:A", "onegpu", "0.1"), ("lora", "m:B", "rival", "2.0"))
    assert find(ADAPTERS, "rival:lora").value == "m:B"
    assert find(ADAPTERS, "onegpu:lora").value == "m:A"


@pytest.mark.parametrize("written", ["My_Package:toy", "my-package:toy", "MY.PACKAGE:toy"])
def test_a_distribution_may_be_written_as_pip_lets_one_write_it(declare: Declare, written: str) -> None:
    declare(("toy", "m:A", "my-package", "1"), ("toy", "m:B", "other", "1"))
    assert find(ADAPTERS, written).value == "m:A"


def test_a_distribution_that_does_not_offer_the_name_is_refused(declare: Declare) -> None:
    declare(("lora", "m:A", "onegpu", "0.1"))
    with pytest.raises(PluginError, match="no adapter is called 'nobody:lora'"):
        find(ADAPTERS, "nobody:lora")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom\\nsecond line')", "RuntimeError: boom"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("Wrong = 1", "AttributeError"),
        ("class Thing: pass", "broken_plugin:Thing is no Adapter"),
        ("Thing = 3", "broken_plugin:Thing is no Adapter"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_broken_plugin_is_named_with_its_reason(
    declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    (tmp_path / "broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    declare(("thing", "broken_plugin:Thing", "faulty", "3.1"))
    with pytest.raises(PluginError) as caught:
        get("thing")
    sys.modules.pop("broken_plugin", None)
    assert str(caught.value).startswith("thing of faulty 3.1 is broken: ")
    assert reason in str(caught.value)
    assert "second line" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_module_is_a_broken_plugin(declare: Declare) -> None:
    declare(("gone", "no_such_module_anywhere:Gone", "faulty", "3.1"))
    with pytest.raises(PluginError, match=r"gone of faulty 3\.1 is broken: ModuleNotFoundError"):
        get("gone")


def test_a_broken_plugin_does_not_disturb_another(declare: Declare, plug: str) -> None:
    declare(("gone", "no_such_module_anywhere:Gone", "faulty", "3.1"), ("toy", f"{plug}:Toy", "toys", "1"))
    assert [entry.name for entry in entries(ADAPTERS)] == ["gone", "toy"]
    assert get("toy") is Toy


@pytest.mark.parametrize(
    ("name", "side"),
    [("Old", "upgrade toys"), ("New", "upgrade onegpu"), ("Silent", "upgrade toys")],
)
def test_another_api_level_says_which_side_to_upgrade(declare: Declare, plug: str, name: str, side: str) -> None:
    declare(("toy", f"{plug}:{name}", "toys", "1"))
    with pytest.raises(PluginError, match=rf"onegpu speaks {API}: {side}$") as caught:
        get("toy")
    assert caught.value.exit_code == 3


def test_the_declaration_of_a_class_is_found_again() -> None:
    entry = entry_of(ADAPTERS, get("nf4"))
    assert entry is not None
    assert (entry.name, entry.distribution) == ("nf4", "onegpu")
    assert entry_of(ADAPTERS, Toy) is None


def test_an_entry_point_made_by_hand_has_no_distribution(monkeypatch: pytest.MonkeyPatch, plug: str) -> None:
    point = EntryPoint("toy", f"{plug}:Toy", ADAPTERS)
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [point])
    (entry,) = entries(ADAPTERS)
    assert entry.origin == "unknown 0"
    assert load(entry, Adapter) is Toy


def test_a_half_removed_distribution_does_not_end_the_listing(monkeypatch: pytest.MonkeyPatch, plug: str) -> None:
    class Gone(ByHand):
        def read_text(self, filename: str) -> str | None:
            return None

    point = EntryPoint("toy", f"{plug}:Toy", ADAPTERS)
    vars(point).update(dist=Gone("gone", "1"))
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [point])
    (entry,) = entries(ADAPTERS)
    assert entry.origin == "unknown 0"


def test_the_description_of_a_distribution_is_parsed_once_for_all_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(ByHand):
        reads = 0

        def read_text(self, filename: str) -> str | None:
            Counted.reads += filename == "METADATA"
            return super().read_text(filename)

    dist, points = Counted("many", "1"), [EntryPoint(f"toy-{i}", "m:Toy", ADAPTERS) for i in range(60)]
    for point in points:
        vars(point).update(dist=dist)
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: points)
    assert len(entries(ADAPTERS)) == 60
    assert Counted.reads <= 2


# --- what a class declares about itself is read when it is made -------------------------------------------------------


@pytest.mark.parametrize(
    "capabilities",
    [
        "property(lambda self: 1 / 0)",
        "{'trains': True}",
        "Capabilities(trians=True)",
        "type('Late', (), {'__get__': lambda *a: 1 / 0})()",
    ],
)
def test_a_class_whose_capabilities_cannot_be_read_is_broken(
    declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str
) -> None:
    (tmp_path / "odd_plugin.py").write_text(
        "from onegpu.adapters import Adapter, Capabilities\n"
        f"class Odd(Adapter):\n    api = 1\n    capabilities = {capabilities}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    declare(("odd", "odd_plugin:Odd", "faulty", "3.1"))
    with pytest.raises(PluginError, match=r"odd of faulty 3\.1 is broken: "):
        get("odd")
    sys.modules.pop("odd_plugin", None)


# --- ONEGPU_PLUGINS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("", {"lora", "toy", "other"}),
        ("  ", {"lora", "toy", "other"}),
        ("none", {"lora"}),
        (" none ", {"lora"}),
        ("toy", {"lora", "toy"}),
        ("toys", {"lora", "toy"}),
        ("TOYS", {"lora", "toy"}),
        ("toys:toy", {"lora", "toy"}),
        ("My_Dist", {"lora", "other"}),
        ("my-dist:other", {"lora", "other"}),
        ("my-dist:toy", {"lora"}),
        ("toy, other", {"lora", "toy", "other"}),
        ("other,", {"lora", "other"}),
        (",", {"lora"}),
        ("None", {"lora"}),
        ("onegpu", {"lora"}),
        ("to", {"lora"}),
        ("toy:", {"lora"}),
    ],
)
def test_the_variable_limits_what_may_load(
    declare: Declare, monkeypatch: pytest.MonkeyPatch, value: str, allowed: set[str]
) -> None:
    declare(("lora", "m:L", "onegpu", "0.1"), ("toy", "m:T", "toys", "1"), ("other", "m:O", "my.dist", "1"))
    monkeypatch.setenv(VARIABLE, value)
    assert {entry.name for entry in entries(ADAPTERS)} == {"lora", "toy", "other"}  # listed all the same
    assert {entry.name for entry in entries(ADAPTERS) if entry.allowed} == allowed


def test_what_may_not_load_is_not_imported_and_the_variable_is_named(
    declare: Declare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud_plugin.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    declare(("loud", "loud_plugin:Loud", "louds", "1"), ("quiet", "m:Q", "quiets", "1"))
    for value, wider in (("none", "loud"), ("quiet", "quiet,loud")):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(
            PluginError, match=rf"^loud of louds 1 is not allowed by {VARIABLE}={value}; .* set {VARIABLE}={wider}$"
        ) as caught:
            get("loud")
        assert caught.value.exit_code == 3
    assert "loud_plugin" not in sys.modules


def test_what_may_not_load_makes_no_name_ambiguous(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(("lora", "m:A", "onegpu", "0.1"), ("lora", "m:B", "rival", "2.0"), ("lora", "m:C", "third", "2.0"))
    ours, theirs, _ = entries(ADAPTERS)
    monkeypatch.setenv(VARIABLE, "none")
    assert find(ADAPTERS, "lora").distribution == "onegpu"
    assert unqualified(ours, entries(ADAPTERS))
    monkeypatch.setenv(VARIABLE, "rival")  # then it could be meant
    with pytest.raises(PluginError, match=r"offered by onegpu 0\.1 and rival 2\.0; write onegpu:lora or rival:lora"):
        find(ADAPTERS, "lora")
    assert not unqualified(theirs, entries(ADAPTERS))


def test_a_typing_error_in_the_variable_is_told(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(("toy", "m:T", "toys", "1"), ("lora", "m:L", "onegpu", "0.1"))
    assert unmatched() == []
    for right in ("none", "toy", "toys", "lora", "onegpu", ""):
        monkeypatch.setenv(VARIABLE, right)
        assert unmatched() == []
    monkeypatch.setenv(VARIABLE, "tyo,toy")
    (told,) = unmatched()
    assert told.startswith(f"{VARIABLE} lists 'tyo', and no plugin is called that; did you mean 'toy'?")
    monkeypatch.setenv(VARIABLE, "tyo")
    with pytest.raises(PluginError, match="lists 'tyo', and no plugin is called that; did you mean 'toy'"):
        get("toy")
