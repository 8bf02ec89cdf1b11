"""Conversations: what rows of them may look like, how they become tokens, and where the assistant speaks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onegpu.adapters import DataError, RecipeError

from .contract import Reader, Row, RowProblem
from .texts import token_ids

__all__ = [
    "Conversation",
    "Message",
    "Span",
    "assistant_spans",
    "assistant_turns",
    "check_says_all",
    "check_template",
    "common_length",
    "read_conversation",
    "render",
]

Message = Mapping[str, Any]
Span = tuple[int, int]  # of tokens: start, end


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and the tools that the assistant may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions

    def ids(self, tokenizer: Any, turns: int | None = None, *, prompt: bool = False) -> list[int]:
        """The first so many turns as tokens; see `render`."""
        return render(tokenizer, self.messages[:turns], prompt=prompt, tools=self.tools)


# --- rows -------------------------------------------------------------------------------------------------------------


def read_conversation(row: Row) -> Conversation:
    """The conversation of a row: its column `messages`, and `tools` where there is one.

    Raises:
        RowProblem: it is no conversation.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise RowProblem('`messages` must be a list of {"role": ..., "content": ...}')
    if not messages:
        raise RowProblem("`messages` is empty")
    return Conversation([_message(message) for message in messages], _tools(row.get("tools")))


def _message(message: Message) -> Message:
    """A message without keys that say nothing (tables have every key in every row) and with calls as objects."""
    found = {key: value for key, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str):
        raise RowProblem("a turn's `role` is not a text")
    calls = found.pop("tool_calls", None)
    content = found.get("content", "" if calls else None)  # templates write None as "None"
    if not isinstance(content, (str, list)):
        raise RowProblem('`messages` must be a list of {"role": ..., "content": ...}, and a `content` is not a text')
    if found["role"] == "assistant" and not calls and not (content.strip() if isinstance(content, str) else content):
        raise RowProblem("a turn of the assistant is empty")
    return found | {"content": content} | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _call(call: Any) -> dict[str, Any]:
    """One call of a tool; arguments that were written as JSON text are read, since templates write them as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowProblem('a tool call must be {"function": {"name": ..., "arguments": {...}}}')
    arguments = _json(function.get("arguments") or {}, "the `arguments` of a tool call")
    if not isinstance(arguments, Mapping):
        raise RowProblem("the `arguments` of a tool call are not an object")
    inner = {**function, "arguments": arguments}
    return {**call, "function": inner} if function is not call else {"type": "function", "function": inner}


def _tools(value: Any) -> Sequence[Mapping[str, Any]] | None:
    tools = _json(value, "`tools`")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowProblem("`tools` must be a list of JSON schemas of functions")
    return tools


def _json(value: Any, what: str) -> Any:
    """A value, or what it says where it is JSON as text: tables hold nested values of unequal form like that."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as cause:
        raise RowProblem(f"{what}: not JSON") from cause


