"""Prepares a recipe's data: `prepare` writes examples to disk, `Prepared.open` reads them.

The folder holds `ledger.json` and `ledger.parquet` (what became of every row), `left_out.jsonl` (a few rows of each fate
that is on no side) and `rows/SIDE/`, the examples of each side. Equal input gives equal bytes, whatever the number of
workers and the state of the cache.

Costly results are kept in the cache, each under a name made of what it depends on: records by the source's content and
format; tokens by records, template and maximum length; words by records. So another cap, split, weight or seed reuses them
all, another template makes new tokens only, and an interrupted run continues from its last finished chunk.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from corral.data import cache as caches
from corral.data import selection
from corral.data.encoding import cut_record, encode_record
from corral.data.example_store import ExampleStore, ExampleWriter
from corral.data.ledger import EXAMPLES_PER_REASON, FATES, LEDGER_FILE, USED_FATES, Fate, Ledger, LedgerWriter, RowFates
from corral.data.lost_rows_budget import check_loss_budget, check_not_empty, check_sources_used, count_losses
from corral.data.mixture import SIDES, Side
from corral.data.row_store import Batch, Column, Ints, list_column, split_list_column, text_column
from corral.data.selection import UNSET, SourcePlan
from corral.data.source_rows import EXCERPT_CHARACTERS, RowSettings, load_source_rows
from corral.data.worker_pool import WorkerPool
from corral.errors import DataError
from corral.formatting import json_line
from corral.messages import record_from_json, record_key, record_to_json
from corral.progress import Progress
from corral.recipe import Data, Source
from corral.storage import new_directory, write_atomic, write_json
from corral.template import Template

__all__ = ["Prepared", "encode_record", "prepare", "prepare_test_rows"]

_VERSION = 7
_READABLE = (5, 6, 7)  # rows of earlier versions lack columns that can be computed from the others
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
            if meta["version"] not in _READABLE:
                raise ValueError(f"they have version {meta['version']}, this corral reads {_READABLE}")
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

    def digest(self, side: Side, sources: Collection[str] | None = None) -> str:
        """What training or evaluation on a side depends on, as `ExampleStore.digest`.

        Args:
            side: its name.
            sources: labels of sources whose rows alone count; by default all.
        """
        rows = self.side(side)
        return (rows if sources is None else rows.select(sources)).digest

    @property
    def labels(self) -> list[str]:
        """The labels of the sources, in the order of the recipe that the rows were prepared for."""
        return list(self.ledger["sources"])

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
    split_seed: int | None = None,
    mixtures: Sequence[Collection[str]] | None = None,
    cache: Path | None = None,
    workers: int | None = None,
) -> Prepared:
    """Read, check, sample, encode and split all rows, and write them into `folder`.

    Args:
        data: the recipe's section.
        template: makes ids and masks.
        folder: an existing directory; rows that are in it already are replaced as a whole.
        seed: with a row's content decides its position, and whether a cap or a weight keeps it.
        progress: receives how far it is.
        split_seed: with a row's content decides its side; by default `seed`.
        mixtures: labels of the sources that are trained on together, which `weight` mixes; by default all are.
        cache: where costly results are kept; by default corral's own cache.
        workers: processes that compute; by default at most as many as there are cores.

    Raises:
        DataError: a source cannot be read; no row is left to train on; a side that should have rows is empty.
        AssetError: a data asset cannot be fetched.
        GateError: more rows are lost than `data.max_loss` allows; the ledger is written, the rows are not.
        StorageError: the folder or the cache cannot be written.
    """
    progress = progress or Progress()
    pool = WorkerPool(progress, workers)
    with _planned(data, template, cache, progress) as plans:
        selection.deduplicate_and_cap(plans, data, seed, pool)
        selection.encode_selected(plans, data, template, pool)
        selection.assign_sides(plans, data, seed if split_seed is None else split_seed)
        selection.mark_contaminated(plans, data, pool)
        selection.apply_weights(plans, seed, mixtures)
        with _written(plans, folder, seed, progress) as ledger:
            check_not_empty(plans, data, ledger)
            check_loss_budget(data, ledger, where=folder / LEDGER_FILE)
    return Prepared.open(folder)


def prepare_test_rows(
    source: Source,
    data: Data,
    template: Template,
    folder: Path,
    seed: int,
    trained: ExampleStore,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    workers: int | None = None,
) -> Prepared:
    """Read, check and encode the rows of one source for an evaluation alone, and write them into `folder`.

    All its usable rows are on the test side as they are.

    The ledger counts as `trained_on` the rows that equal training rows or, unless `data.contamination` is "ignore", share
    passages with them; `contaminated` marks them in its table.

    Args:
        source: its rows are on the test side, whatever its `side` is.
        data: the recipe's section, for how rows are read and fitted.
        template: makes ids and masks.
        folder: an existing directory; rows that are in it already are replaced as a whole.
        seed: with a row's content decides its position, and whether a cap keeps it.
        trained: the rows that the model was trained on.
        progress: receives how far it is.
        cache: where costly results are kept; by default corral's own cache.
        workers: processes that compute; by default at most as many as there are cores.

    Raises: DataError (it cannot be read, or none of its rows can be used), AssetError, StorageError.
    """
    progress = progress or Progress()
    pool = WorkerPool(progress, workers)
    data = data.model_copy(update={"sources": (source.model_copy(update={"side": "test"}),), "duplicates": "keep"})
    with _planned(data, template, cache, progress) as plans:
        selection.deduplicate_and_cap(plans, data, seed, pool)
        selection.encode_selected(plans, data, template, pool)
        selection.assign_sides(plans, data, seed)
        selection.mark_trained_on(plans[0], trained, data, pool)
        with _written(plans, folder, seed, progress) as ledger:
            check_sources_used(plans, data, ledger, source.path)
    return Prepared.open(folder)


@contextlib.contextmanager
def _planned(data: Data, template: Template, cache: Path | None, progress: Progress) -> Generator[list[SourcePlan]]:
    """The plans of all sources, whose files in the cache are held meanwhile."""
    cache = cache or caches.default_folder()
    with caches.hold_cache(cache) as used:
        progress.start("Reading rows", None)
        row_settings = RowSettings.from_recipe(data)
        plans = [
            SourcePlan.from_source(
                source, load_source_rows(source, cache, progress, row_settings), template, data, cache
            )
            for source in data.sources
        ]
        used.update(folder for plan in plans for folder in plan.cache_folders)
        yield plans


@contextlib.contextmanager
def _written(plans: Sequence[SourcePlan], folder: Path, seed: int, progress: Progress) -> Generator[dict[str, Any]]:
    """Write rows and ledger; gives the ledger's summary. If the body raises, the ledger stays and the rows do not."""
    with new_directory(folder / _ROWS) as rows:
        counts = _write_rows(plans, rows, seed, progress)
        yield _write_ledger(plans, folder)
        write_json(rows / _META, {"version": _VERSION, "examples": counts})


