"""Whatever is not trained though it should be is found in the first steps, and named by its module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from onegpu.adapters import Adapter, Attachment, Context, Entry, ProofFailed, Stack, attach, load_base
from onegpu.adapters.conformance.case import Loop, case_of
from onegpu.adapters.conformance.table import PROOFS, Proof
from onegpu.adapters.conformance.tiny_models import losses
from onegpu.adapters.low_rank import LowRankAttachment, LowRankLinear
from onegpu.adapters.registry import ADAPTERS, entries
from onegpu.adapters.structure import Wrapper, linears, swap
from onegpu.recipes import Loaded, Outcome, optimisers, running, step_proof, training
from onegpu.recipes.step_proof import StepProof
from onegpu.recipes.training import Session

UNATTACHABLE = {"xlora"}  # needs other adapters' folders
LORA = {"lora": {"rank": 4}}
Q1 = "model.layers.1.self_attn.q_proj"
Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Do = Callable[[Session, dict[str, nn.Parameter]], None]


@pytest.fixture
def stack(chat_base: Path) -> Stack:
    """LoRA on the tiny chat base."""
    return attach(load_base(str(chat_base), precision="fp32"), [LORA])


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the proofs of runs came to, as they end."""
    found: list[str] = []

    def train(session: Session) -> str:
        found.append(training.train(session))
        return found[-1]

    monkeypatch.setattr(running, "train", train)
    return found


def _during_steps(monkeypatch: pytest.MonkeyPatch, do: Do) -> None:
    """Do something after the gradient of every step was computed."""
    real = training._accumulate

    def accumulate(s: Session, window: Any, trainable: dict[str, nn.Parameter]) -> tuple[float, float]:
        found = real(s, window, trainable)
        do(s, trainable)
        return found

    monkeypatch.setattr(training, "_accumulate", accumulate)


def _at_start(monkeypatch: pytest.MonkeyPatch, do: Callable[[Stack], None]) -> None:
    """Do something to a stack that was just attached."""
    real = vars(running)["attach"]

    def attached(*given: Any, **named: Any) -> Stack:
        stack: Stack = real(*given, **named)
        do(stack)
        return stack

    monkeypatch.setattr(running, "attach", attached)


def _failure(run: Run, loaded: Loaded, tmp_path: Path) -> str:
    with pytest.raises(ProofFailed) as caught:
        run(loaded)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out/adapter").exists()
    return str(caught.value)


# --- a gradient that is cut off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "o_proj"], ["gate_proj", "q_proj"]], ids=str)
def test_a_module_whose_output_is_detached_is_named(
    targets: Any, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x).detach())
    told = _failure(run, chat_recipe([{"lora": {"rank": 4, "targets": targets}}], train={"steps": 5}), tmp_path)
    assert told.startswith("step proof: no gradient comes through model.layers.0.mlp: model.layers.0.mlp.")
    assert "had no gradient in 3 steps" in told
    assert told.endswith("; likewise model.layers.1.mlp")


@pytest.mark.parametrize("spec", ["full", {"lisa": {"active": 2}}], ids=str)
def test_a_module_whose_output_is_detached_is_named_where_the_base_trains_itself(
    spec: Any, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x).detach())
    told = _failure(run, chat_recipe([spec], train={"steps": 5}), tmp_path)
    assert told.startswith("step proof: no gradient comes through model.layers.0.mlp: model.layers.0.mlp.")
    assert "likewise" in told
    assert "model.layers.1.mlp" in told


