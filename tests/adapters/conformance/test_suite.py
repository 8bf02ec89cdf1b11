"""The conformance suite proves what is right, and catches what is broken: one seeded defect at a time."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import SkipTest

import pytest

from onegpu.adapters import registry
from onegpu.adapters.conformance import CHECKS, Conformance, prove

HERE = Path(__file__).parent
README = HERE.parents[2] / "README.md"


@dataclass(frozen=True)
class Defect:
    """A change to the healthy adapter, the check that must catch it, and what that must say."""

    old: str
    new: str
    check: str
    says: str


DEFECTS: dict[str, Defect] = {
    "no-docstring": Defect(
        '    """Names of the linears that are changed."""\n',
        "",
        "configuration",
        "'targets' has no docstring",
    ),
    "lax-keys": Defect(
        "    api = 1\n",
        '    api = 1\n    model_config = {"extra": "ignore"}\n',
        "configuration",
        "an unknown key is accepted",
    ),
    "changeable": Defect(
        "    api = 1\n",
        '    api = 1\n    model_config = {"frozen": False}\n',
        "configuration",
        "settings can be changed",
    ),
    "tuple-setting": Defect(
        'targets: str | list[str] = "all-linear"',
        'targets: tuple[str, ...] = ("down_proj",)',
        "configuration",
        "valid tuple",
    ),
    "breaks-on-encoders": Defect(
        "            shape = linear_shape(layer)\n",
        '            shape = linear_shape(layer)\n            assert "bert" not in path, path\n',
        "bert",
        "failed in attach: AssertionError: bert.encoder.layer.0",
    ),
    "not-identity": Defect(
        "torch.zeros(shape[1], device", "torch.full((shape[1],), 0.1, device", "identity", "changes the base's outputs"
    ),
    "hidden-tensor": Defect(
        "y + low.unsqueeze(-1) * b.to(y)",
        "y + low.unsqueeze(-1) * b.to(y) + kept.setdefault(path, nn.Parameter(torch.zeros(1))).to(y)",
        "trainable",
        "14 tensors are trained that trainable() does not give",
    ),
    "undeclared-tensor": Defect(
        "            self.layers[path] = (layer, a, b)\n",
        "            self.layers[path] = (layer, a, b)\n"
        '            layer.register_parameter("stray", nn.Parameter(torch.zeros(1)))\n',
        "trainable",
        "model.layers.0.self_attn.q_proj.stray requires a gradient",
    ),
    "no-gradient": Defect("x @ a.to(x)", "x @ a.detach().to(x)", "trainable", "q_proj.a.no-gradient had no gradient"),
    "rests-for-ever": Defect(
        "if not b.any())", ")", "trainable", "q_proj.a.rests-for-ever rests for 16 steps: it is never trained"
    ),
    "half-tensors": Defect("device=device))", "device=device).half())", "trainable", "is torch.float16, and float32"),
    "changes-the-base": Defect(
        "        self.steps += 1\n",
        "        self.steps += 1\n"
        '        self.model.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(1.001)\n',
        "frozen base",
        "training changes the base: model.layers.1.mlp.up_proj.weight has other values",
    ),
    "ignores-its-seed": Defect(
        "torch.Generator().manual_seed(context.seed)", "None", "seeds", "starts otherwise although the seed is the same"
    ),
    "restless-rates": Defect(
        "    def attach(self, model",
        "    def rates(self, rates: Any, layers: Layers) -> Any:\n"
        "        return {name: Rate(multiplier=float(torch.rand(()))) for name in rates}\n\n"
        "    def attach(self, model",
        "rates",
        "gives other rates when it is asked again",
    ),
    "wrong-cost": Defect(
        "    def attach(self, model",
        "    def cost(self, skeleton: nn.Module) -> Cost:\n"
        "        return Cost(weights=100)\n\n"
        "    def attach(self, model",
        "cost",
        "cost() says 100 bytes of weights, and a run takes 32,768",
    ),
    "fixed-device": Defect(
        "torch.zeros(shape[1], device=device)",
        "torch.zeros(shape[1])",
        "cost",
        "q_proj.b.fixed-device is not made on the device of the model",
    ),
    "forgets-a-tensor": Defect(
        '            found[f"base_model.model.{path}.lora_A.weight"] = a.detach().view(1, -1)\n',
        "",
        "saving",
        "loaded in a fresh process, it gives other outputs",
    ),
    "ignores-the-file": Defect(
        "    def enabled(self",
        "    def load_tensors(self, tensors: Any) -> None:\n        pass\n\n    def enabled(self",
        "saving",
        "loaded in a fresh process, it gives other outputs",
    ),
    "never-the-same-file": Defect(
        'return {"targets": sorted(self.layers)}',
        'return {"drawn": float(torch.rand(()))}',
        "saving",
        "saved twice, manifest.json has other bytes",
    ),
    "forgets-its-state": Defect(
        'return {"steps": self.steps}', 'return {"steps": 0}', "resuming", "saving, resuming and three more"
    ),
    "other-than-peft": Defect('"lora_alpha": 1', '"lora_alpha": 2', "peft", "PEFT's logits differ by"),
    "leaves-a-hook": Defect(
        "for hook in self.hooks:",
        "self.on = False\n        for hook in self.hooks[1:]:",
        "detaching",
        "module model.layers.0.self_attn.q_proj was Linear and is Linear, 1 of _forward_hooks",
    ),
    "stays-on": Defect("        self.on = on\n", "        pass\n", "disabling", "switched off, it still changes"),
    "merges-too-much": Defect("torch.outer(b, a)", "torch.outer(b, a), alpha=2", "merging", "merged logits differ by"),
    "merges-into-a-packed-base": Defect(
        'raise StackError(f"{self.name}: a packed base cannot take it up")',
        "continue",
        "merging",
        "merging into a packed base is not refused",
    ),
    "stays-after-merging": Defect(
        "        self.detach()\n\n    def detach(self",
        '        self.model.add_module("leftover", nn.Linear(1, 1))\n        self.detach()\n\n    def detach(self',
        "merging",
        "after merging, leftover is not as it was",
    ),
    "looks-at-its-batch": Defect(
        "(x,) = args", "x = args[0] + 0.1 * args[0].mean(0, keepdim=True)", "accumulation", "cut into (3, 3)"
    ),
    "leaks-between-rows": Defect(
        "(x,) = args",
        "x = args[0] + 0.1 * args[0].cumsum(1)",
        "packing",
        "row 1 packed behind others gets other",
    ),
    "keeps-activations": Defect(
        "            low = x @ a.to(x)\n",
        "            low = x @ a.to(x)\n"
        "            if self.model.training and not torch.is_grad_enabled():\n"
        "                kept[path] = low\n"
        "            elif path in kept:\n"
        "                low = kept.pop(path)\n",
        "checkpointing",
        "with checkpointing (reentrant, switched on after attaching): only one of the two has",
    ),
    "floats-only": Defect(
        "            shape = linear_shape(layer)\n",
        "            shape = linear_shape(layer)\n            assert type(unwrap(layer)) is nn.Linear\n",
        "packed bases",
        "failed in attach",
    ),
    "widens-outputs": Defect(
        "y + low.unsqueeze(-1) * b.to(y)", "y + low.unsqueeze(-1) * b", "half bases", "to have the same dtype"
    ),
    "overflows": Defect(
        "low = x @ a.to(x)",
        "low = (x * 60000) @ a.to(x) / 60000",
        "half bases",
        "on a fp16 base the outputs are",
    ),
    "shares-a-tensor": Defect(
        "            b = nn.Parameter(",
        '            a = vars(layer).setdefault("shared", a)\n            b = nn.Parameter(',
        "two instances",
        "two instances share a tensor",
    ),
    "one-switch-for-all": Defect(
        "            if not self.on:\n",
        "            kept[self.name] = self.on\n            if not all(kept.values()):\n",
        "two instances",
        "with 'second' switched off, the other one is not as if alone",
    ),
}


def _module(name: str) -> str:
    return "defect_" + name.replace("-", "_")


@pytest.fixture(scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distribution with the healthy adapters and every broken one, as pip would leave it."""
    root = tmp_path_factory.mktemp("site-packages")
    healthy = (HERE / "ray.py").read_text("utf-8")
    (root / "healthy_ray.py").write_text(healthy, "utf-8")
    gain = README.read_text("utf-8").partition("<!-- an adapter -->")[2]
    block = re.search(r"```python\n(.*?)```", gain, re.DOTALL)
    assert block
    (root / "readme_gain.py").write_text(block.group(1), "utf-8")
    refusing = "encoders=False, decoders=False, encoder_decoder=False, reasons={'decoders': 'it has no legs'}"
    (root / "refuses_all.py").write_text(healthy.replace("mergeable=True, peft_readable=True", refusing), "utf-8")
    points = ["ray = healthy_ray:Ray", "gain = readme_gain:Gain", "refuses = refuses_all:Ray"]
    for name, defect in DEFECTS.items():
        assert healthy.count(defect.old) == 1, f"{name} would break nothing"
        broken = healthy.replace(defect.old, defect.new).replace("class Rays", "kept: Any = {}\n\n\nclass Rays")
        (root / f"{_module(name)}.py").write_text(broken, "utf-8")
        points.append(f"{name} = {_module(name)}:Ray")
    info = root / "seeded_defects-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seeded-defects\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[onegpu.adapters]\n" + "\n".join(points) + "\n", "utf-8")
    sys.path.append(str(root))
    importlib.invalidate_caches()
    registry.entry_of.cache_clear()
    yield
    sys.path.remove(str(root))
    importlib.invalidate_caches()
    registry.entry_of.cache_clear()


