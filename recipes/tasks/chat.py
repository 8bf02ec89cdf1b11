"""`chat`: a causal language model on conversations.

One row: {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]}

Supervision is found by prefix difference: what a turn of the assistant adds to the rendered conversation before it is
supervised, up to and including the token that ends the turn. Positions decide, never token ids or marker strings, so
it works with any chat template, and where the padding token is the end token.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from onegpu.adapters import DataError

from .contract import IGNORED, Batch, Example, Objective, Reader, Row, RowProblem, Task, attention_mask, padded

__all__ = ["Chat", "answer", "render"]

Message = Mapping[str, Any]
ANSWER_TOKENS = 48  # in a demonstration


class Chat(Task):
    """Fine-tune on conversations; loss on what the assistant says."""

    api = 1
    kind = "causal-lm"
    needs = ("messages",)

    supervise: Literal["assistant", "last"] = "assistant"
    """Every turn of the assistant, or only the last one."""

    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a conversation above `max_length`."""

    def encode(self, number: int, row: Row, reader: Reader) -> Example:
        messages = _messages(row["messages"])
        ids, limit = render(reader.tokenizer, messages), reader.limit
        supervised = [IGNORED] * len(ids)
        for start, end in _spans(reader, messages, ids, number, last_only=self.supervise == "last"):
            supervised[start:end] = ids[start:end]
        if len(ids) > limit:
            if self.too_long == "error":
                raise DataError(
                    f"row {number} has {len(ids)} tokens and max_length is {limit}: raise max_length, or set "
                    "`too_long: drop` or `too_long: truncate`"
                )
            if self.too_long == "drop":
                raise RowProblem(f"{len(ids)} tokens, above {limit}")
            ids, supervised = ids[:limit], supervised[:limit]
        # The first token has no prediction, so a label there would be counted and never be trained.
        example = Example(number, ids, [IGNORED, *supervised[1:]])
        if not example.supervised:
            raise RowProblem(
                "no supervised token is left after truncation" if len(ids) == limit else "no assistant turn"
            )
        return example

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return {
            "input_ids": padded([e.ids for e in examples], pad),
            "attention_mask": attention_mask(examples),
            "labels": padded([e.labels for e in examples], IGNORED),
        }

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Summed cross-entropy of the supervised tokens, in float32; the weight is how many there are."""
        targets = batch["labels"][:, 1:]  # (batch, tokens - 1): the token after each position
        positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where any row has a target: (kept,)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(**inputs, logits_to_keep=positions).logits  # (batch, kept, vocabulary)
        else:
            logits = model(**inputs).logits[:, positions]
        supervised = targets[:, positions] != IGNORED  # (batch, kept)
        right = targets[:, positions][supervised]  # (supervised,)
        predicted = logits[supervised].float()  # (supervised, vocabulary): only what carries loss is widened
        hits = float((predicted.detach().argmax(-1) == right).sum())
        weight = float(len(right))
        return Objective(F.cross_entropy(predicted, right, reduction="sum"), weight, {"right": hits, "tokens": weight})

    def scores(self, counts: Mapping[str, float]) -> dict[str, float]:
        return {"token_accuracy": counts["right"] / counts["tokens"]}

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        messages = _messages(row["messages"])
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        before = messages[:last]
        question = next((str(m["content"]) for m in reversed(before) if m["role"] == "user"), "")
        return question, answer(model, reader, before, ANSWER_TOKENS)


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> list[int]:
    """A conversation as token ids: the one rendering for training, evaluation and chat.

    Args:
        prompt: end with the opening of the assistant's turn.
    """
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as cause:  # templates raise whatever their authors wrote
        raise RowProblem(f"the chat template refuses it: {str(cause).splitlines()[0]}") from cause
    # The template writes every special token itself; the tokenizer must not add a second beginning.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        raise DataError(f"the rendered conversation begins with {tokenizer.bos_token!r} twice: mend the chat template")
    return ids


def answer(model: Any, reader: Reader, messages: Sequence[Message], tokens: int) -> str:
    """The model's greedy answer to a conversation."""
    tokenizer = reader.tokenizer
    ids = torch.tensor([render(tokenizer, messages, prompt=True)], device=model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(reader.stops),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    model.train(training)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def _messages(value: Any) -> list[Message]:
    good = isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    if not good:
        raise RowProblem('`messages` must be a list of {"role": ..., "content": ...}')
    if not value:
        raise RowProblem("`messages` is empty")
    return list(value)


def _spans(
    reader: Reader, messages: Sequence[Message], ids: Sequence[int], number: int, *, last_only: bool
) -> list[tuple[int, int]]:
    """(start, end) of the supervised tokens of each assistant turn."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RowProblem("no assistant turn")
    if turns[0] == 0:
        raise RowProblem("begins with the assistant: there is nothing to answer")
    tokenizer = reader.tokenizer
    spans = []
    for turn in turns[-1:] if last_only else turns:
        place = f"row {number}, turn {turn}"
        before = render(tokenizer, messages[:turn], prompt=True)
        after = render(tokenizer, messages[: turn + 1])
        _check_prefix(before, after, tokenizer, place)
        _check_prefix(after, ids, tokenizer, place)
        ends = [i for i in range(len(before), len(after)) if ids[i] in reader.stops]
        if not ends:
            raise DataError(
                f"{place}: the chat template does not end an answer with a stop token "
                f"({tokenizer.decode(sorted(reader.stops))!r}), so the model would not learn to stop"
            )
        spans.append((len(before), ends[-1] + 1))
    return spans


def _check_prefix(prefix: Sequence[int], whole: Sequence[int], tokenizer: Any, place: str) -> None:
    if list(whole[: len(prefix)]) != list(prefix):
        at = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(whole))
        was, became = (tokenizer.decode(ids[at : at + 3]) for ids in (prefix, whole))
        raise DataError(
            f"{place}: the rendered prompt is not a prefix of the conversation from token {at} on ({was!r} became "
            f"{became!r}): the chat template rewrites earlier turns. Use `supervise: last`, or split the conversation"
        )
