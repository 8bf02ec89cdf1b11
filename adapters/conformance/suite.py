"""All checks by name, and two ways to run them: as tests of a class that an author derives, or as one report.

What an adapter declares that it cannot do is skipped with its reason. A method that trains nothing is proved in a stack
with `lora`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from unittest import SkipTest

import torch

from ..contract import Capabilities
from ..quiet import quietly
from . import checks_attached, checks_declared, checks_gradients, checks_saved
from .case import Case, Declared, case_of
from .tiny_models import FAMILIES, Family

__all__ = ["CHECKS", "Check", "Conformance", "Outcome", "Report", "prove"]


KINDS = ("decoders", "encoders", "encoder_decoder")  # an adapter that declares none of them only explains itself
NOWHERE = "it declares that it works on no model"


@dataclass(frozen=True)
class Check:
    """One thing that is proved, and what an adapter may declare instead."""

    run: Callable[[Case], None]
    capability: str | None = None  # without it, the check is declared away
    otherwise: str = ""  # what that means, where the adapter gives no reason
    trainers_only: bool = False
    needs_model: bool = True  # False for what is known without one

    @property
    def proves(self) -> str:
        """One line."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def __call__(self, case: Case) -> None:
        """Return when it is proved.

        Raises:
            AssertionError: it does not hold; the message names the tensor or the figure.
            Declared: the adapter declares that it cannot.
        """
        capabilities = case.capabilities
        if self.needs_model and _works_nowhere(capabilities):
            raise Declared(next((capabilities.reasons[k] for k in KINDS if k in capabilities.reasons), NOWHERE))
        if self.capability is not None and not getattr(capabilities, self.capability):
            raise Declared(capabilities.reasons.get(self.capability, self.otherwise))
        if self.trainers_only and not capabilities.trains:
            raise Declared("it trains nothing itself")
        with quietly():
            self.run(case)


CHECKS: Mapping[str, Check] = {
    "listing": Check(checks_declared.listing, needs_model=False),
    "configuration": Check(checks_declared.configuration, needs_model=False),
    **{family: Check(checks_declared.trains_on(family)) for family in FAMILIES},
    "identity": Check(checks_attached.identity, "identity_at_start", "a fresh one changes the outputs"),
    "trainable": Check(checks_attached.trainable),
    "frozen base": Check(checks_attached.frozen_base, "base_frozen", "it trains the base itself"),
    "seeds": Check(checks_declared.seeds),
    "rates": Check(checks_declared.rates),
    "cost": Check(checks_declared.costs, "planned", "it cannot tell without weights", trainers_only=True),
    "packed weights": Check(checks_declared.packs, "quantises", "it does not pack the base"),
    "saving": Check(checks_saved.saving),
    "strictness": Check(checks_saved.strictness),
    "resuming": Check(checks_saved.resuming),
    "peft": Check(checks_saved.peft_reads, "peft_readable", "PEFT does not know this format"),
    "detaching": Check(checks_attached.detaching),
    "disabling": Check(checks_attached.disabling),
    "merging": Check(checks_attached.merging, "mergeable", "it cannot be folded into the weights of the base"),
    "accumulation": Check(checks_gradients.accumulation, "row_by_row", "a row's result depends on its batch"),
    "packing": Check(checks_gradients.packing, "packing", "rows packed into one sequence would see each other"),
    "checkpointing": Check(checks_gradients.checkpointing, "checkpointing", "it cannot be recomputed"),
    "packed bases": Check(checks_gradients.quantised_bases, "quantised_bases", "it needs the base's float weights"),
    "half bases": Check(checks_gradients.half_bases, "half_bases", "it needs a float32 base"),
    "two instances": Check(checks_attached.several, "several", "one instance per model", trainers_only=True),
    "two saved": Check(checks_saved.several_saved, "several", "one instance per model", trainers_only=True),
}


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    status: Literal["proved", "declared", "failed"]
    reason: str = ""  # of a declaration or a failure


@dataclass(frozen=True)
class Report:
    """What came of all checks of one adapter."""

    adapter: str
    outcomes: Mapping[str, Outcome]  # by name of the check

    @property
    def failures(self) -> dict[str, str]:
        """Message by check, of those that failed."""
        return {name: o.reason for name, o in self.outcomes.items() if o.status == "failed"}

    @property
    def families(self) -> dict[Family, Outcome]:
        """What came of training on each kind of model."""
        return {family: self.outcomes[family] for family in FAMILIES}


def prove(
    adapter: str,
    config: Mapping[str, Any] | None = None,
    *,
    beside: Sequence[str] = (),
    checks: Iterable[str] = CHECKS,
) -> Report:
    """Run the checks of one adapter; nothing is raised, whatever the adapter does.

    Args:
        adapter: name of its entry point, or `distribution:name`.
        config: settings that suit the tiny models; the defaults when left out.
        beside: adapters that it needs in front of it in a stack.
        checks: names of those to run; all when left out.
    """
    with torch.random.fork_rng():
        return Report(adapter, {name: _outcome(CHECKS[name], adapter, config or {}, beside) for name in checks})


