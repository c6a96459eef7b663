"""Metrics of one training step, and the file `metrics.jsonl` they are written to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
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


def truncate_from(path: Path, step: int) -> None:
    """Remove lines of `step` and of later steps, which will be repeated, and a half-written last line."""
    if not path.exists():
        return
    kept = [line for line in _intact_lines(path) if line["step"] < step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_step(folder: Path, step: int) -> dict[str, Any]:
    """The line of a step in the folder's metrics; empty if it has none."""
    path = folder / FILE
    lines = _intact_lines(path) if path.exists() else iter(())
    return next((line for line in lines if line["step"] == step), {})


def _intact_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            break
