"""Where the time of a few training steps goes: torch's profiler over them, a trace to look into, and a short table.

Knows nothing about what a step does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corral.storage import storage_errors

WAIT, WARM_UP, ACTIVE = 1, 1, 3
"""Steps passed over (the first allocates), run with the profiler on but not counted, and counted."""
_ROWS = 12


@contextmanager
def _silent() -> Generator[None]:
    """Without the notes that the profiler's C++ side writes to standard error whenever it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Profile:
    """A profiler that is told of each finished step.

    Args:
        folder: made here; gets `trace.json` (for Perfetto or chrome://tracing).
        say: told the table once the steps are over.
        cuda: whether the steps run on a GPU.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, cuda: bool) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        self._folder, self._say, self._cuda = folder, say, cuda
        self._steps = 0
        self._rows: list[tuple[float, int, str]] = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profiler: Any = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._ready,
            acc_events=True,
        )

    def __enter__(self) -> Profile:
        with _silent():
            self._profiler.start()
        return self

    def step(self) -> None:
        """A step has ended."""
        self._steps += 1
        with _silent():
            self._profiler.step()
        if self._steps == WAIT + WARM_UP + ACTIVE:
            self._tell(ACTIVE)

    def __exit__(self, *_: object) -> None:
        with _silent():
            self._profiler.stop()
        counted = self._steps - WAIT - WARM_UP
        if counted <= 0:
            steps = f"the first {WAIT + WARM_UP} steps are not counted, and there were {self._steps}"
            self._say(f"nothing is profiled: {steps}")
        elif counted < ACTIVE:
            self._tell(counted)

    def _ready(self, profiler: Any) -> None:
        if self._steps <= WAIT + WARM_UP:
            return
        trace = self._folder / "trace.json"
        with storage_errors(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
        rows = [(self._own(event), event.count, event.key) for event in profiler.key_averages()]
        self._rows = sorted((row for row in rows if not row[2].startswith("ProfilerStep")), reverse=True)

    def _tell(self, counted: int) -> None:
        total = sum(time for time, _, _ in self._rows) or 1.0
        where = "GPU" if self._cuda else "processor"
        steps = "1 step" if counted == 1 else f"{counted} steps"
        trace = self._folder / "trace.json"
        self._say(f"{where} time of {steps}, by operation ({total / 1e6:.2f} s in all); the trace is {trace}")
        for time, count, name in self._rows[:_ROWS]:
            self._say(f"  {time / total:6.1%}  {time / 1e6:8.3f} s  {count:7,} ×  {name}")

    def _own(self, event: Any) -> float:
        """Microseconds spent in an operation itself."""
        return float(event.self_device_time_total if self._cuda else event.self_cpu_time_total)
