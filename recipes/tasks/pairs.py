"""Rows that compare: a prompt with a chosen and a rejected completion, read as trl's preference data is written.

{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
{"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": [{"role": "assistant", "content": "4"}], "rejected": ...}
{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [{"role": "user", ...}, ...]}

In the last form both are whole conversations, and the turns with which both begin are the prompt. Messages are rendered
by the chat template, exactly as in `chat`, with a column `tools` as there; texts are plain, as in `completion`, and end
with the end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean

from .beginnings import check_begins
from .contract import IGNORED, Direction, Example, Reader, Row, RowProblem, TooLong
from .conversations import Conversation, Message, assistant_spans, check_template, common_length, read_conversation
from .lengths import refuse_too_long
from .texts import around, end_of, read_text, token_ids

__all__ = [
    "Continued",
    "PairExample",
    "Said",
    "continued",
    "fitted",
    "marked",
    "pair_scores",
    "prompt_ids",
    "read_pair",
    "reward_directions",
    "said",
]

Said = str | Conversation
"""A plain text, or messages."""

POLICIES: tuple[TooLong, ...] = ("error", "drop", "cut-left")


@dataclass(frozen=True)
class PairExample(Example):
    """Two sequences that are compared: the chosen one in `ids` and `labels`, and the rejected one."""

    other_ids: list[int] = field(default_factory=list)
    other_labels: list[int] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """How many labels of both carry loss."""
        return sum(label != IGNORED for label in (*self.labels, *self.other_labels))

    @property
    def sequences(self) -> Sequence[Sequence[int]]:
        """The chosen one and the rejected one."""
        return (self.ids, self.other_ids)

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.ids) + len(self.other_ids)


@dataclass(frozen=True)
class Continued:
    """A prompt and its completion as tokens; every label is IGNORED but those of what the model is to say."""

    ids: list[int]
    labels: list[int]
    start: int  # where the completion begins
    lead: int = 0  # tokens at the very beginning that stay when the prompt is cut


# --- rows -------------------------------------------------------------------------------------------------------------


def read_pair(row: Row) -> tuple[Said, Said, Said]:
    """(prompt, chosen, rejected): all plain texts or all conversations.

    Raises:
        RowProblem: the row has no such thing.
    """
    chosen, rejected = said(row, "chosen"), said(row, "rejected")
    prompt = said(row, "prompt") if row.get("prompt") is not None else None
    if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
        found: tuple[Said, Said, Said] = _conversations(prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        found = prompt, chosen, rejected
    elif prompt is None:
        raise RowProblem('no "prompt"')
    else:
        raise RowProblem("`prompt`, `chosen` and `rejected` must be all texts or all lists of messages")
    if found[1] == found[2]:
        raise RowProblem("chosen and rejected are the same")
    return found


def said(row: Row, column: str) -> Said:
    """A text, or messages with the tools that the row offers.

    Raises:
        RowProblem: neither, or empty.
    """
    value = row.get(column)
    if value is None:
        raise RowProblem(f'no "{column}"')
    if isinstance(value, str):
        return read_text(row, column)
    try:
        return read_conversation({"messages": value, "tools": row.get("tools")})
    except RowProblem as problem:
        raise RowProblem(f"`{column}` is neither a text nor messages: {problem}") from problem


def _conversations(
    prompt: Said | None, chosen: Conversation, rejected: Conversation
) -> tuple[Conversation, Conversation, Conversation]:
    """The prompt in front of both, whether it is written there, in its own column, or in both places."""
    first, second = list(chosen.messages), list(rejected.messages)
    shared = first[: common_length(first, second)]
    if first == second:
        raise RowProblem("chosen and rejected are the same")
    if isinstance(prompt, Conversation):
        # Some data sets have the prompt in its own column *and* in front of both completions.
        shared = shared[: len(prompt.messages)] if shared[: len(prompt.messages)] == prompt.messages else []
        before = list(prompt.messages)
    elif not shared:
        raise RowProblem("chosen and rejected have no first turn in common, and no messages are in `prompt`")
    elif prompt is not None and all(turn["content"] != prompt for turn in shared):
        raise RowProblem("the text in `prompt` is not what both conversations begin with")
    else:
        before = shared
    texts = (before, first[len(shared) :], second[len(shared) :])
    begins, better, worse = (replace(chosen, messages=messages) for messages in texts)
    return begins, better, worse


# --- tokens -----------------------------------------------------------------------------------------------------------


def continued(prompt: Said, completion: Said, reader: Reader) -> Continued:
    """A prompt and its completion as tokens, up to and including the token that ends it.

    Raises:
        RowProblem: nothing to answer, nothing said, or one is a text and the other is messages.
        DataError: the tokenizer or its chat template cannot be used.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _texts(prompt, completion, reader)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowProblem("the prompt and its completion must be both texts or both lists of messages")
    return _turns(prompt.messages, completion, reader)


