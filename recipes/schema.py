"""What a recipe may say. Unknown keys are errors at every level; each default stands here and nowhere else."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from onegpu.adapters.device import Attention, Precision

__all__ = ["HIGHEST_RATE", "Best", "Checkpointing", "Recipe", "Train"]

Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
]
Count = Annotated[int, Field(ge=1)]
HIGHEST_RATE = 1e30  # beyond any that trains, and below those that torch cannot apply (float32)
POLYNOMIAL_END = 1e-7  # transformers' polynomial schedule goes down to this rate, whatever it starts from
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Best(_Strict):
    """Which evaluation's adapter is kept, and how long a better one is waited for."""

    metric: str | None = None
    """A score of the task (`f1.NAME` of one class); the one that matters most to it when left out."""

    patience: Count | None = None
    """Evaluations without a better score after which the run ends early; never when left out."""

    min_delta: float = Field(default=0.0, ge=0)
    """By how much a score has to be better to count."""


class Checkpointing(_Strict):
    """Which layers compute their activations again in the backward pass, and where the input of a layer waits."""

    every: Count = 1
    """Each so many layers one: 2 for every other, which costs half of the time and saves half of the memory."""

    offload: bool = False
    """Keep what a recomputed layer starts from in the memory of the host; on a CPU it is there already."""


def _switched(given: Any) -> Any:
    """True and false stand for all layers and for none."""
    if isinstance(given, bool):
        return Checkpointing() if given else None
    if given is not None and not isinstance(given, (dict, Checkpointing)):
        raise ValueError("must be true, false, or settings such as {every: 2}")
    return given


def _as_switch(chosen: Checkpointing | None) -> bool | dict[str, Any]:
    """As recipes are written."""
    if chosen is None or chosen == Checkpointing():
        return chosen is not None
    return chosen.model_dump()


class Train(_Strict):
    """How the loop steps."""

    steps: Count | None = None
    """Optimiser steps. Either this or `epochs`."""

    epochs: Count | None = None
    """Passes over the training rows; 1 when neither is given."""

    effective_batch: Count = 16
    """Examples per optimiser step. Gradient accumulation follows from it and never changes the gradient."""

    micro_batch: Count | Literal["auto"] = "auto"
    """Examples per forward pass: a matter of memory and speed only."""

    tokens_per_micro_batch: Count | None = None
    """Tokens per forward pass, in place of `micro_batch`; one longer example is a pass of its own."""

    learning_rate: float = Field(default=2e-4, gt=0, le=HIGHEST_RATE)
    """Peak rate; adapters may scale it per tensor."""

    optimizer: Literal["adamw", "adamw-8bit", "sgd"] = "adamw"
    """`adamw-8bit` is bitsandbytes', which keeps tensors below 4,096 elements in 32 bits."""

    weight_decay: float = Field(default=0.0, ge=0, le=HIGHEST_RATE)
    """Decoupled decay of matrices; vectors (biases, norms) have none."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient of a step; null for no clipping."""

    schedule: Schedule = "cosine"
    """transformers' names."""

    warmup: Count | Share = 0.0
    """A share of the steps, or a number of steps."""

    precision: Precision = "auto"
    """What the frozen base is held and computed in; trained tensors are float32 always."""

    attention: Attention = "auto"
    """transformers' implementation of attention: the model's own choice, but for plain products in bf16 on a CPU."""

    gradient_checkpointing: Annotated[
        Checkpointing | None,
        BeforeValidator(_switched, json_schema_input_type=bool | Checkpointing | None),
        PlainSerializer(_as_switch),
    ] = None
    """Recompute activations in the backward pass, true or of some layers: less memory, up to a third more time."""

    compile: bool = False
    """Compile the layers that the model repeats, once (torch.compile): faster steps, after a minute at the start."""

    evaluate_every: Count | None = 50
    """Optimiser steps between evaluations; null for one before and one after."""

    best: Best | None = None
    """Keep the adapter of the best evaluation, and stop when none gets better; the last step's when left out."""

    checkpoint_every: Count | None = 50
    """Optimiser steps between checkpoints to resume from; null for none."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything random: start of the adapter, order of the rows, dropout, split."""

    @model_validator(mode="after")
    def _coherent(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.tokens_per_micro_batch is not None and self.micro_batch != "auto":
            raise ValueError("give `micro_batch` or `tokens_per_micro_batch`, not both")
        if self.schedule == "constant" and self.warmup:
            raise ValueError("the schedule `constant` would ignore `warmup`; use `constant_with_warmup`")
        if self.schedule == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"the schedule `polynomial` ends at {POLYNOMIAL_END}: `learning_rate` must be higher, or use `linear`"
            )
        if self.best is not None and self.evaluate_every is None:
            raise ValueError("`best` compares evaluations: set `evaluate_every`")
        return self


class Recipe(_Strict):
    """A base model, a stack of adapters, a task with its data, and how to train."""

    base: str
    """A local folder, a `.gguf` file, `package:NAME/path`, or a hub id (with `revision`)."""

    revision: str | None = None
    """Commit or tag of a hub id."""

    adapters: list[Any] = []
    """The stack, applied in order: names, or one name with its settings."""

    adapter: str | None = None
    """An adapter folder to continue from, with the same stack; always trainable."""

    task: Any
    """One task with its settings, such as `chat: {data: train.jsonl}`."""

    train: Train = Train()
    """How the loop steps."""
