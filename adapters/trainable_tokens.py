"""`trainable-tokens`: the embeddings of a few tokens are trained, and the rest of the table is not."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from .contract import Adapter, Attachment, Capabilities, Context
from .errors import StackError, TargetError, nearest
from .structure import Wrapper, head_modules, inside, modules, output_embeddings, swap, unwrap

__all__ = ["TrainableTokens"]


class TrainableTokens(Adapter):
    """E[t] becomes a trained row for each chosen token t; E: (vocabulary, hidden) itself stays frozen.

    Rows start as those of E, so a fresh adapter changes nothing. Where the output embeddings are tied to E they use
    the same rows: the logit of t moves by x · (row - E[t]).

    **New tokens** are those with ids from the end of E on. Their rows start at the mean of E, and logits over tied
    output embeddings get one more column each. They are rows, not a larger table: the model's `vocab_size` stays, so
    take the loss of the logits, as onegpu's tasks do, instead of passing `labels` to the model. PEFT, which needs a
    resized model, cannot read them. Switched off, a new token still has the row that it started with.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(mergeable=True, peft_readable=True)

    tokens: list[str | int] = Field(min_length=1)
    """Ids, or tokens as the tokenizer's vocabulary has them."""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], targets: Sequence[str]) -> "TrainableTokens | None":
        only_tokens = config.keys() <= {"token_indices", "init_weights"} and len(targets) <= 1
        return cls(tokens=list(config["token_indices"])) if only_tokens else None

    def check(self, skeleton: nn.Module) -> None:
        table = unwrap(_input_embeddings(skeleton))
        if all(isinstance(token, int) for token in self.tokens):
            _check_ids([token for token in self.tokens if isinstance(token, int)], table)

    def attach(self, model: nn.Module, context: Context) -> "TrainableTokensAttachment":
        outermost = _input_embeddings(model)
        table = unwrap(outermost)
        assert isinstance(table, nn.Embedding)
        ids = self._ids(context.tokenizer)
        _check_ids(ids, table)
        _refuse_taken(outermost, ids)
        rows = TokenRows(table, ids)
        places = {path: m for path, m in modules(model) if _holds(m, table)}
        head = output_embeddings(model)
        if rows.new and head is not None and head not in places:
            raise StackError(
                f"token {max(ids)} is new, and its logit needs a row of {head} too, which is not tied to the input "
                "embeddings: resize the model and save it first"
            )
        wrappers = {path: TiedLogits(m, rows) if path == head else RowEmbedding(m, rows) for path, m in places.items()}
        swap(model, {module: wrappers[path] for path, module in places.items()})
        definite = self.model_copy(update={"tokens": ids})  # what is saved must not need a tokenizer
        return TrainableTokensAttachment(context.name, definite, model, wrappers, rows, tied=head in places)

    def _ids(self, tokenizer: Any) -> list[int]:
        """The ids of `tokens`.

        Raises:
            StackError: there are texts among them, and no tokenizer.
            TargetError: the tokenizer does not know one.
        """
        texts = [token for token in self.tokens if isinstance(token, str)]
        if texts and tokenizer is None:
            raise StackError(f"token {texts[0]!r} is a text, and there is no tokenizer to look it up in: give its id")
        vocabulary: dict[str, int] = tokenizer.get_vocab() if texts else {}
        unknown = [f"{t!r} is no token of the tokenizer{nearest(t, vocabulary)}" for t in texts if t not in vocabulary]
        if unknown:
            raise TargetError("; ".join(unknown) + "; a new one is added with tokenizer.add_tokens")
        return [vocabulary[token] if isinstance(token, str) else token for token in self.tokens]


def _input_embeddings(model: nn.Module) -> nn.Module:
    found = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if found is None or not isinstance(unwrap(found), nn.Embedding):
        raise StackError(
            f"trainable-tokens needs a transformers model with an embedding table, not {type(model).__name__}"
        )
    return found


def _holds(module: nn.Module, table: nn.Embedding) -> bool:
    """Whether this is the embedding, or what is tied to it."""
    base = unwrap(module)
    return isinstance(base, (nn.Embedding, nn.Linear)) and dict(base.named_parameters()).get("weight") is table.weight


def _check_ids(ids: list[int], table: nn.Module) -> None:
    """Each id once, and none beyond the next free ones: new tokens take the ids right after the table.

    Raises:
        TargetError: naming the ids.
    """
    assert isinstance(table, nn.Embedding)
    count = table.num_embeddings
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise TargetError(f"token {twice[0]} is listed twice")
    if table.padding_idx in ids:
        raise TargetError(f"token {table.padding_idx} is the padding token of the embeddings, whose row never trains")
    new = sorted(i for i in ids if i >= count)
    outside = [i for i in ids if i < 0] + [
        i for i, free in zip(new, range(count, count + len(new)), strict=True) if i != free
    ]
    if outside:
        raise TargetError(
            f"token {outside[0]} is out of range: the table has ids 0 to {count - 1}, new ones begin at {count}"
        )


def _refuse_taken(outermost: nn.Module, ids: list[int]) -> None:
    for wrapper in _around(outermost):
        theirs = set(wrapper.rows.ids) if isinstance(wrapper, RowEmbedding) else set()
        if both := sorted(theirs & set(ids)):
            raise StackError(f"token {both[0]} is trained by another adapter on this model already")


def _around(module: nn.Module) -> Iterator[nn.Module]:
    while (inner := inside(module)) is not None:
        yield module
        module = inner