def _texts(prompt: str, completion: str, reader: Reader) -> Continued:
    """Each is tokenised by itself: the prompt has the same tokens as when a model is asked to continue it."""
    before, lead = prompt_ids(prompt, reader)
    if not before:
        raise RowProblem("the prompt has no tokens, so nothing predicts the first one of the completion")
    after, end = token_ids(reader.tokenizer, completion), end_of(reader.tokenizer)
    if after[-1:] != [end]:
        after.append(end)
    return Continued([*before, *after], [IGNORED] * len(before) + after, len(before), lead)


def prompt_ids(prompt: str, reader: Reader) -> tuple[list[int], int]:
    """A text that is to be continued, as tokens; and how many of them only mark the beginning."""
    begin, _ = around(reader.tokenizer)
    ids = token_ids(reader.tokenizer, prompt)
    lead = len(begin) or int(ids[:1] == [reader.tokenizer.bos_token_id])
    return ids if ids[: len(begin)] == begin else [*begin, *ids], lead


def _turns(prompt: Sequence[Message], completion: Conversation, reader: Reader) -> Continued:
    """Supervised is what each turn of the assistant adds after the prompt, up to the token that ends the turn.

    What a template writes after the last of them (a line break) is left out: no model is asked for it.
    """
    if prompt[-1]["role"] == "assistant":
        raise RowProblem("the prompt ends with the assistant: there is nothing to answer")
    if not completion.messages or completion.messages[0]["role"] != "assistant":
        raise RowProblem("a completion does not begin with the assistant")
    talk = replace(completion, messages=[*prompt, *completion.messages])
    check_template(reader.tokenizer, talk)
    ids = talk.ids(reader.tokenizer)
    answers = sum(message["role"] == "assistant" for message in completion.messages)
    spans = assistant_spans(reader, talk, ids, last_only=answers == 1)[-answers:]
    if spans[0][0] == 0:
        raise RowProblem("the chat template writes nothing before the completion, so nothing predicts its first token")
    labels, stop = [IGNORED] * len(ids), spans[-1][1]
    for start, end in spans:
        labels[start:end] = ids[start:end]
    begins = ids[:1] == [reader.tokenizer.bos_token_id]
    if not begins:
        check_begins(reader.tokenizer)
    return Continued(ids[:stop], labels[:stop], spans[0][0], int(begins))


def fitted(sequences: Sequence[Continued], reader: Reader, policy: TooLong) -> tuple[Sequence[Continued], int]:
    """Sequences with one prompt, none above the limit, and how many tokens of the prompt were cut from its left.

    Raises:
        RowProblem, DataError: too long, and not to be cut, or there would be no prompt left.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    refuse_too_long(longest, reader.limit, policy, POLICIES)
    cut = max(0, longest - reader.limit)
    if cut and any(cut >= sequence.start - sequence.lead for sequence in sequences):
        raise RowProblem(f"the completion leaves no room for a prompt in {reader.limit} tokens")
    return [_without(sequence, cut) for sequence in sequences], cut


def _without(sequence: Continued, cut: int) -> Continued:
    lead, rest = sequence.lead, sequence.lead + cut
    ids = [*sequence.ids[:lead], *sequence.ids[rest:]]
    return replace(
        sequence, ids=ids, labels=[*sequence.labels[:lead], *sequence.labels[rest:]], start=sequence.start - cut
    )


def marked(ids: Sequence[int], labels: Sequence[int], mark: str, reader: Reader) -> list[tuple[str, str | None]]:
    """A sequence as text for people, with a mark at what is supervised."""
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [(reader.tokenizer.decode([i for i, _ in run]), mark if learned else None) for learned, run in runs]


# --- scores ---------------------------------------------------------------------------------------------------------


def reward_directions(better: str, worse: str) -> dict[str, Direction]:
    """Which way the mean rewards of the two kinds are better."""
    return {f"{better}_reward": "higher", f"{worse}_reward": "lower"}


def pair_scores(rewards: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Scores of (reward of the chosen, reward of the rejected) of each pair; a tie counts as wrong, as in trl."""
    chosen, rejected = zip(*rewards, strict=True)
    return {
        "accuracy": fmean(first > second for first, second in rewards),
        "margin": fmean(first - second for first, second in rewards),
        "chosen_reward": fmean(chosen),
        "rejected_reward": fmean(rejected),
    }