def _write_rows(plans: Sequence[SourcePlan], folder: Path, seed: int, progress: Progress) -> dict[str, int]:
    """Write each side's examples; returns how many each has, repeats included."""
    progress.start("Writing rows", sum(int((plan.side >= 0).sum()) for plan in plans))
    done = 0
    writers = [ExampleWriter(folder / side, seed) for side in SIDES]
    for plan in plans:
        for positions in plan.rows.split(np.flatnonzero(plan.side >= 0)):
            ((_, rows),) = plan.rows.store.read(positions)
            examples, row_of_example = _examples_of_rows(plan, positions, rows)
            sides = plan.side[positions][row_of_example]
            for code, writer in enumerate(writers):
                some = np.flatnonzero(sides == code)
                repeat = plan.source.repeat if code == SIDES.index("train") else 1
                if len(some):
                    columns = {name: column.take(some) for name, column in examples.items()}
                    writer.add(columns, plan.fate[positions][row_of_example][some], repeat)
            done += len(positions)
            progress.update(done, plan.source.label)
    for writer in writers:
        writer.finish()
    return {side: len(writer) for side, writer in zip(SIDES, writers, strict=True)}


def _examples_of_rows(plan: SourcePlan, positions: Ints, rows: Batch) -> tuple[dict[str, Column], Ints]:
    """(the columns of an `ExampleWriter`, the row of each example): one for each row, or for each of its windows."""
    import pyarrow as pa

    ((_, encoded),) = plan.encoded.read(positions)
    sequences, bounds = split_list_column(encoded["ids"])
    trained, _ = split_list_column(encoded["trained"])
    parts = split_list_column(encoded["parts"])[0].flatten().to_numpy().reshape(-1, 2)
    is_first = np.zeros(len(sequences) + 1, bool)
    is_first[bounds] = True
    is_window = parts[:, 1] > 0
    example_bounds = np.flatnonzero(np.append(is_window, False) | is_first)
    row_of_example = np.searchsorted(bounds, example_bounds[:-1], side="right") - 1
    records: list[bytes] = []
    keys: list[str] = []
    lines, row_keys = (value.as_py() for value in rows["record"]), [bytes(k).hex() for k in plan.rows.keys(positions)]
    for line, key, (start, end) in zip(lines, row_keys, pairwise(bounds), strict=True):
        if not is_window[start:end].any():
            keys.append(key)
            records.append(line)
            continue
        whole = record_from_json(json.loads(line))
        for first, last in parts[start:end].tolist():
            cut = cut_record(whole, first, last)
            keys.append(record_key(cut))
            records.append(json_line(record_to_json(cut)).encode()[:-1])
    columns: dict[str, Column] = {
        "key": pa.array(keys, pa.string()),
        "row_key": pa.array([row_keys[i] for i in row_of_example], pa.string()),
        "source": pa.array([plan.source.label] * len(keys), pa.string()),
        "file": text_column(rows["file"].to_numpy()[row_of_example], plan.rows.files).cast(pa.string()),
        "row": rows["row"].take(row_of_example),
        "record": pa.array(records, pa.large_binary()),
        "ids": list_column(sequences, example_bounds),
        "trained": list_column(trained, example_bounds),
    }
    return columns, row_of_example


