"""Prepares a recipe's data: `prepare` writes examples to disk, `Prepared.open` reads them.

The folder holds `ledger.json` and `ledger.parquet` (what became of every row), `left_out.jsonl` (a few rows of each fate
that is on no side) and `rows/SIDE/`, the examples of each side. Equal input gives equal bytes, whatever the number of
workers and the state of the cache.

Costly results are kept in the cache, each under a name made of what it depends on: records by the source's content and
format; tokens by records, template and maximum length; words by records. So another cap, split, weight or seed reuses them
all, another template makes new tokens only, and an interrupted run continues from its last finished chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.data import cache as caches
from corral.data import selection
from corral.data.cache import DamagedCacheError
from corral.data.encoding import cut_record, encode_record
from corral.data.example_store import ExampleStore, ExampleWriter, RowOrigin, json_line, record_from_json
from corral.data.ledger import EXAMPLES_PER_REASON, FATES, LEDGER_FILE, USED_FATES, Fate, Ledger, LedgerWriter, RowFates
from corral.data.lost_rows_budget import check_loss_budget, check_not_empty, count_losses
from corral.data.mixture import SIDES, Side
from corral.data.selection import UNSET, SourcePlan, fate_code
from corral.data.source_rows import EXCERPT_CHARACTERS, load_source_rows
from corral.data.worker_pool import WorkerPool
from corral.errors import DataError, StorageError
from corral.messages import record_key, record_to_json
from corral.progress import Progress
from corral.recipe import Data
from corral.storage import new_directory, write_atomic, write_json
from corral.template import Template

__all__ = ["Prepared", "encode_record", "prepare"]

_VERSION = 4
_ATTEMPTS = 3  # after the first, what was damaged in the cache is made again
_PROGRESS_EVERY = 1000
_ROW_GROUP = 50_000  # rows of a row group of the ledger
_ROWS = "rows"
_META = "prepared.json"
_LEFT_OUT = "left_out.jsonl"
_NO_SIDE: tuple[Fate, ...] = ("dropped", "fully masked", "duplicate", "near duplicate", "contaminated", "not sampled")


@dataclass(frozen=True)
class Prepared:
    """All prepared rows, by side."""

    folder: Path
    train: ExampleStore
    validation: ExampleStore
    test: ExampleStore

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Open what `prepare` wrote into a folder. Raises DataError if it is missing or damaged."""
        rows = folder / _ROWS
        try:
            meta: dict[str, Any] = json.loads((rows / _META).read_text("utf-8"))
            if meta["version"] != _VERSION:
                raise ValueError(f"they have version {meta['version']}, this corral reads {_VERSION}")
            sides = {side: ExampleStore(rows / side) for side in SIDES}
            for side, examples in sides.items():
                if len(examples) != meta["examples"][side]:
                    raise ValueError(f"{side}: {len(examples)} rows, {meta['examples'][side]} were written")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"the prepared rows cannot be read: {error}",
                where=str(rows),
                hint="delete this stage's folder and run again: the rows are prepared again",
            ) from None
        return cls(folder, **sides)

    def side(self, name: Side) -> ExampleStore:
        """A side by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def ledger(self) -> dict[str, Any]:
        """The ledger's JSON form."""
        return json.loads((self.folder / "ledger.json").read_text("utf-8"))

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """A few rows of each source, fate and reason that are on no side: `{"source", "index", "fate", "reason", "text"}`."""
        return [json.loads(line) for line in (self.folder / _LEFT_OUT).read_bytes().splitlines()]


