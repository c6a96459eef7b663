"""Progress in a terminal: a live line with a bar and the time left; without a terminal, a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from corral.formatting import format_duration
from corral.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_QUIET_SECONDS = 15.0  # between plain lines
_PACE_SECONDS = 60.0  # the pace is that of the last minute, and of at least one step


def show(*tables: object) -> None:
    """Print tables and styled text to standard output. What does not fit into a column goes on in the next line."""
    from rich.console import Console, Group
    from rich.table import Table

    for table in tables:
        for each in table.renderables if isinstance(table, Group) else [table]:
            for column in each.columns if isinstance(each, Table) else []:
                column.overflow = "fold"
        Console().print(table)


class Pace:
    """How fast a task advances now, whatever it did before."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, done: int, now: float) -> None:
        """So many parts are done now. The first call is the start: a resumed task does not start at 0."""
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _PACE_SECONDS:
            self._samples.popleft()

    def seconds_left(self, total: int, now: float) -> float | None:
        """Until all parts are done; None if that cannot be told yet."""
        if len(self._samples) < 2:
            return None
        (began, first), (last, done) = self._samples[0], self._samples[-1]
        if done <= first:
            return None
        return max(0.0, (total - done) * (last - began) / (done - first) - (now - last))


class TerminalProgress(Progress):
    """Writes progress to standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live = sys.stderr.isatty()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._title, self._total, self._began, self._printed = "", None, 0.0, 0.0
        self._pace = Pace()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(f"  {text}", markup=False, soft_wrap=True)

    def start(self, title: str, total: int | None) -> None:
        """Begin a task; `total` counts its parts, if known."""
        self.stop()
        self._title, self._total, self._began = title, total, time.monotonic()
        self._printed = self._began
        self._pace = Pace()
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
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
        )
        from rich.text import Text

        left = self._left

        class TimeLeft(ProgressColumn):
            def render(self, task: object) -> Text:
                return Text(left(), style="progress.remaining")

        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeLeft(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )

    def update(self, done: int, note: str = "") -> None:
        """So many parts of the task are done."""
        now = time.monotonic()
        self._pace.add(done, now)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        if not self._live and now - self._printed >= _QUIET_SECONDS:
            self._printed = now
            total = f" of {self._total}" if self._total else ""
            self.say(", ".join(filter(None, (f"{self._title}: {done}{total}", self._left(), note))))

    def _left(self) -> str:
        """The time left in words, or nothing."""
        seconds = self._pace.seconds_left(self._total, time.monotonic()) if self._total else None
        return f"about {format_duration(seconds)} left" if seconds else ""

    def stop(self) -> None:
        """End the task; the live line is replaced by the time it took."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._console.print(f"{self._title}: {time.monotonic() - self._began:.1f} s", markup=False)
