"""`corral chat` at a real terminal, with a server: keys as a person presses them, and an end with the right exit code."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.model.loading import load_tokenizer
from corral.serving.generation import Served
from corral.template import Template
from tests.serving.conftest import running

# A terminal of its own, so that Ctrl-C reaches it as it does a person's program.
START = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "corral", "chat", *sys.argv[1:]])
"""
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """A program at a terminal."""

    def __init__(self, *options: str, state: Path) -> None:
        self._ours, theirs = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm"}
        command = [sys.executable, "-c", START, *options]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        os.close(theirs)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What is shown up to that text, from where the last wait ended."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            left = until - time.monotonic()
            assert left > 0, f"no {text!r} in {self.shown!r}"
            assert select.select([self._ours], [], [], left)[0], f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._ours, 4096).decode("utf-8", "replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def stop_line(self, until: str) -> None:
        """Ctrl-C at the prompt until it is told of: one that comes between Python's look for signals and its wait for a key is
        seen with the next key only."""
        for _ in range(10):
            self.press(CTRL_C)
            if select.select([self._ours], [], [], 3)[0]:
                break
        self.wait_for(until)

    def code(self) -> int:
        """How it ended."""
        return self._process.wait(30)

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._ours)


@pytest.fixture
def count() -> list[int]:
    """Ids drawn for each request."""
    return []


@pytest.fixture
def url(tiny_folder: Path, count: list[int]) -> Generator[str]:
    """A server that answers "one", then without end, then "two" and so on."""
    template = Template.load(load_tokenizer(tiny_folder))
    words = [template.tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids for word in ("one", "two")]
    answers: Iterator[Sequence[int]] = iter((words[0], range(40, 60), words[1], words[0], words[1]))

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        given = next(answers)
        count.append(0)
        for id_ in cycle(given) if len(given) == 20 else islice(given, None):
            count[-1] += 1
            yield id_

    with running(Served(Answerer(ScriptedEngine(reply, delay_seconds=0.01), template), "m")) as found:
        yield found


@pytest.fixture
def terminal(tmp_path: Path) -> Generator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Terminal:
            return stack.enter_context(contextlib.closing(Terminal(*options, state=tmp_path)))

        yield start


def test_a_person_talks_stops_an_answer_asks_again_saves_and_leaves(
    url: str, count: list[int], terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    at = terminal("--url", url)
    at.wait_for("talking with m at ")
    at.wait_for("> ")
    at.press("Hello\n")
    at.wait_for("one")
    at.wait_for("> ")
    at.press("Count!\n")
    until = time.monotonic() + 30
    while len(count) < 2 or count[1] < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    at.press(CTRL_C)
    at.wait_for("…")
    at.wait_for("> ")
    time.sleep(0.3)
    then = count[1]
    time.sleep(0.2)
    assert count[1] == then, "the server works on for nobody"
    at.press("/retry\n")
    at.wait_for("two")
    at.wait_for("> ")
    at.press("half a li")
    at.wait_for("half a li")
    at.stop_line("Ctrl-D ends")
    at.wait_for("> ")
    at.press(f"/save {tmp_path}/talk.jsonl\n")
    at.wait_for("saved")
    at.wait_for("> ")
    at.press("exit\n")
    assert at.code() == 0
    saved = (tmp_path / "talk.jsonl").read_text("utf-8")
    assert all(word in saved for word in ("Hello", "one", "Count!", "two"))
    history = tmp_path / "corral" / "chat_history"
    assert "Count!" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "what was typed is for nobody else"

    again = terminal("--url", url)
    again.wait_for("> ")
    again.press(UP + UP + UP + UP + UP)
    again.wait_for("Hello")
    again.press("\n")
    again.wait_for("one")
    again.wait_for("> ")
    again.press(CTRL_D)
    assert again.code() == 0


def test_a_server_that_goes_away_and_comes_back_costs_no_more_than_a_turn(
    tiny_folder: Path, terminal: Callable[..., Terminal]
) -> None:
    template = Template.load(load_tokenizer(tiny_folder))
    ids = template.tokenizer.backend_tokenizer.encode("again", add_special_tokens=False).ids
    served = Served(Answerer(ScriptedEngine(ids), template), "m")
    with running(served) as url:
        at = terminal("--url", url)
        at.wait_for("> ")
        at.press("Hello\n")
        at.wait_for("again")
    at.wait_for("> ")
    at.press("Are you there?\n")
    at.wait_for("cannot be reached")
    at.wait_for("> ")
    with running(served, port=int(url.rpartition(":")[2])):
        at.press("/retry\n")
        at.wait_for("again")
        at.wait_for("> ")
        at.press("quit\n")
        assert at.code() == 0
