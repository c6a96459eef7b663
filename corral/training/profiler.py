"""Where the time of a few training steps goes: torch's profiler over them, a trace file, and a short table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from corral.storage import storage_errors

SKIPPED_STEPS, WARM_UP_STEPS, PROFILED_STEPS = 1, 1, 3
"""Steps that run without the profiler (the first one allocates), with it but not counted, and counted."""
_TABLE_ROWS = 12


@contextmanager
def _silence_stderr() -> Generator[None]:
    """Hide what the profiler's C++ code writes to standard error when it starts and stops."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
            yield
    finally:
        os.dup2(original, 2)
        os.close(original)


class StepProfiler:
    """Profiles a few steps; call `step` after each one.

    Args:
        folder: created here; gets `trace.json` (for Perfetto or chrome://tracing).
        report: called with each line of the table once the steps are over.
        cuda: whether the steps run on a GPU.
    """

    def __init__(self, folder: Path, report: Callable[[str], None], *, cuda: bool) -> None:
        self._trace, self._report, self._cuda = folder / "trace.json", report, cuda
        self._steps = 0
        self._rows: list[tuple[float, int, str]] = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profiler: Any = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED_STEPS, warmup=WARM_UP_STEPS, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._save_trace,
            acc_events=True,
        )

    def __enter__(self) -> StepProfiler:
        with _silence_stderr():
            self._profiler.start()
        return self

    def step(self) -> None:
        """Mark the end of a step."""
        self._steps += 1
        with _silence_stderr():
            self._profiler.step()
        if self._steps == SKIPPED_STEPS + WARM_UP_STEPS + PROFILED_STEPS:
            self._report_table(PROFILED_STEPS)

    def __exit__(self, *_: object) -> None:
        with _silence_stderr():
            self._profiler.stop()
        counted = self._steps - SKIPPED_STEPS - WARM_UP_STEPS
        if counted <= 0:
            steps = f"the first {SKIPPED_STEPS + WARM_UP_STEPS} steps are not counted, and there were {self._steps}"
            self._report(f"nothing is profiled: {steps}")
        elif counted < PROFILED_STEPS:
            self._report_table(counted)

    def _save_trace(self, profiler: Any) -> None:
        if self._steps <= SKIPPED_STEPS + WARM_UP_STEPS:
            return
        with storage_errors(self._trace):
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._trace))
        attribute = "self_device_time_total" if self._cuda else "self_cpu_time_total"  # microseconds
        rows = [(float(getattr(event, attribute)), event.count, event.key) for event in profiler.key_averages()]
        self._rows = sorted((row for row in rows if not row[2].startswith("ProfilerStep")), reverse=True)

    def _report_table(self, counted: int) -> None:
        total = sum(time for time, _, _ in self._rows) or 1.0
        device = "GPU" if self._cuda else "processor"
        steps = "1 step" if counted == 1 else f"{counted} steps"
        self._report(f"{device} time of {steps}, by operation ({total / 1e6:.2f} s in all); the trace is {self._trace}")
        for time, count, name in self._rows[:_TABLE_ROWS]:
            self._report(f"  {time / total:6.1%}  {time / 1e6:8.3f} s  {count:7,} ×  {name}")
