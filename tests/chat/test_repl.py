"""A conversation in the terminal; `tests/e2e/test_chat.py` has it as a process, at a terminal."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from corral.answering.settings import AnswererSettings
from corral.chat.repl import AnswerPiece, ChatBackend, LocalBackend, chat
from corral.cli import main
from corral.errors import EngineError
from corral.messages import Conversation
from corral.recipe import Answer, Consensus
from tests.answering.test_settings import write_run


def local(model: Path, **answer: Any) -> LocalBackend:
    return LocalBackend(AnswererSettings(str(model), Answer(max_tokens=5, **answer), 0, "transformers"))


class Output(NamedTuple):
    """What a chat wrote."""

    out: str
    err: str


RunChat = Callable[..., Output]


@pytest.fixture
def run_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunChat:
    """`run_chat(backend, lines, system)` gives a chat these lines, as a user types them."""

    def run(backend: ChatBackend, lines: str, system: str | None = None) -> Output:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with closing(backend):
            chat(backend, system=system)
        shown = capsys.readouterr()
        return Output(shown.out, shown.err)

    return run


class Echo:
    """Replies with its number and the question; after `fail` it fails in the middle of the answer."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        self.conversations.append(conversation)
        question = conversation.messages[-1].content
        yield AnswerPiece(f"{len(self.conversations)}: ")
        if question == "fail":
            raise EngineError("the connection was lost")
        if question == "stop":
            raise KeyboardInterrupt
        if question == "fail once" and len(self.conversations) == 1:
            raise EngineError("busy", hint="/retry in 7 s")
        yield AnswerPiece(question)

    def close(self) -> None:
        pass

    @property
    def last_messages(self) -> list[tuple[str, str]]:
        """The messages of the last conversation that it was asked."""
        return [(message.role, message.content) for message in self.conversations[-1].messages]


def test_each_line_is_answered_by_the_chosen_engine(tiny_folder: Path, run_chat: RunChat) -> None:
    answers = []
    for lines in ("Hello\n", "Hello\n\nAnd you?\nquit\nnot read\n"):
        answers.append(run_chat(local(tiny_folder), lines, "Be brief.").out)
    assert answers[0].strip()
    assert answers[1].startswith(answers[0].rstrip("\n"))
    assert len(answers[1]) > len(answers[0])


def test_after_a_turn_that_fails_the_conversation_continues_without_it(tiny_folder: Path, run_chat: RunChat) -> None:
    output = run_chat(local(tiny_folder), "word " * 600 + "\nHello\n")
    assert "exceed" in output.err
    assert output.out.strip()


def test_with_a_vote_the_winner_is_shown_with_its_score(tiny_folder: Path, run_chat: RunChat) -> None:
    consensus = Consensus(method="rouge-l", n=3, stop="never")
    output = run_chat(local(tiny_folder, consensus=consensus), "Hello\n")
    assert "rouge-l" in output.err
    assert "among 3]" in output.err
    assert output.out.strip()


def test_an_answer_that_breaks_off_leaves_the_conversation_as_it_was_and_can_be_retried(run_chat: RunChat) -> None:
    echo = Echo()
    output = run_chat(echo, "one\nfail\n/retry\ntwo\n")
    assert [message.content for message in echo.conversations[2].messages] == ["one", "1: one", "fail"]
    assert echo.last_messages == [("user", "one"), ("assistant", "1: one"), ("user", "two")]
    assert output.err.count("corral: the connection was lost; /retry asks again") == 2
    assert "2:  …" in output.out
    echo = Echo()
    assert "busy; /retry in 7 s" in run_chat(echo, "fail once\n/retry\nmore\n").err
    assert echo.last_messages == [("user", "fail once"), ("assistant", "2: fail once"), ("user", "more")]


def test_retry_replaces_the_last_answer(run_chat: RunChat) -> None:
    echo = Echo()
    output = run_chat(echo, "/retry\none\ntwo\n/retry\nthree\n")
    assert [m.content for m in echo.conversations[-1].messages] == ["one", "1: one", "two", "3: two", "three"]
    assert "there is no question yet" in output.err


