"""A conversation in the terminal: the user's lines in, answers as they stream, and commands.

Answers come from a `ChatBackend`: a local model (`LocalBackend`) or a server (`corral.chat.client`). Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from corral.errors import CorralError
from corral.messages import Conversation, Message

if TYPE_CHECKING:
    from corral.answering.settings import AnswererSettings

ENDS = frozenset({"exit", "quit"})
HELP = """/system TEXT  tell the model how to be, from here on; without TEXT nothing more
/retry        ask the last question again
/save FILE    write the conversation, as a row of a .jsonl file
/help         this
exit, quit    end (so does Ctrl-D); Ctrl-C stops an answer"""
_LINES_KEPT = 1000
# What comes from elsewhere must not steer the terminal.
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})
# Halves of characters, that no terminal and no server can be sent: JSON may hold them; bytes that are no UTF-8 become such.
_HALVES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


class AnswerPiece(NamedTuple):
    """A part of an answer."""

    text: str
    note: str = ""
    """About the answer, for the person at the terminal."""


class ChatBackend(Protocol):
    """Who answers."""

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """The answer to a conversation that ends with the user, as it comes; closing the generator stops it.

        Raises: CorralError, also amid the answer.
        """
        ...

    def close(self) -> None:
        """Nothing more is asked."""
        ...


class LocalBackend:
    """A model that is loaded here, or that endpoints compute. Raises: as `AnswererSettings.open`."""

    def __init__(self, settings: AnswererSettings) -> None:
        from corral.answering.sync import SyncAnswerer

        print("loading …", file=sys.stderr)
        self._answerer = SyncAnswerer(settings.open_answerer())

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """See ChatBackend."""
        with contextlib.closing(self._answerer.stream(conversation)) as deltas:
            for delta in deltas:
                vote = delta.vote
                told = describe_vote(vote.method, vote.winner, vote.scores, vote.cancelled) if vote else ""
                yield AnswerPiece(delta.text, told)

    def close(self) -> None:
        """Close the engine."""
        self._answerer.close()


def describe_vote(method: str, winner: int, scores: tuple[float | None, ...], cancelled: int) -> str:
    """How an answer was chosen from several, in short."""
    return f"[answer {winner + 1}: {method} {scores[winner] or 0.0:.2f} among {len(scores) - cancelled}]"


def chat(talker: ChatBackend, *, system: str | None) -> None:
    """Read lines, stream answers, keep the conversation; `exit`, `quit` or the end of input ends it.

    A turn that fails is taken back: the conversation stands as it was before it.
    """
    print("say something; `exit` or `quit` ends, /help tells what else there is", file=sys.stderr)
    with _remembered_lines():
        _Chat(talker, system).run()


class _Chat:
    def __init__(self, talker: ChatBackend, system: str | None) -> None:
        self._talker = talker
        self._conversation = _with_system(Conversation(()), (system or "").translate(_HALVES))
        self._asked: tuple[Conversation, str] | None = None
        """The last question, and the conversation before it."""
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/retry": self._retry,
            "/save": self._save,
            "/help": lambda _: _tell(HELP),
        }

    def run(self) -> None:
        """Until the user ends it."""
        is_terminal = sys.stdin.isatty()
        while True:
            try:
                line = (input("> ") if is_terminal else input()).translate(_HALVES)
                if line.strip().lower() in ENDS:
                    return
                self._take(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print()
                _tell("`exit` or Ctrl-D ends")

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if line.startswith("/"):
            command = self._commands.get(word)
            if command is None:
                _tell(f"{word} is no command: /help tells which there are (a space before it makes it a message)")
            else:
                command(rest.strip())
        elif word:
            self._ask(self._conversation, line)

    def _ask(self, before: Conversation, question: str) -> None:
        self._asked = before, question
        asked = before.add("user", question)
        answer = ""
        try:
            with contextlib.closing(self._talker.stream(asked)) as pieces:
                for piece in pieces:
                    text = piece.text.translate(_HALVES)
                    answer += text
                    print(text.translate(_CONTROL), end="", flush=True)
                    if piece.note:
                        print(f" {piece.note.translate(_CONTROL)}", end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        except CorralError as error:
            if answer:
                print(" …")
            _tell(f"{error.what}; {error.hint or '/retry asks again'}")
            return
        print()
        if answer:
            self._conversation = asked.add("assistant", answer)

    def _system(self, text: str) -> None:
        self._conversation = _with_system(self._conversation, text)
        if self._asked is not None:
            before, question = self._asked
            self._asked = _with_system(before, text), question

    def _retry(self, _: str) -> None:
        if self._asked is None:
            _tell("nothing was asked yet")
        else:
            self._ask(*self._asked)

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            _tell("/save needs the name of a file")
        elif not self._conversation.answered:
            _tell("nothing was answered yet")
        elif path.exists() and path.absolute() not in self._saved:
            _tell(f"{path} exists: give another name")
        else:
            try:
                path.write_text(json.dumps(self._conversation.to_json(), ensure_ascii=False) + "\n", "utf-8")
            except OSError as error:
                _tell(f"{path} cannot be written: {error.strerror}")
                return
            self._saved.add(path.absolute())
            _tell(f"saved {path}")


def _with_system(conversation: Conversation, text: str) -> Conversation:
    turns = tuple(message for message in conversation.messages if message.role != "system")
    return Conversation((Message("system", text), *turns) if text else turns)


def _tell(text: str) -> None:
    text = text.translate(_CONTROL)
    print(f"corral: {text}" if "\n" not in text else text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _remembered_lines() -> Generator[None]:
    """Lines typed at a terminal can be edited and called back, also those of earlier conversations."""
    try:
        import readline
    except ImportError:
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    file = _state_folder() / "chat_history"
    readline.set_history_length(_LINES_KEPT)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
            file.chmod(0o600)


def _state_folder() -> Path:
    """`corral` in `$XDG_STATE_HOME`, else in `~/.local/state`."""
    xdg = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "state") / "corral"
