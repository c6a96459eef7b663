"""Metrics of one training step, and the file `metrics.jsonl` they are written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corral.storage import storage_errors, write_atomic

FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl; the fields' names are its keys, and so are the names of the objective's metrics."""

    step: int
    loss: float | None
    """The objective over the step; null at step 0, which only evaluates."""
    eval_loss: float | None
    """The objective over the held-out rows after this step, where it was evaluated."""
    lr: float
    grad_norm: float | None
    """Before clipping."""
    tokens: int
    """Tokens computed so far, context included."""
    tokens_per_second: float
    """In this step, without evaluation and checkpoints."""
    peak_memory_bytes: int
    seconds: float
    """Spent in steps so far."""
    objective: Mapping[str, float] = field(default_factory=dict[str, float])
    """Means of the objective's own metrics over the step, and with `eval_` before their names over the held-out rows."""

    def to_json(self) -> dict[str, float | None]:
        """Every key and value of the line."""
        values = asdict(self)
        return values | values.pop("objective")


def append(folder: Path, metrics: StepMetrics) -> None:
    """Add a line to the folder's metrics, synced to disk. Raises: StorageError."""
    path = folder / FILE
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics.to_json()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def truncate_after(folder: Path, step: int) -> None:
    """Remove lines of steps after `step`, which will be repeated, and a half-written last line; with step 0 all lines."""
    path = folder / FILE
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            value: Any = json.loads(line)
        except ValueError:
            break
        if step and value["step"] <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))