@pytest.mark.usefixtures("_installed")
def test_a_healthy_adapter_proves_everything() -> None:
    report = prove("ray")
    assert report.failures == {}
    declared = [name for name, outcome in report.outcomes.items() if outcome.status == "declared"]
    assert declared == ["packed weights"]


@pytest.mark.usefixtures("_installed")
def test_the_adapter_in_the_readme_conforms() -> None:
    report = prove("gain")
    assert report.failures == {}
    declared = {name: outcome.reason for name, outcome in report.outcomes.items() if outcome.status == "declared"}
    assert declared.keys() == {"bert", "t5", "packed weights", "peft", "merging"}
    assert "target 'down_proj' matches no linear layer" in declared["bert"]


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", DEFECTS)
def test_a_seeded_defect_is_caught_by_its_check(name: str) -> None:
    defect = DEFECTS[name]
    failures = prove(name, checks=[defect.check]).failures
    assert failures.keys() == {defect.check}
    assert defect.says in failures[defect.check]


def test_the_defects_cover_the_checks() -> None:
    caught = {defect.check for defect in DEFECTS.values()}
    # No adapter can be lax about files, since the house compares them; the others are proved on the built-in ones.
    assert CHECKS.keys() - caught == {"listing", "llama", "t5", "strictness", "packed weights", "two saved"}


