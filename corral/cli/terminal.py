"""Progress in a terminal: a live line with a bar and the time left; without a terminal, a plain line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from corral.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_QUIET_SECONDS = 15.0  # between plain lines


def show(*tables: object) -> None:
    """Print tables and styled text to standard output."""
    from rich.console import Console

    for table in tables:
        Console().print(table)


class TerminalProgress(Progress):
    """Writes progress to standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live = sys.stderr.isatty()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._title, self._total, self._began, self._printed = "", None, 0.0, 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(f"  {text}", markup=False, soft_wrap=True)

    def start(self, title: str, total: int | None) -> None:
        """Begin a task; `total` counts its parts, if known."""
        self.stop()
        self._title, self._total, self._began = title, total, time.monotonic()
        self._printed = self._began
        if not self._live:
            self._console.print(title, markup=False)
            return
        self._bar = self._new_bar()
        self._task = self._bar.add_task(title, total=total, note="")
        self._bar.start()

    def _new_bar(self) -> Bar:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )

    def update(self, done: int, note: str = "") -> None:
        """So many parts of the task are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if not self._live and now - self._printed >= _QUIET_SECONDS:
            self._printed = now
            total = f" of {self._total}" if self._total else ""
            left = ""
            if self._total and 0 < done < self._total:
                left = f", about {(now - self._began) / done * (self._total - done):.0f} s left"
            self.say(f"{self._title}: {done}{total}{left}{', ' + note if note else ''}")

    def stop(self) -> None:
        """End the task; the live line is replaced by the time it took."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._console.print(f"{self._title}: {time.monotonic() - self._began:.1f} s", markup=False)
