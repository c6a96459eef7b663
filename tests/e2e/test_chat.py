"""`corral chat` in a pseudo-terminal, talking to a server: typed keys, Ctrl-C, and exit codes."""

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
from corral.serving.models import ServedModel
from corral.template import Template
from tests.serving.conftest import serve_in_thread

# Makes the pseudo-terminal the controlling one, so that Ctrl-C sends a signal.
START = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "corral", "chat", *sys.argv[1:]])
"""
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """`corral chat` in a pseudo-terminal."""

    def __init__(self, *options: str, state: Path) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm"}
        command = [sys.executable, "-c", START, *options]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        os.close(slave)
        self.shown = ""

    def press(self, keys: str, *shown: str) -> None:
        """Press keys, and wait until each of these texts is shown."""
        os.write(self._master, keys.encode())
        for text in shown:
            self.wait_for(text)

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Wait until the text is shown; returns what precedes it since the last wait."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            left = until - time.monotonic()
            assert left > 0, f"no {text!r} in {self.shown!r}"
            assert select.select([self._master], [], [], left)[0], f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._master, 4096).decode("utf-8", "replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def stop_line(self, until: str) -> None:
        """Press Ctrl-C at the prompt until there is a reaction: one that arrives between Python's check for signals and its
        wait for a key is noticed with the next key only."""
        for _ in range(10):
            self.press(CTRL_C)
            if select.select([self._master], [], [], 3)[0]:
                break
        self.wait_for(until)

    def exit_code(self) -> int:
        return self._process.wait(30)

    def close(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._master)


@pytest.fixture
def generated() -> list[int]:
    """Number of tokens generated for each request."""
    return []


@pytest.fixture
def url(tiny_folder: Path, generated: list[int]) -> Generator[str]:
    """A server that answers "one", then endlessly, then "two", "one", "two"."""
    template = Template.load(load_tokenizer(tiny_folder))
    words = [template.tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids for word in ("one", "two")]
    answers: Iterator[Sequence[int]] = iter((words[0], range(40, 60), words[1], words[0], words[1]))

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        answer = next(answers)
        generated.append(0)
        for id_ in cycle(answer) if len(answer) == 20 else islice(answer, None):
            generated[-1] += 1
            yield id_

    with serve_in_thread(ServedModel(Answerer(ScriptedEngine(reply, delay_seconds=0.01), template), "m")) as address:
        yield address


@pytest.fixture
def terminal(tmp_path: Path) -> Generator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Terminal:
            return stack.enter_context(contextlib.closing(Terminal(*options, state=tmp_path)))

        yield start


def test_a_user_talks_stops_an_answer_retries_saves_and_exits(
    url: str, generated: list[int], terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    chat = terminal("--url", url)
    chat.wait_for("chatting with m at ")
    chat.wait_for("> ")
    chat.press("Hello\n", "one", "> ")
    chat.press("Count!\n")
    until = time.monotonic() + 30
    while len(generated) < 2 or generated[1] < 5:
        assert time.monotonic() < until
        time.sleep(0.01)
    chat.press(CTRL_C, "…", "> ")
    time.sleep(0.3)
    after_stop = generated[1]
    time.sleep(0.2)
    assert generated[1] == after_stop, "the server stops generating"
    chat.press("/retry\n", "two", "> ")
    chat.press("half a li", "half a li")
    chat.stop_line("Ctrl-D ends")
    chat.wait_for("> ")
    chat.press(f"/save {tmp_path}/talk.jsonl\n", "saved", "> ")
    chat.press("exit\n")
    assert chat.exit_code() == 0
    saved = (tmp_path / "talk.jsonl").read_text("utf-8")
    assert all(word in saved for word in ("Hello", "one", "Count!", "two"))
    history = tmp_path / "corral" / "chat_history"
    assert "Count!" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "no other user may read what was typed"

    again = terminal("--url", url)
    again.wait_for("> ")
    again.press(UP + UP + UP + UP + UP, "Hello")
    again.press("\n", "one", "> ")
    again.press(CTRL_D)
    assert again.exit_code() == 0


def test_a_server_that_restarts_loses_only_the_turn_in_between(
    tiny_folder: Path, terminal: Callable[..., Terminal]
) -> None:
    template = Template.load(load_tokenizer(tiny_folder))
    ids = template.tokenizer.backend_tokenizer.encode("again", add_special_tokens=False).ids
    served = ServedModel(Answerer(ScriptedEngine(ids), template), "m")
    with serve_in_thread(served) as url:
        chat = terminal("--url", url)
        chat.wait_for("> ")
        chat.press("Hello\n", "again", "> ")
    chat.press("Are you there?\n", "cannot be reached", "> ")
    with serve_in_thread(served, port=int(url.rpartition(":")[2])):
        chat.press("/retry\n", "again", "> ")
        chat.press("quit\n")
        assert chat.exit_code() == 0