# --- tokens -----------------------------------------------------------------------------------------------------------


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """A conversation as token ids: the one rendering for training, evaluation and chat.

    Args:
        prompt: end with the opening of the assistant's turn.
        tools: what the assistant may call, as JSON schemas of functions.

    Raises:
        RecipeError: the base has no chat template.
        DataError: the template does what no model should be trained on.
        RowProblem: the template refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise RecipeError("the base has no chat template, so conversations cannot be rendered for it")
    offered = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **offered)
    except Exception as cause:  # templates raise whatever their authors wrote
        raise RowProblem(f"the chat template refuses it: {(str(cause).splitlines() or ['?'])[0]}") from cause
    # The template writes every special token itself; the tokenizer must not add a second beginning.
    ids = token_ids(tokenizer, text)
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:
        raise DataError(f"the rendered conversation begins with {tokenizer.bos_token!r} twice: mend the chat template")
    return ids


def check_says_all(tokenizer: Any) -> None:
    """Check that a chat template writes what either side says.

    Raises:
        RecipeError: there is none, or it leaves the question out, or the answer.
    """
    if tokenizer.chat_template is None:
        raise RecipeError("the base has no chat template, so conversations cannot be rendered for it")

    def rendered(asked: str, said: str) -> list[int]:
        return render(tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": said}])

    try:
        for whose, other in (("user", rendered("b", "a")), ("assistant", rendered("a", "b"))):
            if rendered("a", "a") == other:
                raise RecipeError(f"the chat template of the base leaves out what the {whose} says")
    except (RowProblem, DataError):
        return  # what a template refuses is told of the row that it refuses


def check_template(tokenizer: Any, talk: Conversation) -> None:
    """Check that the template writes what the conversation has of tools, and what others say than the two sides.

    Raises:
        DataError: it leaves them out, so that the model would never see them.
    """
    for role in {str(message["role"]): None for message in talk.messages}:
        if role not in ("user", "assistant") and _ignores(tokenizer, talk, role):
            raise DataError(f"the chat template leaves out what {role!r} says: use a base that reads it")
    if talk.tools and talk.ids(tokenizer) == render(tokenizer, talk.messages):
        raise DataError("the chat template ignores `tools`: use a base that knows tools, or drop the column")
    calling = [message for message in talk.messages if "tool_calls" in message]
    if calling:
        bare = [{key: v for key, v in message.items() if key != "tool_calls"} for message in talk.messages]
        if talk.ids(tokenizer) == render(tokenizer, bare, tools=talk.tools):
            raise DataError("the chat template ignores `tool_calls`: use a base that knows tools")


def _ignores(tokenizer: Any, talk: Conversation, role: str) -> bool:
    """Whether it makes no difference to the tokens what a role says."""
    said = [message for message in talk.messages if message["role"] == role and isinstance(message["content"], str)]
    other = [m | {"content": f"{m['content']}?"} if m in said else m for m in map(dict, talk.messages)]
    return bool(said) and talk.ids(tokenizer) == render(tokenizer, other, tools=talk.tools)


# --- the assistant's turns --------------------------------------------------------------------------------------------


def assistant_turns(talk: Conversation) -> list[int]:
    """Which turns are the assistant's answers to something.

    Raises:
        RowProblem: none, or the first turn is.
    """
    turns = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if not turns:
        raise RowProblem("no assistant turn")
    if turns[0] == 0:
        raise RowProblem("begins with the assistant: there is nothing to answer")
    return turns


def assistant_spans(reader: Reader, talk: Conversation, ids: Sequence[int], *, last_only: bool) -> list[Span]:
    """Where the assistant speaks in a rendered conversation, each up to and including the token that ends its turn.

    Args:
        ids: the rendered conversation.

    Raises:
        RowProblem: it says nothing, or there is nothing to answer.
        DataError: the chat template does not tell where it speaks, or does not end its turns.
    """
    turns = assistant_turns(talk)
    tokenizer = reader.tokenizer
    spans = []
    for turn in turns[-1:] if last_only else turns:
        place = f"turn {turn}"
        before = talk.ids(tokenizer, turn, prompt=True)
        after = talk.ids(tokenizer, turn + 1)
        if not before:
            raise DataError(f"{place}: the chat template writes nothing before the answer, so all would be supervised")
        _check_prefix(before, after, tokenizer, place)
        _check_prefix(after, ids, tokenizer, place)
        ends = [i for i in range(len(before), len(after)) if ids[i] in reader.stops]
        if not ends:
            raise DataError(
                f"{place}: the chat template does not end an answer with a stop token "
                f"({tokenizer.decode(sorted(reader.stops))!r}), so the model would not learn to stop"
            )
        if len(ends) > 1:
            _refuse_stops_inside(reader, talk.messages[turn], place)
        spans.append((len(before), ends[-1] + 1))
    return spans


def _refuse_stops_inside(reader: Reader, message: Message, place: str) -> None:
    """A model that says this would be stopped before it has said all."""
    said = message["content"]
    inside = reader.stops.intersection(token_ids(reader.tokenizer, said)) if isinstance(said, str) else ()
    if inside:
        token = reader.tokenizer.decode(sorted(inside))
        raise RowProblem(f"{place}: the answer holds {token!r}, at which the model stops, before its end")


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common from their beginning on."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _check_prefix(prefix: Sequence[int], whole: Sequence[int], tokenizer: Any, place: str) -> None:
    if list(whole[: len(prefix)]) != list(prefix):
        at = common_length(prefix, whole)
        was, became = (tokenizer.decode(ids[at : at + 3]) for ids in (prefix, whole))
        raise DataError(
            f"{place}: the rendered prompt is not a prefix of the conversation from token {at} on ({was!r} became "
            f"{became!r}): the chat template rewrites earlier turns. Use `supervise: last`, or split the conversation"
        )
