"""30. Adding a method from outside.

Met: a closed list of types, a fork of the library, a registration that the command line does not see, a broken package
that takes everything down with it.

Here: an entry point and one class are a plugin, trained by name from a recipe, saved with the distribution it needs,
and proved by a suite that its author runs with one line; a broken one fails only who asks for it, and names are unique.

Also: tests/recipes/test_plugins.py (real wheels), tests/adapters/conformance/test_suite.py (seeded defects),
tests/adapters/test_registry.py
"""

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from onegpu.adapters import (
    Adapter,
    Attachment,
    Context,
    PluginError,
    artefact,
    attach,
    linear_shape,
    load,
    registry,
    resolve,
    save,
)
from onegpu.adapters.conformance import prove
from onegpu.recipes import Loaded, Outcome

Fresh = Callable[..., PreTrainedModel]


class Gain(Adapter):
    """Each output of the chosen linears times a learned gain (https://arxiv.org/abs/2205.05638)."""

    api = 1

    targets: list[str] = ["down_proj"]
    """Names of the linears whose outputs it scales."""

    def attach(self, model: nn.Module, context: Context) -> "Gains":
        return Gains(context.name, self, model, resolve(model, self.targets))


def _outputs(layer: nn.Module) -> int:
    shape = linear_shape(layer)
    assert shape is not None
    return shape[1]


class Gains(Attachment):
    """One named instance."""

    def __init__(self, name: str, adapter: Adapter, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__(name, adapter, model)
        self.on, self.hooks = True, list[Any]()
        for path, layer in layers.items():
            gain = self.parameters[f"{path}.gain.{name}"] = nn.Parameter(torch.ones(_outputs(layer)))
            self.hooks.append(layer.register_forward_hook(lambda m, x, y, gain=gain: y * gain.to(y) if self.on else y))

    def enabled(self, on: bool) -> None:
        self.on = on

    def detach(self) -> None:
        [hook.remove() for hook in self.hooks]


class Sticky(Gain):
    """The same with five seeded defects."""

    def attach(self, model: nn.Module, context: Context) -> "Gains":
        return StickyGains(context.name, self, model, resolve(model, self.targets))


class StickyGains(Gains):
    """Not the base at its start, changes the base, cannot be switched off or detached, saves something else."""

    def __init__(self, name: str, adapter: Adapter, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__(name, adapter, model, layers)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(1.1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in super().tensors().items()}

    def enabled(self, on: bool) -> None: ...

    def detach(self) -> None: ...

    def after_step(self, step: int) -> None:
        with torch.no_grad():
            self.model.get_input_embeddings().weight.add_(1e-3)  # type: ignore[operator]


class _Distribution(metadata.Distribution):
    """A distribution that is installed nowhere."""

    def __init__(self, name: str) -> None:
        self.text = f"Name: {name}\nVersion: 1.0\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`publish("gain", "toys:Gain", "toy")`: an entry point, as an installed distribution declares it."""
    real, made = metadata.entry_points, list[metadata.EntryPoint]()
    module = ModuleType("toys")
    vars(module).update(Gain=Gain, Sticky=Sticky)
    monkeypatch.setitem(sys.modules, "toys", module)
    for toy in (Gain, Sticky, Gains, StickyGains):
        monkeypatch.setattr(toy, "__module__", "toys")

    def add(name: str, value: str, distribution: str) -> None:
        point = metadata.EntryPoint(name, value, "onegpu.adapters")
        vars(point).update(dist=_Distribution(distribution))
        made.append(point)
        registry.entry_of.cache_clear()

    def found(*, group: str) -> list[metadata.EntryPoint]:
        return [*real(group=group), *(point for point in made if point.group == group)]

    monkeypatch.setattr(metadata, "entry_points", found)
    yield add
    made.clear()
    registry.entry_of.cache_clear()


def test_it_is_listed_trained_by_name_saved_and_needed_by_name(
    publish: Any,
    recipe: Callable[..., Loaded],
    run: Callable[..., Outcome],
    onegpu: Any,
    fresh: Fresh,
    monkeypatch: Any,
) -> None:
    publish("gain", "toys:Gain", "toy")
    code, shown, _ = onegpu("adapters")
    assert code == 0
    assert "gain" in shown
    assert "toy" in shown
    adapter = run(recipe([{"gain": {"targets": ["o_proj"]}}])).adapter
    (record,) = artefact.read(adapter).manifest.adapters
    assert (record.adapter, record.distribution, record.version) == ("gain", "toy", "1.0")
    assert load(fresh(), adapter).trainable()
    monkeypatch.undo()  # uninstalled
    registry.entry_of.cache_clear()
    with pytest.raises(PluginError, match=r"needs the plugin toy 1\.0 for 'gain'; try `pip install 'toy>=1\.0'`"):
        load(fresh(), adapter)


def test_a_broken_one_fails_only_who_asks_for_it(
    publish: Any, recipe: Callable[..., Loaded], run: Callable[..., Outcome], onegpu: Any
) -> None:
    publish("broken", "module_that_is_nowhere:Adapter", "sad")
    assert onegpu("adapters")[0] == 0
    assert run(recipe()).adapter.is_dir()
    with pytest.raises(PluginError, match=r"broken.*sad"):
        recipe(["broken"])


def test_one_name_from_two_distributions_is_an_error_naming_both(publish: Any, fresh: Fresh) -> None:
    publish("gain", "toys:Gain", "toy")
    publish("gain", "toys:Gain", "other-toy")
    with pytest.raises(PluginError, match=r"(?s)other-toy.*toy|toy.*other-toy"):
        attach(fresh(), ["gain"])
    assert attach(fresh(), ["toy:gain"]).trainable()


def test_the_suite_passes_a_healthy_one_and_finds_every_seeded_defect(publish: Any, fresh: Fresh) -> None:
    publish("gain", "toys:Gain", "toy")
    publish("sticky", "toys:Sticky", "toy")
    checks = ["configuration", "identity", "trainable", "frozen base", "disabling", "detaching", "resuming"]
    assert prove("gain", checks=checks).failures == {}
    assert prove("sticky", checks=checks).failures.keys() >= {
        *("identity", "frozen base", "disabling", "detaching", "resuming")
    }


def test_an_outside_method_is_saved_and_loaded(
    publish: Any, fresh: Fresh, tmp_path: Path, noise: Any, logits: Any
) -> None:
    publish("gain", "toys:Gain", "toy")
    model = fresh()
    stack = attach(model, ["gain"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    again = fresh()
    load(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
