"""Checks of an adapter on a model: what it changes, what it trains, and that all of it can be undone."""

import torch
from torch import Tensor, nn

from ..errors import StackError
from ..fingerprints import differences, fingerprint
from ..stack import Stack
from . import tiny_models
from .case import SEED, Case, Declared, Loop, Snapshot, adapters_only, assert_equal, carry, trained

__all__ = ["detaching", "disabling", "frozen_base", "identity", "merging", "several", "trainable"]

JUDGED_STEPS = 3  # as many as the step proof of a run watches
LONGEST_REST = 16  # steps within which each tensor must have been trained
MERGED = 1e-4  # of the largest logit


def identity(case: Case) -> None:
    """A fresh one leaves the outputs of the base as they are, bit for bit."""
    model = case.load()
    before = case.logits(model)
    stack = case.attach(model)
    assert_equal(case.logits(stack.model), before, "a fresh adapter changes the base's outputs")


def trainable(case: Case) -> None:
    """Exactly the declared tensors are trainable, and each of them has a gradient and moves."""
    model = case.load()
    already = {module for module in model.modules() if module.training}
    stack = case.attach(model)
    training = next((path for path, m in stack.model.named_modules() if m.training and m not in already), None)
    assert training is None, f"attaching to a model in evaluation mode leaves {training!r} in training mode"
    _assert_well_formed(stack, model)
    loop = Loop(stack, case.family)
    hidden = _reached(tiny_models.losses(stack.model, case.family)) - set(map(id, stack.trainable().values()))
    assert not hidden, f"{len(hidden)} tensors are trained that trainable() does not give"
    _assert_all_move(case, loop)


def _assert_well_formed(stack: Stack, model: nn.Module) -> None:
    declared = stack.trainable()
    assert declared, "trainable() is empty: declare trains=False"
    owned = {id(p) for p in declared.values()}
    stray = next((n for n, p in stack.model.named_parameters() if p.requires_grad and id(p) not in owned), None)
    assert stray is None, f"{stray} requires a gradient, and trainable() does not give it"
    count = sum(len(a.trainable()) for a in stack.attachments) + len(stack.heads)
    assert len(owned) == len(declared) == count, "trainable() gives one tensor twice, or two under one name"
    device = next(model.parameters()).device
    for name, parameter in declared.items():
        assert parameter.requires_grad, f"{name} does not require a gradient"
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, and float32 is needed to train"
        assert parameter.device == device, f"{name} is on {parameter.device}, and the model on {device}"
        stack.layers.depth(name)


