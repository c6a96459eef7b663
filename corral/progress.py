"""How long work tells of itself. Knows nothing about terminals: the base class is silent, the command line draws it."""

from __future__ import annotations


class Progress:
    """A listener to long work; this one is silent. Subclasses show what they are told."""

    def say(self, text: str) -> None:
        """A line worth keeping."""

    def start(self, title: str, total: int | None) -> None:
        """A piece of work begins: `total` parts, if known. It ends when the next begins, or with `stop`."""

    def update(self, done: int, note: str = "") -> None:
        """`done` parts of the current piece are done; `note` says how it goes (loss, tokens per second …)."""

    def stop(self) -> None:
        """Nothing is under way."""
