"""The interface through which long work reports its progress; the command line shows it in a terminal."""

from __future__ import annotations


class Progress:
    """A listener of long work that shows nothing; subclasses show messages and progress."""

    def say(self, text: str) -> None:
        """Show a message that stays on the screen."""

    def start(self, title: str, total: int | None) -> None:
        """Begin a task of `total` parts, if known. It ends when the next one begins, or with `stop`."""

    def update(self, done: int, note: str = "") -> None:
        """`done` parts of the current task are done; `note` adds figures (loss, tokens per second …)."""

    def stop(self) -> None:
        """End the current task."""
