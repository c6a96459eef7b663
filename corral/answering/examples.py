"""Answered conversations for few-shot prompting: from the training rows of a run, or from a source of their own."""

from __future__ import annotations

import random
from collections.abc import Iterable

from corral.data import cache
from corral.data.example_store import ExampleStore
from corral.data.prepare import Prepared
from corral.data.source_rows import load_source_rows
from corral.errors import DataError
from corral.messages import Conversation, Record
from corral.progress import Progress
from corral.prompting.few_shot import POOL_SIZE
from corral.recipe import Source
from corral.run.directory import Run

_MOST = 2 * POOL_SIZE  # some have more than one turn, and cannot be examples


def training_examples(run: Run, seed: int) -> list[Conversation]:
    """Some of the rows that a run trained on. Raises: DataError (it has not prepared its rows)."""
    rows = _training_rows(run).select(types=[Conversation])
    drawn = random.Random(seed).sample(range(len(rows)), min(len(rows), _MOST))
    return _conversations(rows[i].record for i in sorted(drawn))


def training_examples_digest(run: Run) -> str:
    """sha256 of the rows that `training_examples` draws from. Raises: as `training_examples`."""
    return _training_rows(run).digest


def _training_rows(run: Run) -> ExampleStore:
    folder = run.path / "prepare"
    if not folder.exists():
        raise DataError(
            "the run has no prepared rows to show as examples",
            where=str(folder),
            hint="finish the run, or name rows with [answer.shots.source]",
        )
    return Prepared.open(folder).train


def source_examples(source: Source) -> list[Conversation]:
    """The first rows of a source. Raises: DataError, AssetError, StorageError."""
    folder = cache.default_folder()
    with cache.hold_cache(folder) as used:
        rows = load_source_rows(source, folder, Progress())
        used.add(folder / rows.identity)
        return _conversations(rows.records(rows.usable[: source.rows or _MOST]))


def _conversations(records: Iterable[Record]) -> list[Conversation]:
    return [record for record in records if isinstance(record, Conversation)]