def _write_ledger(plans: Sequence[SourcePlan], folder: Path) -> dict[str, Any]:
    """Write the table of all rows, the summary and some rows that are on no side; returns the summary."""
    ledger = Ledger()
    examples: list[dict[str, Any]] = []
    with LedgerWriter(folder / LEDGER_FILE) as file:
        for plan in plans:
            label = plan.source.label
            ledger.add_read(label, len(plan.rows))
            for rows in _row_fates(plan, plans):
                file.add(label, rows)
                _count_fates(ledger, label, rows)
            examples += _left_out_examples(plan, plans)
        summary = ledger.to_json()
    trained = [_training_examples(plan) for plan in plans]
    for plan, count in zip(plans, trained, strict=True):
        share = round(count / max(1, sum(trained)), 6)
        mixture = {"training_examples": count, "training_share": share}
        summary["sources"][plan.source.label] |= _source_figures(plan) | mixture
    write_json(folder / "ledger.json", summary)
    write_atomic(folder / _LEFT_OUT, "".join(json_line(row) for row in examples))
    return summary


def _name_originals(plan: SourcePlan, positions: Ints, plans: Sequence[SourcePlan]) -> list[str | None]:
    """Of each of these rows that is a copy, the row that it copies, as `SOURCE row N`."""
    names: list[str | None] = [None] * len(positions)
    sources = plan.original_source[positions]
    for number in np.unique(sources[sources != UNSET]).tolist():
        copies = np.flatnonzero(sources == number)
        originals = plans[number].rows.name_rows(plan.original[positions[copies]])
        for i, original in zip(copies.tolist(), originals, strict=True):
            names[i] = f"{plans[number].source.label} row {original}"
    return names


def _row_fates(plan: SourcePlan, plans: Sequence[SourcePlan]) -> Iterator[RowFates]:
    """The fates of all rows of a source, in its order, one row group at a time."""
    for start in range(0, len(plan.rows), _ROW_GROUP):
        positions = np.arange(start, min(start + _ROW_GROUP, len(plan.rows)))
        keys = (bytes(key).hex() for key in plan.rows.keys(positions))
        yield RowFates(
            row=plan.rows.store.column("row", positions),
            file=plan.rows.store.column("file", positions),
            files=plan.rows.files,
            fate=plan.fate[positions],
            reason=plan.reason[positions],
            side=plan.side[positions],
            key=[key if reason < 0 else None for key, reason in zip(keys, plan.rows.reason[positions], strict=True)],
            tokens=plan.tokens[positions],
            trained_tokens=plan.trained_tokens[positions],
            lost_end=plan.lost_end[positions],
            original=_name_originals(plan, positions, plans),
            contaminated=plan.contaminated[positions],
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


def _left_out_examples(plan: SourcePlan, plans: Sequence[SourcePlan]) -> Iterator[dict[str, Any]]:
    """A few rows of each fate and reason that are on no side."""
    label = plan.source.label
    for example in plan.rows.examples:
        (index,) = plan.rows.name_rows(np.array([example["position"]]))
        yield {"source": label, "index": index, "fate": "dropped"} | {
            name: example[name] for name in ("reason", "text")
        }
    for fate in _NO_SIDE:
        positions = plan.rows_with(fate)
        positions = positions[plan.rows.reason[positions] < 0]
        for reason in np.unique(plan.reason[positions]).tolist():
            some = positions[plan.reason[positions] == reason][:EXAMPLES_PER_REASON]
            columns = plan.rows.name_rows(some), plan.rows.record_lines(some), _name_originals(plan, some, plans)
            for index, line, original in zip(*columns, strict=True):
                yield {
                    "source": label,
                    "index": index,
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
    trained_on = np.flatnonzero(plan.contaminated & (plan.side == SIDES.index("test")))
    contaminated = np.setdiff1d(np.flatnonzero(plan.contaminated), trained_on)
    return {
        "format": plan.rows.format,
        "why": plan.rows.why,
        "tokens": int(plan.tokens[used].sum()),
        "trained_tokens": int(plan.trained_tokens[used].sum()),
        "lost_ends": int(plan.lost_end[used].sum()),
        "contaminated": len(contaminated),
        "contaminated_rows": plan.rows.name_rows(contaminated[:EXAMPLES_PER_REASON]),
        "trained_on": len(trained_on),
        "trained_on_rows": plan.rows.name_rows(trained_on[:EXAMPLES_PER_REASON]),
        "asked": asked,
        "lost": lost,
    }