def _outcome(check: Check, adapter: str, config: Mapping[str, Any], beside: Sequence[str]) -> Outcome:
    try:
        check(_case(check, adapter, config, beside))
    except Declared as reason:
        return Outcome("declared", str(reason))
    except AssertionError as fault:
        return Outcome("failed", str(fault))
    except Exception as cause:  # a fault of the adapter must not hide what else it does
        return Outcome("failed", f"{type(cause).__name__}: {cause}")
    return Outcome("proved")


def _case(check: Check, adapter: str, config: Mapping[str, Any], beside: Sequence[str]) -> Case:
    bare = Case(adapter, config, FAMILIES[0], tuple(beside))
    if not check.needs_model or _works_nowhere(bare.capabilities):
        return bare
    return case_of(adapter, config, beside)


def _works_nowhere(capabilities: Capabilities) -> bool:
    return not any(getattr(capabilities, kind) for kind in KINDS)


class Conformance:
    """Subclass it in a test file as `TestSomething`, and name the adapter."""

    adapter: ClassVar[str]
    config: ClassVar[Mapping[str, Any]] = {}
    beside: ClassVar[Sequence[str]] = ()  # adapters that it needs in front of it, such as one that packs the base

    def _prove(self, check: str) -> None:
        try:
            with torch.random.fork_rng():
                CHECKS[check](_case(CHECKS[check], self.adapter, self.config, self.beside))
        except Declared as reason:
            raise SkipTest(f"{self.adapter} declares: {reason}") from None

    def test_it_is_listed_without_being_imported(self) -> None:
        """An installed distribution declares it, and listing what is installed imports nothing heavy."""
        self._prove("listing")

    def test_its_settings_are_strict_frozen_and_documented(self) -> None:
        """They survive JSON, refuse unknown keys, cannot be changed, and say what they are."""
        self._prove("configuration")

    def test_it_trains_on_a_decoder(self) -> None:
        """A Llama, or it says why not."""
        self._prove("llama")

    def test_it_trains_on_an_encoder(self) -> None:
        """A BERT with a head of classes, or it says why not."""
        self._prove("bert")

    def test_it_trains_on_an_encoder_with_a_decoder(self) -> None:
        """A T5, or it says why not."""
        self._prove("t5")

    def test_a_fresh_one_changes_no_output(self) -> None:
        """Bit for bit, unless it declares otherwise."""
        self._prove("identity")

    def test_exactly_the_declared_tensors_are_trained(self) -> None:
        """Each has a gradient and moves; nothing else requires one, hidden or not."""
        self._prove("trainable")

    def test_the_base_stays_frozen(self) -> None:
        """Training leaves every byte of it as it was."""
        self._prove("frozen base")

    def test_equal_seeds_start_equally(self) -> None:
        """Whatever random numbers were drawn before."""
        self._prove("seeds")

    def test_rates_answer_for_the_trainable_tensors(self) -> None:
        """Exactly for those, and the same each time."""
        self._prove("rates")

    def test_it_costs_what_it_says(self) -> None:
        """Bytes of weights, gradients and moments, told without reading weights."""
        self._prove("cost")

    def test_what_it_packs_is_close_to_the_base(self) -> None:
        """For an adapter that packs the linears of the base."""
        self._prove("packed weights")

    def test_it_is_saved_and_loaded_in_a_fresh_process(self) -> None:
        """With the same outputs, bit for bit; saved twice, the same bytes."""
        self._prove("saving")

    def test_a_damaged_file_is_refused(self) -> None:
        """A tensor less, a tensor more, a tensor by another name."""
        self._prove("strictness")

    def test_a_resumed_run_is_the_run_itself(self) -> None:
        """Three steps, saving, and three more are six, bit for bit."""
        self._prove("resuming")

    def test_peft_reads_what_it_saves(self) -> None:
        """Where it declares so."""
        self._prove("peft")

    def test_it_can_be_detached(self) -> None:
        """The model is then what it was: outputs, modules, hooks, tensors."""
        self._prove("detaching")

    def test_it_can_be_switched_off_and_on(self) -> None:
        """To the base's outputs and back, bit for bit."""
        self._prove("disabling")

    def test_it_can_be_merged(self) -> None:
        """With the same outputs, and nothing left of it; never into a packed base."""
        self._prove("merging")

    def test_gradients_do_not_depend_on_the_split_of_a_window(self) -> None:
        """Six ragged rows in one pass, in two, in six."""
        self._prove("accumulation")

    def test_packed_rows_do_not_see_each_other(self) -> None:
        """In one sequence with positions that start anew."""
        self._prove("packing")

    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        """Reentrant or not, switched on before or after attaching."""
        self._prove("checkpointing")

    def test_it_trains_on_packed_bases(self) -> None:
        """nf4 and int8, whose bytes stay as they are."""
        self._prove("packed bases")

    def test_it_trains_on_half_precision_bases(self) -> None:
        """bf16 and fp16, with its own tensors in float32."""
        self._prove("half bases")

    def test_two_instances_do_not_disturb_each_other(self) -> None:
        """Without one of them, the other is as if it had been alone."""
        self._prove("two instances")

    def test_two_instances_are_saved_together(self) -> None:
        """In a folder each, and loaded again."""
        self._prove("two saved")