def test_an_adapter_that_nobody_declares_is_caught() -> None:
    failures = prove("nobody", checks=["listing", "identity"]).failures
    assert all("no adapter is called 'nobody'" in message for message in failures.values())
    assert failures.keys() == {"listing", "identity"}


@pytest.mark.usefixtures("_installed")
def test_one_that_declares_no_kind_of_model_only_has_to_explain_itself() -> None:
    outcomes = prove("refuses").outcomes
    assert {name for name, outcome in outcomes.items() if outcome.status == "proved"} == {"listing", "configuration"}
    assert {outcome.reason for outcome in outcomes.values() if outcome.status == "declared"} == {"it has no legs"}
    assert {outcome.status for outcome in outcomes.values()} == {"proved", "declared"}


@pytest.mark.usefixtures("_installed")
def test_one_that_works_nowhere_is_no_adapter() -> None:
    failures = prove("gain", {"targets": ["nothing"]}, checks=["trainable", "llama"]).failures
    assert "gain works on none of the tiny models" in failures["trainable"]
    assert failures.keys() == {"trainable", "llama"}


def test_each_check_is_a_method_with_a_line_of_its_own() -> None:
    class Recording(Conformance):
        adapter = "lora"

        def _prove(self, check: str) -> None:
            asked.append(check)

    asked: list[str] = []
    methods = {name: m for name, m in inspect.getmembers(Recording, inspect.isfunction) if name.startswith("test_")}
    for method in methods.values():
        assert method.__doc__
        assert len(method.__doc__.strip().splitlines()) == 1
        method(Recording())
    assert sorted(asked) == sorted(CHECKS)
    assert all(check.proves for check in CHECKS.values())


def test_a_declaration_is_a_skipped_test_with_its_reason() -> None:
    class Prefix(Conformance):
        adapter = "prefix"

    with pytest.raises(SkipTest, match="prefix declares: a fresh one changes the outputs"):
        Prefix().test_a_fresh_one_changes_no_output()


class TestPrefix(Conformance):
    """As the author of a plugin would write it."""

    adapter = "prefix"
    config: ClassVar[dict[str, Any]] = {"length": 3}


def test_the_suite_needs_no_pytest() -> None:
    modules: list[ModuleType] = [importlib.import_module("onegpu.adapters.conformance")]
    assert not any("pytest" in inspect.getsource(module).split('"""', 2)[2] for module in modules)
