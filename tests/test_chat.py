"""A conversation in the terminal; `tests/e2e/test_verbs.py` has it as a process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from corral.chat import chat


def test_what_a_user_types_is_answered_by_the_engine_that_was_asked_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = []
    for lines in ("Hello\n", "Hello\n\nAnd you?\nquit\nnot read\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        chat(str(tiny_folder), system="Be brief.", max_tokens=5, temperature=0, top_p=1, engine="transformers")
        spoken.append(capsys.readouterr().out)
    assert spoken[0].strip()
    assert spoken[1].startswith(spoken[0].rstrip("\n"))
    assert len(spoken[1]) > len(spoken[0])


def test_a_turn_that_fails_is_taken_back_and_the_conversation_goes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 600 + "\nHello\n"))
    chat(str(tiny_folder), system=None, max_tokens=5, temperature=0, top_p=1, engine="transformers")
    said = capsys.readouterr()
    assert "exceed" in said.err
    assert said.out.strip()
