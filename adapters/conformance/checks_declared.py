"""Checks of what an adapter says about itself: its entry point, its settings, its costs, its start, its rates."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import registry
from ..contract import Adapter, Context, Cost
from ..errors import StackError, TargetError
from ..frozen_linear import FrozenLinear, packed_as
from ..registry import ADAPTERS, API
from ..specs import get
from ..structure import Layers, modules, unwrap, weight
from . import tiny_models
from .case import SEED, Case, Declared, Loop, Snapshot, adapters_only, assert_equal
from .tiny_models import Family

__all__ = ["configuration", "costs", "listing", "packs", "rates", "seeds", "trains_on"]

LISTING = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from onegpu.adapters import ADAPTERS, entries
names = [name for e in entries(ADAPTERS) for name in (e.name, f"{e.distribution}:{e.name}")]
print(json.dumps([names, sorted({"torch", "pydantic", "transformers"} & set(sys.modules))]))
"""
STEPS_FOR_COSTS = 3
ROUNDED = 0.2  # of its norm may a packed weight be away; four bits give about 0.1


def listing(case: Case) -> None:
    """An installed distribution declares it, and listing what is installed imports nothing heavy."""
    run = subprocess.run(
        [sys.executable, "-c", LISTING, json.dumps(sys.path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"listing what is installed fails: {run.stderr.strip().splitlines()[-1]}"
    names, heavy = json.loads(run.stdout.splitlines()[-1])
    assert case.adapter in names, f"no installed distribution declares {case.adapter!r} in the group {ADAPTERS!r}"
    assert not heavy, f"listing what is installed imports {', '.join(heavy)}"
    entry = registry.find(ADAPTERS, case.adapter)
    found = registry.entry_of(ADAPTERS, get(case.adapter))
    assert found == entry, f"{entry.value} is re-exported from elsewhere: name the module that defines the class"


def configuration(case: Case) -> None:
    """Settings are complete, strict, frozen, documented, and survive JSON unchanged."""
    kind = case.adapter_class
    adapter = case.build()
    assert kind.api == API, f"api is {kind.api}, and {API} is spoken here"
    assert (kind.__doc__ or "").strip(), f"{kind.__name__} has no docstring: its first line is what users are told"
    again = kind.model_validate(json.loads(json.dumps(adapter.model_dump(mode="json"))))
    assert again == adapter, f"settings change on their way through JSON: {adapter!r} became {again!r}"
    _assert_refused(lambda: kind.model_validate({**case.config, "no_such_setting": 1}), "an unknown key is accepted")
    _assert_refused(lambda: setattr(adapter, "name", "other"), "settings can be changed after they were checked")
    properties = kind.model_json_schema()["properties"]
    bare = [name for name, schema in properties.items() if not str(schema.get("description", "")).strip()]
    assert not bare, f"the setting {bare[0]!r} has no docstring"


def _assert_refused(attempt: Callable[[], object], otherwise: str) -> None:
    try:
        attempt()
    except ValidationError:
        return
    raise AssertionError(otherwise)


def trains_on(family: Family) -> Callable[[Case], None]:
    """The check that it trains on one kind of model, or refuses it with a reason."""

    def check(case: Case) -> None:
        here = replace(case, family=family)
        try:
            stack = here.start()
        except (StackError, TargetError) as refusal:
            raise Declared(str(refusal)) from None
        before = {name: p.detach().clone() for name, p in stack.trainable().items()}
        loop = Loop(stack, family)
        first = loop.backward()
        assert torch.isfinite(first), f"the loss on {family} is {first.item()}"
        loop.update()
        loop.run(1)
        moved = [name for name, p in adapters_only(stack).items() if not torch.equal(p, before[name])]
        assert moved, f"nothing moved in two steps on {family}"
        bad = next((name for name, p in stack.trainable().items() if not torch.isfinite(p).all()), None)
        assert bad is None, f"{bad} is not finite after two steps on {family}"
        assert torch.isfinite(here.logits(stack.model)).all(), f"logits on {family} are not finite"

    check.__doc__ = f"It trains on a {family} model, or says why not."
    return check


def seeds(case: Case) -> None:
    """Equal seeds give equal starts, whatever random numbers were drawn before."""
    torch.manual_seed(1)
    first = case.start()
    torch.manual_seed(2)
    second = case.start()
    theirs = adapters_only(second)
    for name, parameter in adapters_only(first).items():
        assert_equal(parameter, theirs[name], f"{name} starts otherwise although the seed is the same")
    for one, other in zip(first.attachments, second.attachments, strict=True):
        saved = other.tensors()
        for key, tensor in one.tensors().items():
            assert_equal(tensor, saved[key], f"{key} starts otherwise although the seed is the same")


def costs(case: Case) -> None:
    """What `cost()` says, given the model without weights, is what a run really takes."""
    adapter = case.build()
    bare = tiny_models.skeleton(case.family)
    before = Snapshot.of(bare).modules
    with _RealTensors() as real:
        said = adapter.cost(bare)
    assert Snapshot.of(bare).modules == before, "cost() leaves the model without weights changed"
    # Passing use of one tensor's worth is fine (a permutation of its places, in integers), a model's worth is not.
    most = max(said.weights, 2 * max(p.nbytes for p in bare.parameters()))
    assert real.largest <= most, f"cost() makes a real tensor of {real.largest:,} bytes"
    if type(adapter).cost is Adapter.cost:
        _assert_follows_the_device(adapter, bare, case)
    found = _measured(case)
    for kind in ("weights", "gradients", "optimizer"):
        ours, theirs = getattr(said, kind), getattr(found, kind)
        assert ours == theirs, f"cost() says {ours:,} bytes of {kind}, and a run takes {theirs:,}"


def _assert_follows_the_device(adapter: Adapter, bare: nn.Module, case: Case) -> None:
    attachment = adapter.attach(bare, Context(name=case.adapter, layers=Layers.of(bare), seed=SEED, fresh=False))
    assert attachment is not None, "attach() gives nothing, so nothing is trained: declare trains=False"
    strays = [name for name, p in attachment.trainable().items() if p.device.type != "meta"]
    assert not strays, f"{strays[0]} is not made on the device of the model"
    attachment.detach()


def _measured(case: Case) -> Cost:
    model = case.load()
    before = {id(t) for t in (*model.parameters(), *model.buffers())}
    stack = case.attach(model)
    own = adapters_only(stack)
    live = {id(t): t for t in (*model.parameters(), *model.buffers(), *own.values())}
    loop, gradients = Loop(stack, case.family), 0
    for _ in range(STEPS_FOR_COSTS):
        loop.backward()
        gradients = max(gradients, sum(p.grad.nbytes for p in own.values() if p.grad is not None))
        loop.update()
    state = [loop.optimizer.state.get(p, {}) for p in own.values()]
    return Cost(
        weights=sum(tensor.nbytes for key, tensor in live.items() if key not in before),
        gradients=gradients,
        optimizer=sum(s[moment].nbytes for s in state for moment in ("exp_avg", "exp_avg_sq") if moment in s),
    )


class _RealTensors(TorchDispatchMode):
    """Remembers the largest tensor that is made outside of torch's meta device."""

    largest: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.largest = max(self.largest, tensor.nbytes)
        return made


def rates(case: Case) -> None:
    """Rates are given for exactly the trainable tensors, are the same each time, and never negative."""
    stack = case.start()
    first, second = stack.rates(0.01), stack.rates(0.01)
    assert first.keys() == stack.trainable().keys()
    assert first == second, "rates() gives other rates when it is asked again"
    wrong = [name for name, rate in first.items() if not 0 <= rate.multiplier < float("inf") or rate.weight_decay < 0]
    assert not wrong, f"{wrong[0]} is given the rate {first[wrong[0]]}"


def packs(case: Case) -> None:
    """The linears of the base are packed, and what comes out is close to what went in."""
    if not case.capabilities.quantises:
        raise Declared("it does not pack the base")
    floats = dict(modules(tiny_models.load(case.family)))
    model = case.load()
    assert packed_as(model) is not None, "no linear of the base is packed"
    for path, module in modules(model):
        if isinstance(module, FrozenLinear):
            exact = weight(unwrap(floats[path])).detach()
            share = float((module.weight.float() - exact).norm() / exact.norm())
            assert share <= ROUNDED, f"{path} is {share:.2f} of its norm away from the float weight"
