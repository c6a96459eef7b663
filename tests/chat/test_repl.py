"""A conversation in the terminal; `tests/e2e/test_chat.py` has it as a process, at a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from corral.answering.settings import AnswererSettings
from corral.chat.repl import AnswerPiece, ChatBackend, LocalBackend, chat
from corral.errors import EngineError
from corral.messages import Conversation
from corral.recipe import Answer, Consensus


def local(model: Path, **answer: Any) -> LocalBackend:
    return LocalBackend(AnswererSettings(str(model), Answer(max_tokens=5, **answer), 0, "transformers"))


def talk(talker: ChatBackend, lines: str, monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    with closing(talker):
        chat(talker, system=system)


class Echo:
    """Tells what it was asked, in order; `fail` fails, half-way after some words."""

    def __init__(self) -> None:
        self.asked: list[Conversation] = []

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        self.asked.append(conversation)
        question = conversation.messages[-1].content
        yield AnswerPiece(f"{len(self.asked)}: ")
        if question == "fail":
            raise EngineError("the connection was lost")
        if question == "stop":
            raise KeyboardInterrupt
        if question == "fail once" and len(self.asked) == 1:
            raise EngineError("busy", hint="/retry in 7 s")
        yield AnswerPiece(question)

    def close(self) -> None:
        pass

    @property
    def told(self) -> list[tuple[str, str]]:
        """The messages of the last conversation."""
        return [(message.role, message.content) for message in self.asked[-1].messages]


def test_what_a_user_types_is_answered_by_the_engine_that_was_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = []
    for lines in ("Hello\n", "Hello\n\nAnd you?\nquit\nnot read\n"):
        talk(local(tiny_folder), lines, monkeypatch, "Be brief.")
        spoken.append(capsys.readouterr().out)
    assert spoken[0].strip()
    assert spoken[1].startswith(spoken[0].rstrip("\n"))
    assert len(spoken[1]) > len(spoken[0])


def test_a_turn_that_fails_is_taken_back_and_the_conversation_goes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(local(tiny_folder), "word " * 600 + "\nHello\n", monkeypatch)
    said = capsys.readouterr()
    assert "exceed" in said.err
    assert said.out.strip()


def test_with_a_vote_the_winner_is_said_with_how_it_won(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    consensus = Consensus(method="rouge-l", n=3, stop="never")
    talk(local(tiny_folder, consensus=consensus), "Hello\n", monkeypatch)
    said = capsys.readouterr()
    assert "rouge-l" in said.err
    assert "among 3]" in said.err
    assert said.out.strip()


def test_an_answer_that_breaks_off_keeps_the_conversation_and_can_be_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    talk(echo, "one\nfail\n/retry\ntwo\n", monkeypatch)
    assert [message.content for message in echo.asked[2].messages] == ["one", "1: one", "fail"]
    assert echo.told == [("user", "one"), ("assistant", "1: one"), ("user", "two")]
    said = capsys.readouterr()
    assert said.err.count("corral: the connection was lost; /retry asks again") == 2
    assert "2:  …" in said.out
    echo = Echo()
    talk(echo, "fail once\n/retry\nmore\n", monkeypatch)
    assert "busy; /retry in 7 s" in capsys.readouterr().err
    assert echo.told == [("user", "fail once"), ("assistant", "2: fail once"), ("user", "more")]


def test_retry_takes_the_place_of_the_last_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    talk(echo, "/retry\none\ntwo\n/retry\nthree\n", monkeypatch)
    assert [m.content for m in echo.asked[-1].messages] == ["one", "1: one", "two", "3: two", "three"]
    assert "nothing was asked yet" in capsys.readouterr().err


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    talk(echo, "stop\nmore\n", monkeypatch)
    assert echo.told == [("user", "stop"), ("assistant", "1: "), ("user", "more")]
    assert "1:  …\n" in capsys.readouterr().out


def test_system_is_told_from_there_on_also_to_a_retry_and_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Echo()
    talk(echo, "one\n/system Rhyme.\n/retry\n", monkeypatch, "Be brief.")
    assert echo.asked[0].messages[0].content == "Be brief."
    assert echo.told == [("system", "Rhyme."), ("user", "one")]
    echo = Echo()
    talk(echo, "one\n/system\ntwo\n", monkeypatch, "Be brief.")
    assert echo.told == [("user", "one"), ("assistant", "1: one"), ("user", "two")]


def test_a_conversation_is_saved_as_a_row_that_corral_reads_and_no_other_file_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "talk.jsonl", tmp_path / "other.jsonl"
    other.write_text("mine")
    lines = f"/save {file}\nGrüße\n/save {file}\nmore\n/save {file}\n/save {other}\n/save\n/save {tmp_path}/no/where\n"
    talk(Echo(), lines, monkeypatch, "Be brief.")
    (row,) = file.read_text("utf-8").splitlines()
    expected = [("system", "Be brief."), ("user", "Grüße"), ("assistant", "1: Grüße"), ("user", "more")]
    assert Conversation.from_json(json.loads(row)) == Conversation.from_turns(*expected, ("assistant", "2: more"))  # type: ignore[arg-type]
    assert other.read_text() == "mine"
    said = capsys.readouterr().err
    for part in ("nothing was answered yet", f"{other} exists", "needs the name", "cannot be written"):
        assert part in said


def test_a_command_nobody_knows_is_said_and_not_asked_and_help_tells_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    talk(echo, "/dance\n/help\n /etc is a folder\n", monkeypatch)
    assert echo.told == [("user", " /etc is a folder")]
    said = capsys.readouterr().err
    assert "/dance is no command" in said
    for command in ("/system", "/retry", "/save", "exit"):
        assert command in said


def test_what_comes_from_elsewhere_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo = Echo()
    talk(echo, "a\x1b]0;title\x07\x9b2Jb\tc\nmore\n", monkeypatch)
    out = capsys.readouterr().out
    assert "a]0;title2Jb\tc" in out
    assert echo.told[1] == ("assistant", "1: a\x1b]0;title\x07\x9b2Jb\tc"), "the conversation keeps what was said"


def test_errors_and_notes_from_elsewhere_do_not_steer_it_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Steering(Echo):
        def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
            yield AnswerPiece("So", "[\x1b[2Jone of three]")
            raise EngineError("\x1b]0;title\x07busy", hint="\x9b2Jwait")

    talk(Steering(), "Hello\n", monkeypatch)
    said = capsys.readouterr()
    assert "[[2Jone of three]" in said.err
    assert "corral: ]0;titlebusy; 2Jwait" in said.err
    assert not {"\x1b", "\x07", "\x9b"} & set(said.err + said.out)


RECIPE = """
name = "mine"
[model]
base = "{base}"
[[data.sources]]
path = "rows.jsonl"
[[train]]
steps = 1
[answer]
max_tokens = 3
temperature = 0.0
"""


def test_a_run_is_asked_as_its_recipe_says_and_the_command_line_overrides(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from corral.cli import main

    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "merge" / "model")
    (run / "recipe.toml").write_text(RECIPE.format(base=tiny_folder))

    def spoken(*options: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert main(["chat", *options, "--engine", "transformers"]) == 0
        return capsys.readouterr().out

    talk(local(tiny_folder), "Hello\n", monkeypatch)
    five = capsys.readouterr().out.strip()  # greedy, as `Answer` has it
    three = spoken(str(run)).strip()
    assert three == spoken(str(run)).strip()
    assert five.startswith(three)
    assert len(three) < len(five)
    assert spoken(str(run), "--max-tokens", "5").strip() == five
    drawn = {spoken(str(tiny_folder), "--max-tokens", "8") for _ in range(3)}
    assert len(drawn) > 1, "a model that is no run is talked with at a temperature"
