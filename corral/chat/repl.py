"""A conversation in the terminal: reads lines, streams answers and runs commands. Imports nothing heavy."""

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

EXIT_WORDS = frozenset({"exit", "quit"})
HELP = """/system TEXT  set the system message from here on; without TEXT, the model's own, if it has one
/retry        ask the last question again
/save FILE    write the conversation to a .jsonl file, as one row
/help         show this list
exit, quit    leave (so does Ctrl-D); Ctrl-C stops an answer"""
_LINES_KEPT = 1000
# Control characters in text from elsewhere must not reach the terminal.
_CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10})
# Lone surrogates cannot be encoded: they come from JSON escapes and from input that is not UTF-8.
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


class AnswerPiece(NamedTuple):
    """A part of an answer."""

    text: str
    note: str = ""
    """A remark about the answer for the user, such as how a vote was decided."""


class ChatBackend(Protocol):
    """Answers a conversation: a local model or a server."""

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """Stream the answer to a conversation that ends with the user; closing the generator stops it.

        Raises: CorralError, also in the middle of the answer.
        """
        ...

    def close(self) -> None:
        """Release the model or connection."""
        ...


class LocalBackend:
    """A model that is loaded here, or that endpoints compute. Raises: as `AnswererSettings.open_answerer`."""

    def __init__(self, settings: AnswererSettings) -> None:
        from corral.answering.sync import SyncAnswerer

        print("loading …", file=sys.stderr)
        self._answerer = SyncAnswerer(settings.open_answerer())

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """See ChatBackend."""
        with contextlib.closing(self._answerer.stream(conversation)) as deltas:
            for delta in deltas:
                vote = delta.vote
                note = describe_vote(vote.method, vote.winner, vote.scores, vote.cancelled) if vote else ""
                yield AnswerPiece(delta.text, note)

    def close(self) -> None:
        """Close the engine."""
        self._answerer.close()


def describe_vote(method: str, winner: int, scores: tuple[float | None, ...], cancelled: int) -> str:
    """How an answer was chosen among several, in a few words."""
    return f"[answer {winner + 1}: {method} {scores[winner] or 0.0:.2f} among {len(scores) - cancelled}]"


def chat(backend: ChatBackend, *, system: str | None) -> None:
    """Chat until the user types `exit` or `quit`, or the input ends. A turn that fails is not kept in the conversation."""
    print("type a message; `exit` or `quit` ends, /help lists the commands", file=sys.stderr)
    with _line_history():
        _Repl(backend, system).run()


class _Repl:
    def __init__(self, backend: ChatBackend, system: str | None) -> None:
        self._backend = backend
        self._conversation = _with_system(Conversation(()), (system or "").translate(_SURROGATES))
        self._last_question: tuple[Conversation, str] | None = None
        """The last question, and the conversation before it."""
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/retry": self._retry,
            "/save": self._save,
            "/help": lambda _: _print_message(HELP),
        }

    def run(self) -> None:
        """Read and handle lines until the user ends the conversation."""
        is_terminal = sys.stdin.isatty()
        while True:
            try:
                line = (input("> ") if is_terminal else input()).translate(_SURROGATES)
                if line.strip().lower() in EXIT_WORDS:
                    return
                self._handle_line(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print()
                _print_message("`exit` or Ctrl-D ends")

    def _handle_line(self, line: str) -> None:
        word, _, argument = line.strip().partition(" ")
        if line.startswith("/"):
            command = self._commands.get(word)
            if command is None:
                _print_message(f"{word} is not a command: /help lists them (a space before it makes it a message)")
            else:
                command(argument.strip())
        elif word:
            self._ask(self._conversation, line)

    def _ask(self, before: Conversation, question: str) -> None:
        self._last_question = before, question
        conversation = before.add("user", question)
        answer = ""
        try:
            with contextlib.closing(self._backend.stream(conversation)) as pieces:
                for piece in pieces:
                    text = piece.text.translate(_SURROGATES)
                    answer += text
                    print(text.translate(_CONTROL_CHARACTERS), end="", flush=True)
                    if piece.note:
                        print(f" {piece.note.translate(_CONTROL_CHARACTERS)}", end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        except CorralError as error:
            if answer:
                print(" …")
            _print_message(f"{error.what}; {error.hint or '/retry asks again'}")
            return
        print()
        if answer:
            self._conversation = conversation.add("assistant", answer)

    def _system(self, text: str) -> None:
        self._conversation = _with_system(self._conversation, text)
        if self._last_question is not None:
            before, question = self._last_question
            self._last_question = _with_system(before, text), question

    def _retry(self, _: str) -> None:
        if self._last_question is None:
            _print_message("there is no question yet")
        else:
            self._ask(*self._last_question)

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            _print_message("/save needs a file name")
        elif not self._conversation.answered:
            _print_message("there is no answer yet")
        elif path.exists() and path.absolute() not in self._saved:
            _print_message(f"{path} exists: give another name")
        else:
            try:
                path.write_text(json.dumps(self._conversation.to_json(), ensure_ascii=False) + "\n", "utf-8")
            except OSError as error:
                _print_message(f"{path} cannot be written: {error.strerror}")
                return
            self._saved.add(path.absolute())
            _print_message(f"saved {path}")


def _with_system(conversation: Conversation, text: str) -> Conversation:
    turns = tuple(message for message in conversation.messages if message.role != "system")
    return Conversation((Message("system", text), *turns) if text else turns)


def _print_message(text: str) -> None:
    text = text.translate(_CONTROL_CHARACTERS)
    print(f"corral: {text}" if "\n" not in text else text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _line_history() -> Generator[None]:
    """Lets the user edit lines at a terminal and recall earlier ones, also from earlier conversations."""
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
    """`corral` in `$XDG_STATE_HOME` or `~/.local/state`."""
    xdg = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "state") / "corral"
