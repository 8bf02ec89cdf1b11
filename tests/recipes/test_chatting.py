from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import ArtefactError
from onegpu.recipes import Loaded, Outcome, chatting
from onegpu.recipes.chatting import open_chat

OnegpuCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(chat_recipe: Callable[..., Loaded], run: Callable[..., Outcome]) -> Outcome:
    """A run that learned something, over a packed base."""
    return run(chat_recipe(["nf4", {"lora": {"rank": 4}}]))


def test_a_conversation_is_remembered(trained: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def answer(model: Any, reader: Any, messages: Any, tokens: int) -> str:
        heard.append([m["content"] for m in messages])
        return f"answer {len(heard)}"

    monkeypatch.setattr(chatting, "answer", answer)
    talk = open_chat(trained.adapter, 5)
    assert (talk("Hi"), talk("And?")) == ("answer 1", "answer 2")
    assert heard == [["Hi"], ["Hi", "answer 1", "And?"]]


def test_run_folder_and_adapter_folder_answer_alike(trained: Outcome, onegpu: OnegpuCommand) -> None:
    code, answered, _ = onegpu("chat", str(trained.adapter.parent), "-m", "Hi", "--tokens", "5")
    assert code == 0
    assert answered == open_chat(trained.adapter, 5)("Hi") + "\n"


def test_a_classifier_does_not_chat(
    class_recipe: Callable[..., Loaded], run: Callable[..., Outcome], onegpu: OnegpuCommand
) -> None:
    outcome = run(class_recipe())
    with pytest.raises(ArtefactError, match="was not trained by the task `chat`"):
        open_chat(outcome.adapter, 5)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_what_is_no_adapter_is_refused(name: str, tmp_path: Path, onegpu: OnegpuCommand) -> None:
    code, out, err = onegpu("chat", str(tmp_path / name), "-m", "Hi")
    assert (code, out) == (2, "")
    assert "is not an adapter folder" in err
    assert "Traceback" not in err


def test_an_empty_line_or_the_end_of_input_ends_the_conversation(
    trained: Outcome, onegpu: OnegpuCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ending in (["Hi", ""], ["Hi"]):
        lines = iter(ending)

        def ask(prompt: str, lines: Any = lines) -> str:
            try:
                return str(next(lines))
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", ask)
        code, out, _ = onegpu("chat", str(trained.adapter), "--tokens", "3")
        assert code == 0
        assert out.endswith("\n")
