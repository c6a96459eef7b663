"""A conversation in the terminal with a local model. Knows nothing about where models come from and how they run."""

from __future__ import annotations

import sys

from corral.answerer import blocking
from corral.engines.base import Sampling
from corral.engines.load import Name
from corral.errors import CorralError
from corral.messages import Conversation
from corral.opening import open_model

ENDS = frozenset({"exit", "quit"})


def chat(
    spec: str, *, system: str | None, max_tokens: int, temperature: float, top_p: float, engine: Name | None
) -> None:
    """Read lines, stream answers, keep the conversation; `exit`, `quit` or the end of input ends it."""
    print("loading …", file=sys.stderr)
    opened = open_model(spec, engine, Sampling(max_tokens, temperature=temperature, top_p=top_p))
    start = Conversation.of(("system", system)) if system else Conversation(())
    with blocking(opened.answerer) as face:
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
            except KeyboardInterrupt:
                print(" …", end="")
            except CorralError as error:
                # The turn is taken back: the conversation stands as it was before it.
                print(f"corral: {error}", file=sys.stderr)
                continue
            print()
            conversation = asked.add("assistant", answer) if answer else conversation


def _read() -> str | None:
    try:
        line = input("> ") if sys.stdin.isatty() else input()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line.strip().lower() in ENDS else line