def test_of_a_large_tensor_what_has_a_gradient_is_seen_to_move_or_not(
    chat_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_proof, "WATCHED", 32)  # one row of the embeddings
    stack = attach(load_base(str(chat_base), precision="fp32"), ["full"])
    optimizer = torch.optim.SGD(stack.trainable().values(), lr=0.1)
    table = "model.embed_tokens.weight"

    def steps(stuck: bool) -> StepProof:
        proof = StepProof(stack, optimizer)
        for step in range(3):
            stack.attachments[0].before_step(step)
            proof.before_loss()
            ids = torch.tensor([[200, 201, 202, 203]])  # only these rows have a gradient
            stack.model(input_ids=ids, labels=ids).loss.backward()
            proof.after_loss()
            proof.before_step(0.1)
            if stuck:
                stack.trainable()[table].grad = None
            optimizer.step()
            proof.after_step()
            optimizer.zero_grad()
        return proof

    assert steps(stuck=False).proved == stack.trainable().keys()
    with pytest.raises(
        ProofFailed, match=rf"{table} had a gradient and did not move at rates up to 1\.0e-01 in 3 steps"
    ):
        steps(stuck=True)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_adapter_whose_own_branch_is_detached_in_one_module_is_named_by_it(
    layer: int, targets: str, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = f"model.layers.{layer}.self_attn.q_proj"

    def cut(stack: Stack) -> None:
        wrapper = stack.root.get_submodule(place)
        assert isinstance(wrapper, LowRankLinear)
        real = wrapper.forward
        vars(wrapper)["forward"] = lambda x: (y := wrapper.base(x)) + (real(x) - y).detach()

    _at_start(monkeypatch, cut)
    told = _failure(run, chat_recipe([{"lora": {"rank": 4, "targets": targets}}], train={"steps": 5}), tmp_path)
    # A rests while B is zero, and B stays zero: only B is to blame.
    assert told == f"step proof: no gradient comes through {place}: {place}.lora_B.lora had no gradient in 3 steps"


def test_layers_before_a_cut_in_the_middle_are_named(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, hidden: Tensor, **options: Any) -> Any:
        return real(self, hidden.detach() if self.self_attn.layer_idx == 1 else hidden, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    told = _failure(run, chat_recipe(train={"steps": 5}), tmp_path)
    assert told.startswith("step proof: no gradient comes through model.layers.0: ")
    assert told.endswith("had no gradient in 3 steps, and so 6 more of it")


def test_a_loss_that_depends_on_nothing_trained_stops_in_its_first_step(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaModel.forward

    def forward(self: LlamaModel, *given: Any, **named: Any) -> Any:
        output = real(self, *given, **named)
        output.last_hidden_state = output.last_hidden_state.detach()
        return output

    monkeypatch.setattr(LlamaModel, "forward", forward)
    told = _failure(run, chat_recipe(train={"steps": 1}), tmp_path)
    assert told == "step 1: the loss depends on nothing that is trained, no gradient comes through model"


@pytest.mark.parametrize("layer", ["0", "1"])
def test_cut_off_tensors_are_found_under_checkpointing_too(
    layer: str, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaMLP.forward

    def cut(stack: Stack) -> None:
        mlp = stack.root.get_submodule(f"model.layers.{layer}.mlp")
        vars(mlp)["forward"] = lambda x: real(mlp, x).detach()

    _at_start(monkeypatch, cut)
    told = _failure(run, chat_recipe(train={"steps": 5, "gradient_checkpointing": True}), tmp_path)
    assert told.startswith(f"step proof: no gradient comes through model.layers.{layer}.mlp: ")


# --- what looks like training, and is none ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_alone_is_no_training(
    optimizer: str, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, moved = f"{Q1}.lora_A.lora", set[float]()

    def spoil(s: Session, trainable: dict[str, nn.Parameter]) -> None:
        moved.add(float(trainable[name].detach().norm()))
        trainable[name].grad = torch.zeros_like(trainable[name])

    _during_steps(monkeypatch, spoil)
    train = {"steps": 6, "optimizer": optimizer, "weight_decay": 0.5, "learning_rate": 0.1}
    told = _failure(run, chat_recipe(train=train), tmp_path)
    assert f"{name} had a gradient of the loss, and none was left when the optimiser stepped" in told
    assert len(moved) > 1  # it did move


def test_a_gradient_that_is_clipped_to_nothing_is_not_laid_on_a_module(
    chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    told = _failure(run, chat_recipe(train={"steps": 4, "clip": 1e-30}), tmp_path)
    assert "none was left when the optimiser stepped (train.clip?)" in told
    assert "no gradient comes through" not in told


def test_a_rate_that_moves_nothing_is_told(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    told = _failure(run, chat_recipe(train={"steps": 4, "learning_rate": 1e-30}), tmp_path)
    assert "lora_A.lora had a gradient and did not move at rates up to 5.0e-31 in 3 steps" in told


def test_an_adapters_own_penalty_alone_is_no_training(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Any = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x).detach())

    def penalty(self: LowRankAttachment) -> Tensor:
        return sum(((p - 1).square().sum() for p in self.parameters.values()), torch.zeros(()))

    monkeypatch.setattr(LowRankAttachment, "penalty", penalty)
    told = _failure(run, chat_recipe(train={"steps": 5}), tmp_path)
    assert "mlp.gate_proj.lora_" in told
    assert "had a gradient of its adapter's own penalty only in 3 steps" in told


def test_a_gradient_below_what_its_adapter_declares_is_none(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = f"{Q1}.lora_B.lora"
    monkeypatch.setattr(LowRankAttachment, "gradient_floors", lambda self: {name: 1e3})
    told = _failure(run, chat_recipe(train={"steps": 5}), tmp_path)
    assert told.startswith(f"step proof: {name} had a gradient of ")
    assert "below the 1.0e+03 that its adapter declares in 3 steps" in told


class SharedGain(Adapter):
    """One gain for the outputs of every q_proj."""

    def attach(self, model: nn.Module, context: Context) -> Attachment:
        gain = nn.Parameter(torch.ones(1))
        layers = {m: Gained(m, gain) for path, m in linears(model).items() if path.endswith("q_proj")}
        swap(model, layers)
        return SharedGainAttachment(context.name, self, model, {"q_proj.gain": gain})


class Gained(Wrapper):
    """A linear with a gain, which may be cut off."""

    def __init__(self, linear: nn.Module, gain: nn.Parameter) -> None:
        super().__init__(linear)
        self.gain, self.cut = gain, False

    def forward(self, x: Tensor) -> Tensor:
        gained: Tensor = self.base(x) * (self.gain.detach() if self.cut else self.gain)
        return gained


class SharedGainAttachment(Attachment):
    """Switched by nobody."""


@pytest.mark.parametrize("cut", [None, 0, 1])
def test_a_tensor_that_two_modules_share_does_not_hide_that_one_is_cut_off(cut: int | None, chat_base: Path) -> None:
    stack = attach(load_base(str(chat_base), precision="fp32"), [SharedGain()])
    if cut is not None:
        wrapper: Any = stack.root.get_submodule(f"model.layers.{cut}.self_attn.q_proj")
        wrapper.cut = True
    optimizer = torch.optim.SGD(stack.trainable().values(), lr=0.1)
    proof, ids = StepProof(stack, optimizer), torch.tensor([[5, 9, 7, 3]])

    def steps() -> None:
        for _ in range(3):
            proof.before_loss()
            stack.model(input_ids=ids, labels=ids).loss.backward()
            proof.after_loss()
            proof.before_step(0.1)
            optimizer.step()
            proof.after_step()
            optimizer.zero_grad()

    if cut is None:
        steps()
        assert proof.verdict() == "1 tensors had a gradient and moved"
    else:
        with pytest.raises(ProofFailed, match=f"layers.{cut}.self_attn.q_proj does not depend on q_proj.gain, which"):
            steps()
    assert not any(module._forward_hooks for module in stack.model.modules() if isinstance(module, Gained))


def test_nothing_that_may_rest_may_rest_for_ever(
    chat_recipe: Recipe, run: Run, verdicts: list[str], tmp_path: Path
) -> None:
    never = [{"trainable-tokens": {"tokens": ["~"]}}]
    told = _failure(run, chat_recipe(never, train={"steps": 4}), tmp_path)
    assert told == "step proof: nothing had a gradient in 4 steps: all of it may rest, and did"
    run(chat_recipe([LORA, *never], train={"steps": 4}), "beside")  # something else was trained
    assert verdicts == ["28 tensors had a gradient and moved, 1 are exempt"]


@pytest.mark.parametrize("spec", ["full", {"lisa": {"active": 1}}], ids=str)
def test_of_a_base_that_trains_itself_something_is_seen_to_move(
    spec: Any, chat_recipe: Recipe, run: Run, verdicts: list[str]
) -> None:
    run(chat_recipe([spec], train={"steps": 4}))
    assert int(verdicts[0].split()[0]) >= 10


# --- what is declared, what is stepped --------------------------------------------------------------------------------


def test_a_tensor_that_the_optimiser_does_not_step_is_refused_before_the_first_step(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = optimisers.make_optimizer

    def forgetful(settings: Any, groups: Any, trainable: Any) -> torch.optim.Optimizer:
        optimizer = real(settings, groups, trainable)
        optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(1))  # where a stale reference would be
        return optimizer

    monkeypatch.setattr(running, "make_optimizer", forgetful)
    told = _failure(run, chat_recipe(train={"steps": 1}), tmp_path)
    assert "q_proj.lora_B.lora is declared trainable, and the optimiser does not step it" in told
    assert "the optimiser steps 1 tensors that no adapter declares (any more)" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [0, 5])
def test_a_parameter_that_is_replaced_later_is_noticed(
    at: int, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def replace(s: Session, trainable: dict[str, nn.Parameter]) -> None:
        if s.step == at:
            wrapper = s.stack.root.get_submodule(Q1)
            assert isinstance(wrapper, LowRankLinear)
            wrapper.lora_B = nn.Parameter(wrapper.lora_B.detach().clone())

    _during_steps(monkeypatch, replace)
    told = _failure(run, chat_recipe(train={"steps": 7}), tmp_path)
    assert told == f"step proof: {Q1}.lora_B requires a gradient, and no adapter declares it"


def test_an_adapter_that_is_frozen_is_refused_before_the_first_step(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def freeze(stack: Stack) -> None:
        for parameter in stack.trainable().values():
            parameter.requires_grad_(False)

    _at_start(monkeypatch, freeze)
    told = _failure(run, chat_recipe(), tmp_path)
    assert "is declared trainable by its adapter, and frozen (requires_grad is False) (and 13 more)" in told
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_nobody_declares_is_refused_before_the_first_step(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def free(stack: Stack) -> None:
        stack.root.get_parameter("model.norm.weight").requires_grad_(True)

    _at_start(monkeypatch, free)
    told = _failure(run, chat_recipe(), tmp_path)
    assert told == "step proof: model.norm.weight requires a gradient, and no adapter declares it"
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD(stack.trainable().values(), lr=0.1)
    optimizer.param_groups[0]["params"] = []
    for attachment in stack.attachments:
        for parameter in attachment.trainable().values():
            parameter.requires_grad_(False)
        attachment.parameters.clear()
    with pytest.raises(ProofFailed, match="nothing would be trained"):
        StepProof(stack, optimizer)


ADAPTERS_OF_OURS = [entry for entry in entries(ADAPTERS) if entry.distribution == "onegpu"]


def _case(entry: Entry) -> Any:
    slow = [pytest.mark.slow] if entry.value.startswith("onegpu.adapters.bridge") else []
    return pytest.param(entry.name, marks=slow, id=entry.name)


@pytest.mark.parametrize("name", [_case(entry) for entry in ADAPTERS_OF_OURS if entry.name not in UNATTACHABLE])
def test_every_adapter_is_proved_to_train_what_it_declares(name: str) -> None:
    proof_of = PROOFS.get(name, Proof())
    case = case_of(name, proof_of.config, proof_of.beside)
    stack = case.start()
    loop = Loop(stack, case.family)
    proof = StepProof(stack, loop.optimizer)
    frozen = {n: p.detach().clone() for n, p in stack.root.named_parameters() if not p.requires_grad}
    for step in range(4):
        torch.manual_seed(step)
        stack.model.train()
        for attachment in stack.attachments:
            attachment.before_step(step)
        proof.before_loss()
        losses(stack.model, case.family).backward()
        proof.after_loss()
        for attachment in stack.attachments:
            if (penalty := attachment.penalty()) is not None:
                penalty.backward()
            attachment.after_backward(step)
        proof.before_step(0.01)
        loop.optimizer.step()
        proof.after_step()
        loop.update()
    assert proof.verdict().startswith(f"{len(proof.proved)} tensors had a gradient and moved")
    assert proof.proved
    if all(n.adapter.capabilities.base_frozen for n in stack.named):
        assert len(proof.proved) == len(stack.trainable())
        after = dict(stack.root.named_parameters())
        assert [n for n, before in frozen.items() if not torch.equal(before, after[n])] == []


# --- steps ------------------------------------------------------------------------------------------------------------


def _proof(stack: Stack) -> StepProof:
    return StepProof(stack, torch.optim.SGD(stack.trainable().values(), lr=0.1))


def _step(stack: Stack, proof: StepProof, rate: float, *, frozen: str = "") -> None:
    """One step by hand, in which the tensors whose names end so stay."""
    proof.before_loss()
    for name, parameter in stack.trainable().items():
        zero = name.endswith("lora_A.lora") and name in frozenset().union(*(a.may_rest() for a in stack.attachments))
        parameter.grad = torch.zeros_like(parameter) if zero else torch.ones_like(parameter)
    proof.after_loss()
    proof.before_step(rate)
    with torch.no_grad():
        for name, parameter in stack.trainable().items():
            if not (frozen and name.endswith(frozen)):
                parameter.sub_(rate * torch.as_tensor(parameter.grad))
    proof.after_step()


def test_a_step_at_a_rate_of_zero_proves_nothing(stack: Stack) -> None:
    proof = _proof(stack)
    for _ in range(5):
        _step(stack, proof, 0.0)
    assert (proof.judged, proof.proved) == (0, set())
    assert proof.verdict() == "too short to judge: 0 of 3 steps with a rate above zero"


def test_what_may_rest_in_a_step_is_judged_by_the_next(stack: Stack) -> None:
    proof = _proof(stack)
    _step(stack, proof, 0.1)
    assert {name.split(".")[-2] for name in proof.proved} == {"lora_B"}
    _step(stack, proof, 0.1)
    assert proof.proved == stack.trainable().keys()
    assert proof.verdict() == f"{len(stack.trainable())} tensors had a gradient and moved"


def test_a_tensor_has_three_steps_to_move(stack: Stack) -> None:
    proof = _proof(stack)
    for _ in range(2):
        _step(stack, proof, 0.1, frozen="1.mlp.up_proj.lora_B.lora")
    with pytest.raises(
        ProofFailed, match=r"layers.1.mlp.up_proj.lora_B.lora had a gradient and did not move at .* in 3"
    ):
        _step(stack, proof, 0.1, frozen="1.mlp.up_proj.lora_B.lora")


def test_a_run_too_short_to_judge_says_so_and_succeeds(
    chat_recipe: Recipe, run: Run, verdicts: list[str], tmp_path: Path
) -> None:
    outcome = run(chat_recipe(train={"steps": 1}), "short")
    assert outcome.adapter.is_dir()
    run(chat_recipe(train={"steps": 3}), "long")
    assert verdicts == [
        "too short to judge: 1 of 3 steps with a rate above zero",
        "28 tensors had a gradient and moved",
    ]
