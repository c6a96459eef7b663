"""Log-probabilities of a stage's rows under its reference, the model that the stage starts from: computed once, and stored.

They are right for adapters and full fine-tuning alike, and no second model stays in memory. The file begins with what they
belong to (the model and the rows), so that another model's are refused, and grows by a line for some rows at a time, so that
an interrupted pass goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from corral.data.example_store import Example, ExampleSequence, SizedExamples
from corral.errors import CheckpointError, TrainingError
from corral.storage import storage_errors, write_atomic
from corral.training.distributed import World

Logprobs: TypeAlias = tuple[float, ...]
"""Of one row: for each of its sequences the sum over its trained tokens."""

ROWS_PER_LINE = 32


@dataclass(frozen=True, slots=True)
class ReferencedExample(Example):
    """An example with its log-probabilities under the reference."""

    reference: Logprobs


class ReferencedRows(ExampleSequence[ReferencedExample]):
    """Rows with their log-probabilities under the reference, in the same order."""

    def __init__(self, rows: Sequence[Example], logprobs: Sequence[Logprobs]) -> None:
        self._rows, self._logprobs = rows, logprobs

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> ReferencedExample:
        """The row with its log-probabilities."""
        row = self._rows[index]
        return ReferencedExample(row.key, row.source, row.index, row.sequences, row.record, self._logprobs[index])


def rows_digest(rows: Sequence[Example]) -> str:
    """sha256 (hex) of what the log-probabilities depend on in the rows: ids and masks, in order."""
    if isinstance(rows, SizedExamples):
        return rows.digest
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr([(sequence.ids, sequence.trained) for sequence in row.sequences]).encode())
    return digest.hexdigest()


def stored_logprobs(
    path: Path,
    identity: str,
    rows: Sequence[Example],
    compute: Callable[[list[Example]], list[Logprobs]],
    *,
    world: World,
    on_rows: Callable[[int], None],
    should_stop: Callable[[], bool],
    earlier: Sequence[Path] = (),
) -> list[Logprobs]:
    """The log-probabilities of the rows: what the file has of them, and the others computed and added to it.

    All processes must call it; each gets all of them, and rank 0 reads and writes the file.

    Args:
        identity: of the model and the rows.
        compute: log-probabilities of some rows; all processes call it with the same rows and get the same values.
        on_rows: called with the number of rows that are done, after each line.
        should_stop: called after each line; if it is true on any process, KeyboardInterrupt is raised.
        earlier: files of the same kind that may exist; without a file of its own it begins with the first that has the same
            identity.

    Raises:
        CheckpointError: the file belongs to another model or other rows.
        TrainingError: the reference gives a row no finite log-probability.
        StorageError: the disk is full, or the file cannot be written.
    """
    done: list[Logprobs] = world.broadcast(_read(path, identity, len(rows), earlier) if world.is_main else None)
    while len(done) < len(rows):
        if world.any_process(should_stop()):
            raise KeyboardInterrupt
        some = [rows[i] for i in range(len(done), min(len(done) + ROWS_PER_LINE, len(rows)))]
        values = compute(some)
        for row, logprobs in zip(some, values, strict=True):
            if not all(map(math.isfinite, logprobs)):
                raise TrainingError(
                    f"the reference gives a row the log-probability {', '.join(map(str, logprobs))}",
                    where=f"{row.source} row {row.index}",
                    hint="the model that this stage starts from is damaged: train the stage before it again, or name another "
                    "in `from`",
                )
        if world.is_main:
            with storage_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
                file.flush()
                os.fsync(file.fileno())
        done += values
        on_rows(len(done))
    return done


def _read(path: Path, identity: str, count: int, earlier: Sequence[Path]) -> list[Logprobs]:
    """What the file has; it is begun if there is none, and a half-written last line is removed."""
    first = json.dumps({"identity": identity, "rows": count}) + "\n"
    lines = _lines(path) or next((lines for lines in map(_lines, earlier) if lines[:1] == [first]), [])
    if lines and lines[0] != first:
        raise CheckpointError(
            "the log-probabilities of the reference that are stored here are of another model or of other rows",
            where=str(path),
            hint="remove that file and the folder `checkpoints` of this stage: it then begins again, with its own reference",
        )
    done: list[Logprobs] = []
    whole = 1
    for line in lines[1:]:
        try:
            values: Any = json.loads(line) if line.endswith("\n") else None
            done += [tuple(map(float, logprobs)) for logprobs in values]
        except (ValueError, TypeError):
            break
        whole += 1
    if whole < len(lines) or not path.exists():
        write_atomic(path, "".join([first, *lines[1:whole]]))
    return done[:count]


def _lines(path: Path) -> list[str]:
    """Its lines, with their ends; none if there is no such file."""
    return path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
