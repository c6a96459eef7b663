"""A conversation in the terminal; `tests/e2e/test_verbs.py` has it as a process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from corral.asking import Settings
from corral.chat import chat
from corral.recipe import Answer, Consensus


def settings(model: Path, **answer: Any) -> Settings:
    return Settings(str(model), Answer(max_tokens=5, **answer), 0, "transformers")


def test_what_a_user_types_is_answered_by_the_engine_that_was_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = []
    for lines in ("Hello\n", "Hello\n\nAnd you?\nquit\nnot read\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        chat(settings(tiny_folder), system="Be brief.")
        spoken.append(capsys.readouterr().out)
    assert spoken[0].strip()
    assert spoken[1].startswith(spoken[0].rstrip("\n"))
    assert len(spoken[1]) > len(spoken[0])


def test_a_turn_that_fails_is_taken_back_and_the_conversation_goes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 600 + "\nHello\n"))
    chat(settings(tiny_folder), system=None)
    said = capsys.readouterr()
    assert "exceed" in said.err
    assert said.out.strip()


def test_with_a_vote_the_winner_is_said_with_how_it_won(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    chat(settings(tiny_folder, consensus=Consensus(method="rouge-l", n=3, stop="never")), system=None)
    said = capsys.readouterr()
    assert "rouge-l" in said.err
    assert "among 3]" in said.err
    assert said.out.strip()
