"""Metrics of one training step, and the file `metrics.jsonl` they are written to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from corral.storage import storage_errors, write_atomic

FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl; the fields' names are its keys."""

    step: int
    loss: float | None
    """Mean over the step's units; null at step 0, which only evaluates."""
    eval_loss: float | None
    """Held-out loss after this step, where it was evaluated."""
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


def append(folder: Path, metrics: StepMetrics) -> None:
    """Add a line to the folder's metrics, synced to disk. Raises: StorageError."""
    path = folder / FILE
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(metrics)) + "\n")
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
