"""A conversation in the terminal with a local model. Knows nothing about where models come from and how they run."""

from __future__ import annotations

import sys

from corral.answerer import blocking
from corral.asking import Settings
from corral.consensus import Vote
from corral.errors import CorralError
from corral.messages import Conversation

ENDS = frozenset({"exit", "quit"})


def chat(settings: Settings, *, system: str | None) -> None:
    """Read lines, stream answers, keep the conversation; `exit`, `quit` or the end of input ends it.

    Raises: as `Settings.open`.
    """
    print("loading …", file=sys.stderr)
    answerer = settings.open()
    start = Conversation.of(("system", system)) if system else Conversation(())
    with blocking(answerer) as face:
        print("say something; `exit` or `quit` ends", file=sys.stderr)
        conversation = start
        while (line := _read()) is not None:
            if not line.strip():
                continue
            asked = conversation.add("user", line)
            answer = ""
            try:
                for delta in face.stream(asked):
                    answer += delta.text
                    print(delta.text, end="", flush=True)
                    if delta.vote is not None:
                        _tell(delta.vote)
            except KeyboardInterrupt:
                print(" …", end="")
            except CorralError as error:
                # The turn is taken back: the conversation stands as it was before it.
                print(f"corral: {error}", file=sys.stderr)
                continue
            print()
            conversation = asked.add("assistant", answer) if answer else conversation


def _tell(vote: Vote) -> None:
    score = vote.scores[vote.winner] or 0.0
    heard = len(vote.scores) - vote.cancelled
    print(f" [answer {vote.winner + 1}: {vote.method} {score:.2f} among {heard}]", end="", file=sys.stderr, flush=True)


def _read() -> str | None:
    try:
        line = input("> ") if sys.stdin.isatty() else input()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line.strip().lower() in ENDS else line
