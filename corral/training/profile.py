"""Where the time of a few training steps goes: torch's profiler over them, a trace to look into, and a short table.

Knows nothing about what a step does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from corral.storage import storage_errors

WAIT, WARM_UP, ACTIVE = 1, 1, 3
"""Steps passed over (the first allocates), run with the profiler on but not counted, and counted."""
_ROWS = 12


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
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profiler: Any = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._ready,
            acc_events=True,
        )

    def __enter__(self) -> Profile:
        self._profiler.start()
        return self

    def step(self) -> None:
        """A step has ended."""
        self._profiler.step()

    def __exit__(self, *_: object) -> None:
        self._profiler.stop()

    def _ready(self, profiler: Any) -> None:
        trace = self._folder / "trace.json"
        with storage_errors(trace):
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
        rows = [(self._own(event), event.count, event.key) for event in profiler.key_averages()]
        rows = sorted((row for row in rows if not row[2].startswith("ProfilerStep")), reverse=True)
        total = sum(time for time, _, _ in rows) or 1.0
        where = "GPU" if self._cuda else "processor"
        self._say(f"{where} time of {ACTIVE} steps, by operation ({total / 1e6:.2f} s in all); the trace is {trace}")
        for time, count, name in rows[:_ROWS]:
            self._say(f"  {time / total:6.1%}  {time / 1e6:8.3f} s  {count:7,} ×  {name}")

    def _own(self, event: Any) -> float:
        """Microseconds spent in an operation itself."""
        return float(event.self_device_time_total if self._cuda else event.self_cpu_time_total)