class TokenRows(nn.Module):
    """The rows (tokens, hidden) of the chosen tokens, and where they start."""

    start: Tensor  # (tokens, hidden), in the table's dtype
    slots: Tensor  # (vocabulary + new tokens,): which row an id has, -1 for none
    known: Tensor  # ids that the table has, and, in the same order, ...
    known_slots: Tensor  # ... which rows these have
    new_slots: Tensor  # the rows of new tokens, by id

    def __init__(self, table: nn.Embedding, ids: list[int]) -> None:
        super().__init__()
        weight, count = table.weight.detach(), table.num_embeddings
        self.ids, self.new, self.on = ids, sum(i >= count for i in ids), True
        mean = weight.float().mean(0).to(weight.dtype) if self.new else weight[0]
        self.register_buffer("start", torch.stack([weight[i] if i < count else mean for i in ids]))
        slots = torch.full((count + self.new,), -1)
        slots[ids] = torch.arange(len(ids))
        known = torch.tensor([i for i in ids if i < count], dtype=torch.long)
        place = {"slots": slots, "known": known, "known_slots": slots[known], "new_slots": slots[count:]}
        for name, value in place.items():
            self.register_buffer(name, value.to(weight.device))
        # The same kind of embedding over a small table: some kinds scale what they look up.
        self.small = deepcopy(table, {id(table.weight): nn.Parameter(self.start.clone().float())})
        self.small.num_embeddings, self.small.padding_idx = len(ids), None
        self.train(table.training)

    @property
    def trained(self) -> nn.Parameter:
        """The rows: (tokens, hidden), float32."""
        return self.small.get_parameter("weight")

    def values(self) -> Tensor:
        """The rows as they are in effect: (tokens, hidden)."""
        return self.trained if self.on else self.start

    def look_up(self, slots: Tensor) -> Tensor:  # (...,) -> (..., hidden)
        """The embeddings of rows, rounded as the table is, so that a fresh row gives the bits of the table's."""
        found: Tensor = functional_call(self.small, {"weight": self.values().to(self.start.dtype)}, (slots,))
        return found


class RowEmbedding(Wrapper):
    """The embedding with some of its rows replaced. ids: (...,) -> (..., hidden)."""

    def __init__(self, table: nn.Module, rows: TokenRows) -> None:
        super().__init__(table)
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        slots = self.rows.slots[ids]
        chosen = slots >= 0
        others: Tensor = self.base(ids.masked_fill(chosen, 0))  # a new token's id would be beyond the table
        return torch.where(chosen[..., None], self.rows.look_up(slots.clamp(min=0)), others)


class TiedLogits(Wrapper):
    """Output embeddings tied to the table. x: (..., hidden) -> logits (..., vocabulary + new tokens)."""

    def __init__(self, head: nn.Module, rows: TokenRows) -> None:
        super().__init__(head)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)
        rows = self.rows
        if rows.on:  # as a difference, a fresh row adds exactly nothing
            moved = (rows.values().float() - rows.start.float())[rows.known_slots]
            logits = logits.index_add(-1, rows.known, F.linear(x, moved.to(x.dtype)).to(logits.dtype))
        if not rows.new:
            return logits
        extra = F.linear(x, rows.values()[rows.new_slots].to(x.dtype))
        return torch.cat([logits, extra.to(logits.dtype)], dim=-1)


class TrainableTokensAttachment(Attachment):
    """One named set of rows on one model."""

    adapter: TrainableTokens

    def __init__(
        self,
        name: str,
        adapter: TrainableTokens,
        model: nn.Module,
        wrappers: Mapping[str, Wrapper],
        rows: TokenRows,
        *,
        tied: bool,
    ) -> None:
        self.path = next(path for path, wrapper in wrappers.items() if isinstance(wrapper, RowEmbedding))
        super().__init__(name, adapter, model, {f"{self.path}.tokens.{name}": rows.trained})
        self.wrappers, self.rows, self.tied = dict(wrappers), rows, tied

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's keys and, as there, the rows themselves; it writes them for tied output embeddings once more."""
        rows = self.rows.trained.detach()
        found = {f"base_model.model.{self.path}.trainable_tokens_delta": rows}
        heads = [
            path for path, wrapper in self.wrappers.items() if isinstance(wrapper, TiedLogits) and not self.rows.new
        ]
        return found | {f"base_model.model.{path}.trainable_tokens_delta": rows.clone() for path in heads}

    def enabled(self, on: bool) -> None:
        self.rows.on = on

    def may_rest(self) -> frozenset[str]:
        """A window need not hold any of the tokens. Where their logits are tied, they have a gradient all the same."""
        grad = self.rows.trained.grad
        absent = grad is None or not grad.any()
        return frozenset(self.parameters) if absent and not self.tied else frozenset()

    @torch.no_grad()
    def merge(self) -> None:
        """Write the rows into the table."""
        if self.rows.new:
            raise StackError(f"{self.name}: new tokens have no rows in the table to merge into; resize the model first")
        table = unwrap(self.wrappers[self.path]).get_parameter("weight")
        table[self.rows.known] = self.rows.trained[self.rows.known_slots].to(table.dtype)
        self.detach()

    def detach(self) -> None:
        swap(self.model, {wrapper: wrapper.base for wrapper in self.wrappers.values()})

    def resolved(self) -> dict[str, Any]:
        return {"tokens": self.rows.ids, "new": self.rows.new, "tied": self.tied}

    def peft_config(self) -> dict[str, Any] | None:
        """PEFT's method has no place for a trained head beside it, nor for rows beyond the table."""
        if self.rows.new or head_modules(self.model):
            return None
        return {"peft_type": "TRAINABLE_TOKENS", "token_indices": self.rows.ids, "target_modules": [self.path]}