def _reached(loss: Tensor) -> set[int]:
    """Every leaf that a backward pass would give a gradient to."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:  # only what accumulates a gradient has one
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found


def _assert_all_move(case: Case, loop: Loop) -> None:
    """As the step proof of a run judges: a tensor may rest where it says so, but not for ever."""
    stack = loop.stack
    proved: set[str] = set()
    faults: dict[str, str] = {}
    for step in range(LONGEST_REST):
        loop.backward()
        resting = frozenset[str]().union(*(a.may_rest() for a in stack.attachments))
        judged = {n: p for n, p in stack.trainable().items() if n not in resting and n not in proved}
        before = {n: p.detach().clone() for n, p in judged.items()}
        still = {n for n, p in judged.items() if p.grad is None or not p.grad.any()}
        infinite = next((n for n, p in judged.items() if p.grad is not None and not p.grad.isfinite().all()), None)
        assert infinite is None, f"the gradient of {infinite} is not finite in step {step + 1}"
        loop.update()
        for name in judged:
            if name in still:
                faults[name] = "had no gradient"
            elif torch.equal(before[name], stack.trainable()[name]):
                faults[name] = "had a gradient and did not move"
            else:
                proved.add(name)
        left = [name for name in stack.trainable() if name not in proved]
        never = [name for name in left if name not in faults]
        if step + 1 >= JUDGED_STEPS:
            guilty = [name for name in left if name in faults]
            assert not guilty, f"{guilty[0]} {faults[guilty[0]]} in {step + 1} steps, and does not say that it rests"
            if not never or not case.capabilities.base_frozen:
                return
    assert not never, f"{never[0]} rests for {LONGEST_REST} steps: it is never trained"


def frozen_base(case: Case) -> None:
    """Training leaves every byte of the base as it was."""
    model = case.load()
    before, whole = fingerprint(model), Snapshot.of(model)
    stack = trained(case, case.attach(model))
    faults, _ = differences(before, stack.model)
    assert not faults, f"training changes the base: {faults[0]}"
    stack.detach()
    changed = [fault for fault in whole.differences(model) if fault.startswith("tensor")]
    assert not changed, f"after training and detaching, {changed[0]}"


def detaching(case: Case) -> None:
    """Taken out again, the model is what it was: outputs, modules, hooks, tensors; and a second time is refused."""
    model = case.load()
    before, outputs = Snapshot.of(model), case.logits(model)
    stack = case.attach(model)
    if case.capabilities.base_frozen:
        trained(case, stack)
    stack.detach()
    faults = before.differences(model)
    assert not faults, f"after detaching, {faults[0]}"
    assert_equal(case.logits(model), outputs, "after detaching, the base's outputs are other ones")
    left = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    assert left is None, f"after detaching, {left} still requires a gradient"
    try:
        stack.detach()
    except StackError:
        pass
    else:
        raise AssertionError("detaching twice is not refused")
    again = case.attach(model)
    again.detach()
    assert not (faults := before.differences(model)), f"after attaching and detaching once more, {faults[0]}"


def disabling(case: Case) -> None:
    """Switched off, outputs are those of the base; switched on again, those of the adapter; bit for bit."""
    model = case.load()
    base = case.logits(model)
    stack = case.attach(model)
    with stack.base_only():
        assert_equal(case.logits(stack.model), base, "a fresh adapter that is switched off still changes the outputs")
    loop = Loop(stack, case.family, trained=adapters_only(stack))
    loop.run(3)
    own = case.logits(stack.model)
    assert not torch.equal(own, base), "three steps of training do not change the outputs"
    if not case.capabilities.base_frozen:
        _assert_refuses_to_switch_off(stack)
        return
    with stack.base_only():
        assert_equal(case.logits(stack.model), base, "switched off, it still changes the outputs")
    assert_equal(case.logits(stack.model), own, "switched on again, it gives other outputs than before")


def _assert_refuses_to_switch_off(stack: Stack) -> None:
    try:
        with stack.base_only():
            raise AssertionError("the base was trained, and switching off pretends that it is still there")
    except StackError:
        return  # it says that it cannot


def merging(case: Case) -> None:
    """Folded into the base, outputs stay and nothing is left of it; a packed base takes it up too, or it refuses."""
    model = case.load()
    before = Snapshot.of(model)
    _assert_merges(case, trained(case, case.attach(model)), before)
    if case.capabilities.quantised_bases:
        _assert_merges_or_refuses(case)


def _assert_merges(case: Case, stack: Stack, before: Snapshot) -> None:
    expected = case.logits(stack.model)
    stack.merge()
    merged = case.logits(stack.model)
    error = float((merged - expected).abs().max() / expected.abs().max())
    assert error <= MERGED, f"merged logits differ by {error:.2g} of the largest one ({MERGED:g} is allowed)"
    now = Snapshot.of(stack.model)
    left = sorted(now.modules.keys() ^ before.modules.keys()) + sorted(now.tensors.keys() ^ before.tensors.keys())
    left += [p for p, text in before.modules.items() if text.partition(",")[0] != now.modules[p].partition(",")[0]]
    assert not left, f"after merging, {left[0]} is not as it was in the base"


def _assert_merges_or_refuses(case: Case) -> None:
    """Few bits cannot take up a small change; only what is not packed (a bias, an embedding) can."""
    model = case.load(packed="nf4")
    bare = Snapshot.of(model)
    stack = trained(case, case.attach(model, packed="nf4"))
    before, outputs = Snapshot.of(model), case.logits(model)
    try:
        _assert_merges(case, stack, bare)
    except StackError:
        faults = before.differences(model)
        assert not faults, f"refusing to merge into a packed base, it leaves {faults[0]}"
        assert_equal(case.logits(model), outputs, "refusing to merge into a packed base, it changes outputs")
    except AssertionError as fault:
        raise AssertionError(f"merging into a packed base is not refused with a StackError, and {fault}") from None


def several(case: Case) -> None:
    """Two instances train on one model, and without one of them the other is as if it had been alone."""
    if not case.capabilities.base_frozen:
        raise Declared("it trains the base itself")
    model = case.load()
    try:
        pair = [case.attach(model, name, seed=seed) for name, seed in (("first", SEED), ("second", SEED + 1))]
    except StackError as refusal:
        raise Declared(str(refusal)) from None
    _assert_both_train(case, pair)
    alone = []
    for name, seed, stack in zip(("first", "second"), (SEED, SEED + 1), pair, strict=True):
        single = case.attach(case.load(), name, seed=seed)
        carry(stack, single)
        alone.append(case.logits(single.model))
    together = case.logits(model)
    for stack, expected in ((pair[1], alone[0]), (pair[0], alone[1])):
        with stack.base_only():
            name = stack.attachments[0].name
            assert_equal(case.logits(model), expected, f"with {name!r} switched off, the other one is not as if alone")
    assert_equal(case.logits(model), together, "after switching both off and on, outputs are other ones")
    pair[0].detach()
    assert_equal(case.logits(model), alone[1], "with 'first' detached, 'second' is not as if it had been alone")
    pair[1].detach()
    assert_equal(case.logits(model), case.logits(case.load()), "with both detached, the base is not what it was")


def _assert_both_train(case: Case, pair: list[Stack]) -> None:
    names = [set(adapters_only(stack)) for stack in pair]
    assert not names[0] & names[1], f"two instances call a tensor {min(names[0] & names[1])!r}"
    shared = {id(p) for p in adapters_only(pair[0]).values()} & {id(p) for p in adapters_only(pair[1]).values()}
    assert not shared, "two instances share a tensor"
    before = [{name: p.detach().clone() for name, p in adapters_only(stack).items()} for stack in pair]
    for stack, values in zip(pair, before, strict=True):
        loop = Loop(stack, case.family, trained=adapters_only(stack))
        loop.run(2)
        still = all(torch.equal(p, values[name]) for name, p in adapters_only(stack).items())
        assert not still, f"{stack.attachments[0].name!r} is not trained beside another instance"
