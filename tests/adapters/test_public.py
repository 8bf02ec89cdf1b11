import subprocess
import sys
from pathlib import Path

import pytest

import onegpu.adapters as public

FOLDER = Path(public.__file__).parent


def test_the_public_surface_names_each_thing_once() -> None:
    assert len(public.__all__) == len(set(public.__all__)) > 20


@pytest.mark.parametrize("name", public.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(public, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = public.no_such_thing


def test_no_public_name_hides_a_module() -> None:
    stems = {path.stem for path in FOLDER.glob("*.py")}
    assert {"stack", "artefact"} <= stems
    assert not stems & set(public.__all__)


def test_listing_what_is_installed_imports_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys; from onegpu.adapters import ADAPTERS, entries\n"
        "print(*[e.name for e in entries(ADAPTERS)])\n"
        "print(*sorted({'torch', 'pydantic', 'transformers', 'bitsandbytes'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, imported = done.stdout.splitlines()
    assert {"lora", "prefix", "nf4"} <= set(names.split())
    assert imported == ""