def test_the_part_of_an_answer_before_it_was_stopped_is_kept(run_chat: RunChat) -> None:
    echo = Echo()
    output = run_chat(echo, "stop\nmore\n")
    assert echo.last_messages == [("user", "stop"), ("assistant", "1: "), ("user", "more")]
    assert "1:  …\n" in output.out


def test_a_system_message_can_be_set_for_later_turns_and_retries_and_removed(run_chat: RunChat) -> None:
    echo = Echo()
    run_chat(echo, "one\n/system Rhyme.\n/retry\n", "Be brief.")
    assert echo.conversations[0].messages[0].content == "Be brief."
    assert echo.last_messages == [("system", "Rhyme."), ("user", "one")]
    echo = Echo()
    run_chat(echo, "one\n/system\ntwo\n", "Be brief.")
    assert echo.last_messages == [("user", "one"), ("assistant", "1: one"), ("user", "two")]


def test_a_conversation_is_saved_as_a_data_row_and_no_other_file_is_overwritten(
    tmp_path: Path, run_chat: RunChat
) -> None:
    file, other = tmp_path / "talk.jsonl", tmp_path / "other.jsonl"
    other.write_text("mine")
    lines = f"/save {file}\nGrüße\n/save {file}\nmore\n/save {file}\n/save {other}\n/save\n/save {tmp_path}/no/where\n"
    output = run_chat(Echo(), lines, "Be brief.")
    (row,) = file.read_text("utf-8").splitlines()
    expected = [("system", "Be brief."), ("user", "Grüße"), ("assistant", "1: Grüße"), ("user", "more")]
    assert Conversation.from_json(json.loads(row)) == Conversation.from_turns(*expected, ("assistant", "2: more"))  # type: ignore[arg-type]
    assert other.read_text() == "mine"
    for part in ("there is no answer yet", f"{other} exists", "needs a file name", "cannot be written"):
        assert part in output.err


def test_an_unknown_command_is_reported_and_not_sent_and_help_lists_the_commands(run_chat: RunChat) -> None:
    echo = Echo()
    output = run_chat(echo, "/dance\n/help\n /etc is a folder\n")
    assert echo.last_messages == [("user", " /etc is a folder")]
    assert "/dance is not a command" in output.err
    for command in ("/system", "/retry", "/save", "exit"):
        assert command in output.err


def test_control_characters_in_an_answer_do_not_reach_the_terminal(run_chat: RunChat) -> None:
    echo = Echo()
    out = run_chat(echo, "a\x1b]0;title\x07\x9b2Jb\tc\nmore\n").out
    assert "a]0;title2Jb\tc" in out
    assert echo.last_messages[1] == ("assistant", "1: a\x1b]0;title\x07\x9b2Jb\tc"), (
        "the conversation keeps the original text"
    )


def test_control_characters_in_errors_and_notes_do_not_reach_the_terminal(run_chat: RunChat) -> None:
    class Steering(Echo):
        def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
            yield AnswerPiece("So", "[\x1b[2Jone of three]")
            raise EngineError("\x1b]0;title\x07busy", hint="\x9b2Jwait")

    output = run_chat(Steering(), "Hello\n")
    assert "[[2Jone of three]" in output.err
    assert "corral: ]0;titlebusy; 2Jwait" in output.err
    assert not {"\x1b", "\x07", "\x9b"} & set(output.err + output.out)


def test_a_run_is_asked_with_the_settings_of_its_recipe_and_the_command_line_overrides_them(
    tiny_folder: Path,
    tmp_path: Path,
    run_chat: RunChat,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "merge" / "model")
    write_run(run, "temperature = 0.0", max_tokens=3, base=tiny_folder)

    def answers(*options: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert main(["chat", *options, "--engine", "transformers"]) == 0
        return capsys.readouterr().out

    five = run_chat(local(tiny_folder), "Hello\n").out.strip()  # greedy, as `Answer` has it
    three = answers(str(run)).strip()
    assert three == answers(str(run)).strip()
    assert five.startswith(three)
    assert len(three) < len(five)
    assert answers(str(run), "--max-tokens", "5").strip() == five
    drawn = {answers(str(tiny_folder), "--max-tokens", "8") for _ in range(3)}
    assert len(drawn) > 1, "a model without a run is sampled at a temperature"
