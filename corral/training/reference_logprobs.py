"""Log-probabilities of a stage's rows under its reference, the model that the stage starts from: computed once, and stored.

They are right for adapters and full fine-tuning alike, and no second model stays in memory. The file begins with what they
belong to (the model and the rows), so that another model's are refused, and grows by a line for some rows at a time, so that
an interrupted pass goes on where it was. Each line has the number of its first row and a hash, so that one that is changed,
lost or moved is refused as well.
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
        CheckpointError: the file belongs to another model or other rows, or is damaged.
        TrainingError: the reference gives a row no finite log-probability.
        StorageError: the disk is full, or the file cannot be written.
    """
    done: list[Logprobs] = world.broadcast(_read(path, identity, rows, earlier) if world.is_main else None)
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
                file.write(format_line(identity, len(done), values))
                file.flush()
                os.fsync(file.fileno())
        done += values
        on_rows(len(done))
    return done


def _read(path: Path, identity: str, rows: Sequence[Example], earlier: Sequence[Path]) -> list[Logprobs]:
    """What the file has; it is begun if there is none, and a half-written last line is removed."""
    first = json.dumps({"identity": identity, "rows": len(rows)}) + "\n"
    own = _lines(path)
    lines = own or next((lines for lines in map(_lines, earlier) if lines[:1] == [first]), [first])
    if lines[0] != first:
        raise CheckpointError(
            "the log-probabilities of the reference that are stored here are of another model or of other rows",
            where=str(path),
            hint="remove that file and the folder `checkpoints` of this stage: it then begins again, with its own reference",
        )
    done: list[Logprobs] = []
    whole = 1
    for line in lines[1:]:
        values = _parse(line, identity, len(done), rows)
        if values is None:
            break
        done += values
        whole += 1
    if own and whole < len(own) and own[whole].endswith("\n"):
        raise CheckpointError(
            f"the stored log-probabilities of the reference are damaged: line {whole + 1} is not as it was written",
            where=str(path),
            hint="copy that file again, or remove it: the log-probabilities are then computed again, and the stage goes on",
        )
    if whole < len(lines) or not own:
        write_atomic(path, "".join(lines[:whole]))
    return done


def format_line(identity: str, start: int, values: Sequence[Sequence[float]]) -> str:
    """The line of some rows, of which the first has the number `start`."""
    digest = hashlib.sha256(f"{identity} {start} {json.dumps(values)}".encode()).hexdigest()
    return json.dumps({"start": start, "logprobs": values, "sha256": digest}) + "\n"


def _parse(line: str, identity: str, start: int, rows: Sequence[Example]) -> list[Logprobs] | None:
    """The values of a line that begins with row `start`; None if it is not as it was written, or does not fit these rows."""
    try:
        values: Any = json.loads(line)["logprobs"]
        if line != format_line(identity, start, values) or start + len(values) > len(rows):
            return None
        parsed = [tuple(map(float, logprobs)) for logprobs in values]
    except (ValueError, TypeError, KeyError):
        return None
    counts = [len(rows[start + i].sequences) for i in range(len(parsed))]
    fits = counts == list(map(len, parsed)) and all(math.isfinite(value) for logprobs in parsed for value in logprobs)
    return parsed if fits else None


def _lines(path: Path) -> list[str]:
    """Its lines, with their ends; none if there is no such file."""
    return path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