def prepare(
    data: Data,
    template: Template,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Prepared:
    """Read, check, sample, encode and split all rows, and write them into `folder`.

    Args:
        data: the recipe's section.
        template: makes ids and masks.
        folder: an existing directory; rows that are in it already are replaced as a whole.
        seed: with a row's content decides its side, its position, and whether a cap or a weight keeps it.
        progress: receives how far it is.
        cache: where costly results are kept; by default corral's own cache.
        workers: processes that compute; by default at most as many as there are cores.

    Raises:
        DataError: a source cannot be read; no row is left to train on; a side that should have rows is empty.
        AssetError: a data asset cannot be fetched.
        GateError: more rows are lost than `data.max_loss` allows; the ledger is written, the rows are not.
        StorageError: the folder or the cache cannot be written.
    """
    progress = progress or Progress()
    cache = cache or caches.default_folder()
    for attempt in range(_ATTEMPTS):
        try:
            _prepare(data, template, folder, seed, cache, WorkerPool(progress, workers))
            break
        except DamagedCacheError as error:
            if attempt + 1 == _ATTEMPTS:
                raise StorageError(
                    f"the cache of prepared rows is damaged again and again: {error}",
                    where=str(cache),
                    hint="check the disk, or name another folder with CORRAL_CACHE",
                ) from error
            progress.say(f"a part of the cache is damaged ({error}): it is made again")
    return Prepared.open(folder)


def _prepare(data: Data, template: Template, folder: Path, seed: int, cache: Path, pool: WorkerPool) -> None:
    progress = pool.progress
    with caches.hold_cache(cache) as used:
        progress.start("Reading rows", None)
        plans = [
            SourcePlan.from_source(
                source, load_source_rows(source, cache, progress, turns=data.turns), template, data, cache
            )
            for source in data.sources
        ]
        used.update(folder for plan in plans for folder in plan.cache_folders)
        selection.deduplicate_and_cap(plans, data, seed, pool)
        selection.encode_selected(plans, data, template, pool)
        selection.assign_sides(plans, data, seed)
        selection.mark_contaminated(plans, data, pool)
        selection.apply_weights(plans, seed)
        with new_directory(folder / _ROWS) as rows:
            counts = _write_rows(plans, rows, data, seed, progress)
            ledger = _write_ledger(plans, folder)
            check_not_empty(plans, data, ledger)
            check_loss_budget(data, ledger, where=folder / LEDGER_FILE)
            write_json(rows / _META, {"version": _VERSION, "examples": counts})


def _write_rows(plans: Sequence[SourcePlan], folder: Path, data: Data, seed: int, progress: Progress) -> dict[str, int]:
    """Write each side's examples; returns how many each has, repeats included."""
    progress.start("Writing rows", sum(int((plan.side >= 0).sum()) for plan in plans))
    done = 0
    with ExitStack() as files:
        writers = [files.enter_context(ExampleWriter(folder / side, seed)) for side in SIDES]
        for plan in plans:
            positions = np.flatnonzero(plan.side >= 0)
            for position, record in zip(positions, plan.rows.record_lines(positions), strict=True):
                _write_row(writers[plan.side[position]], plan, int(position), record)
                done += 1
                if done % _PROGRESS_EVERY == 0:
                    progress.update(done, plan.source.label)
        for writer in writers:
            writer.finish()
        return {side: len(writer) for side, writer in zip(SIDES, writers, strict=True)}


def _write_row(writer: ExampleWriter, plan: SourcePlan, position: int, record: bytes) -> None:
    """Write a row as one example, or each of its windows as an example of its own."""
    arrays, i = plan.encoded.locate(position)
    first, last = int(arrays["sequence_ends"][i]), int(arrays["sequence_ends"][i + 1])
    lengths = arrays["sequence_lengths"][first:last].tolist()
    key, at = bytes(plan.rows.keys[position]).hex(), int(arrays["token_ends"][i])
    windows = list(zip(arrays["part_starts"][first:last], arrays["part_ends"][first:last], strict=True))
    if not windows[0][1]:
        examples = [(key, record, lengths)]
    else:
        whole = record_from_json(json.loads(record))
        cuts = [cut_record(whole, int(start), int(end)) for start, end in windows]
        lines = [json_line(record_to_json(cut)).encode()[:-1] for cut in cuts]
        examples = [(record_key(c), line, [n]) for c, line, n in zip(cuts, lines, lengths, strict=True)]
    for key, line, sequence_lengths in examples:
        tokens = slice(at, at := at + sum(sequence_lengths))
        writer.add(
            RowOrigin(key, plan.source.label, plan.rows.name_row(int(plan.rows.index[position]))),
            line,
            arrays["ids"][tokens],
            arrays["trained"][tokens],
            sequence_lengths,
            fate=FATES[plan.fate[position]],
            repeat=plan.source.repeat if plan.side[position] == SIDES.index("train") else 1,
        )


def _write_ledger(plans: Sequence[SourcePlan], folder: Path) -> dict[str, Any]:
    """Write the table of all rows, the summary and some rows that are on no side; returns the summary."""
    ledger = Ledger()
    examples: list[dict[str, Any]] = []
    labels = [plan.source.label for plan in plans]
    with LedgerWriter(folder / LEDGER_FILE) as file:
        for plan in plans:
            label = plan.source.label
            ledger.add_read(label, plan.rows.rows_read)
            for rows in _row_fates(plan, labels):
                file.add(label, rows)
                _count_fates(ledger, label, rows)
            examples += _left_out_examples(plan, labels)
        summary = ledger.to_json()
    trained = [_training_examples(plan) for plan in plans]
    for plan, count in zip(plans, trained, strict=True):
        share = round(count / max(1, sum(trained)), 6)
        mixture = {"training_examples": count, "training_share": share}
        summary["sources"][plan.source.label] |= _source_figures(plan) | mixture
    write_json(folder / "ledger.json", summary)
    write_atomic(folder / _LEFT_OUT, "".join(json_line(row) for row in examples))
    return summary


def _originals(plan: SourcePlan, positions: NDArray[Any], labels: Sequence[str]) -> Iterator[str | None]:
    """Of each of these rows that is a copy, the row that it copies."""
    columns = zip(plan.original_source[positions].tolist(), plan.original_row[positions], strict=True)
    return (f"{labels[number]} row {row}" if number >= 0 else None for number, row in columns)


def _row_fates(plan: SourcePlan, labels: Sequence[str]) -> Iterator[RowFates]:
    """The fates of all rows of a source, usable or not, in its order, one row group at a time."""
    index = np.concatenate([plan.rows.index, plan.rows.unusable])
    order = np.argsort(index, kind="stable")
    usable = len(plan.rows)
    for start in range(0, len(order), _ROW_GROUP):
        rows = order[start : start + _ROW_GROUP]
        is_usable = rows < usable
        positions, unusable = rows[is_usable], rows[~is_usable] - usable

        def column(
            values: NDArray[Any], default: Any, is_usable: Any = is_usable, positions: Any = positions
        ) -> NDArray[Any]:
            full = np.full(len(is_usable), default, values.dtype)
            full[is_usable] = values[positions]
            return full

        reason = column(plan.reason, UNSET)
        reason[~is_usable] = plan.rows.reason_codes[unusable]
        keys = iter(plan.rows.keys[positions])
        originals = iter(_originals(plan, positions, labels))
        file, row = plan.rows.row_in_file(index[rows])
        yield RowFates(
            row=row,
            file=file,
            files=[name for name, _ in plan.rows.files],
            fate=column(plan.fate, fate_code("dropped")),
            reason=reason,
            side=column(plan.side, UNSET),
            key=[bytes(next(keys)).hex() if usable_row else None for usable_row in is_usable],
            tokens=column(plan.tokens, UNSET),
            trained_tokens=column(plan.trained_tokens, UNSET),
            lost_end=column(plan.lost_end, False),
            original=[next(originals) if usable_row else None for usable_row in is_usable],
            contaminated=column(plan.contaminated, False),
            reasons=plan.reasons,
        )


def _count_fates(ledger: Ledger, label: str, rows: RowFates) -> None:
    columns = (c.tolist() for c in (rows.row, rows.file, rows.fate, rows.reason, rows.side))
    for row, file, fate, reason_code, side in zip(*columns, strict=True):
        reason = rows.reasons[reason_code] if reason_code >= 0 else None
        ledger.add_fate(
            label,
            f"{rows.files[file]}:{row}" if file >= 0 else row,
            FATES[fate],
            reason,
            SIDES[side] if side >= 0 else None,
        )


def _left_out_examples(plan: SourcePlan, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A few rows of each fate and reason that are on no side."""
    label = plan.source.label
    for example in plan.rows.examples:
        yield {"source": label, "fate": "dropped"} | example | {"index": plan.rows.name_row(example["index"])}
    for fate in _NO_SIDE:
        positions = plan.rows_with(fate)
        for reason in np.unique(plan.reason[positions]).tolist():
            some = positions[plan.reason[positions] == reason][:EXAMPLES_PER_REASON]
            originals = _originals(plan, some, labels)
            for position, line, original in zip(some, plan.rows.record_lines(some), originals, strict=True):
                yield {
                    "source": label,
                    "index": plan.rows.name_row(int(plan.rows.index[position])),
                    "fate": fate,
                    "reason": f"copy of {original}" if original else plan.reasons[reason] if reason >= 0 else None,
                    "text": json.dumps(json.loads(line), ensure_ascii=False)[:EXCERPT_CHARACTERS],
                }


def _training_examples(plan: SourcePlan) -> int:
    rows = np.flatnonzero(plan.side == SIDES.index("train"))
    return int(plan.encoded.column("examples", rows).sum()) * plan.source.repeat


def _source_figures(plan: SourcePlan) -> dict[str, Any]:
    """What the summary says about a source besides its counts."""
    asked, lost = count_losses(plan)
    used = plan.rows_with(*USED_FATES)
    return {
        "format": plan.rows.format,
        "why": plan.rows.why,
        "tokens": int(plan.tokens[used].sum()),
        "trained_tokens": int(plan.trained_tokens[used].sum()),
        "lost_ends": int(plan.lost_end[used].sum()),
        "contaminated": int(plan.contaminated.sum()),
        "contaminated_rows": [
            plan.rows.name_row(int(index)) for index in plan.rows.index[plan.contaminated][:EXAMPLES_PER_REASON]
        ],
        "asked": asked,
        "lost": lost,
    }
