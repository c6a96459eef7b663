"""What becomes of each row: chosen, encoded, judged, put on a side, checked against the held-out rows, and weighed
against other sources, in this order.

A `Plan` holds the fates of one source's rows as they become known; the functions here take the plans of all sources and
fill them in. What is costly is computed by several processes and kept in the cache. This module does not write examples
or ledgers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import corral.template
from corral.data import contamination, encoding, mixture, near_duplicates, plain_text, word_hashes
from corral.data.cache import ChunkStore, available_cores, cache_name, hash_code, map_in_processes, split_positions
from corral.data.ledger import FATES, Fate
from corral.data.mixture import SIDES
from corral.data.source_rows import SourceRows
from corral.messages import Record
from corral.progress import Progress
from corral.recipe import Data, Source
from corral.template import Template

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Compute: TypeAlias = Callable[[Iterable[Record]], dict[str, NDArray[Any]]]

UNSET = -1
_PER_WORKER = 2000  # rows for which a process of its own is worth its start


def fate_code(fate: Fate) -> int:
    """A fate's place in `FATES`, as it stands in arrays."""
    return FATES.index(fate)


@dataclass
class SourcePlan:
    """The usable rows of one source and what is known of them, [rows] each.

    Attributes:
        fate: index into `FATES`; -1 while it is open.
        reason: index into `reasons`; -1 where there is none.
        side: index into `SIDES`; -1 where it has none.
        tokens: of all its sequences, before any cut; -1 where it was not encoded.
        trained_tokens: that count in the loss, after any cut; -1 where it was not encoded.
        lost_end: whether the end of an answer was cut off.
        contaminated: whether it is to be trained on and shares a passage with a held-out row.
        weighed_out: whether it could be trained on and is beyond what its source's weight takes.
    """

    source: Source
    rows: SourceRows
    encoded: ChunkStore
    words: ChunkStore
    bands: ChunkStore
    reasons: list[str] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.rows)
        self.reasons = list(self.rows.reasons)
        self.fate = np.full(n, UNSET, np.int8)
        self.reason = np.full(n, UNSET, np.int16)
        self.side = np.full(n, UNSET, np.int8)
        self.tokens = np.full(n, UNSET, np.int64)
        self.trained_tokens = np.full(n, UNSET, np.int64)
        self.lost_end, self.contaminated, self.beyond_weight = (np.zeros(n, bool) for _ in range(3))

    @classmethod
    def from_source(cls, source: Source, rows: SourceRows, template: Template, limit: int, cache: Path) -> SourcePlan:
        """A plan in which every fate is open."""
        templates = hash_code(Path(corral.template.__file__).parent, Path(encoding.__file__), Path(plain_text.__file__))
        parts = (rows.identity, template.fingerprint, limit, templates, version("tokenizers"))
        compared = (rows.identity, hash_code(Path(word_hashes.__file__), Path(near_duplicates.__file__)))
        return cls(
            source,
            rows,
            ChunkStore(cache / cache_name("tokens", encoding.VERSION, *parts)),
            ChunkStore(cache / cache_name("words", word_hashes.VERSION, *compared)),
            ChunkStore(cache / cache_name("bands", near_duplicates.VERSION, *compared)),
        )

    @property
    def cache_folders(self) -> tuple[Path, ...]:
        """Where in the cache its rows and what is computed of them lie; not all need be there."""
        computed = (self.encoded.folder, self.words.folder, self.bands.folder)
        return computed[0].parent / self.rows.identity, *computed

    def rows_with(self, *fates: Fate) -> Ints:
        """Places of the rows with one of these fates, ascending; of those whose fate is open if none is named."""
        return np.flatnonzero(np.isin(self.fate, [fate_code(fate) for fate in fates] or [UNSET]))

    def set_fate(self, places: Ints | Bools, fate: Fate, reason: str | None = None) -> None:
        """Give rows their fate."""
        self.fate[places] = fate_code(fate)
        if reason is not None:
            if reason not in self.reasons:
                self.reasons.append(reason)
            self.reason[places] = self.reasons.index(reason)

    def word_blocks(self, places: Ints) -> Iterator[word_hashes.Block]:
        """The words of rows, some hundreds at a time."""
        for part in split_positions(places):
            found = [self.words.locate(int(place)) for place in part]
            words = [a["words"][a["word_ends"][i] : a["word_ends"][i + 1]] for a, i in found]
            ends = np.concatenate([[0], np.cumsum([len(w) for w in words])]).astype(np.int64)
            prompts = np.array([a["prompt_words"][i] for a, i in found], np.int64)
            yield np.concatenate(words), ends, prompts


@dataclass(frozen=True)
class WorkerPool:
    """Who computes, and who is told of it. `workers`: processes; by default as many as are worth their start."""

    progress: Progress
    workers: int | None = None

    def compute_missing(
        self, title: str, work: Sequence[tuple[SourcePlan, ChunkStore, Ints]], function: Compute
    ) -> None:
        """Fill in what is missing in the chunks for these places. What is finished stays, however this ends."""
        pieces = [
            (n, part)
            for n, (_, chunks, places) in enumerate(work)
            for part in split_positions(chunks.select_missing(places))
        ]
        total = sum(len(part) for _, part in pieces)
        if not total:
            return
        self.progress.start(title, total)

        def one(item: tuple[int, Ints]) -> tuple[str, int]:
            plan, chunks, _ = work[item[0]]
            chunks.save(item[1], function(plan.rows.records(item[1])))
            return plan.source.label, len(item[1])

        workers = self.workers or min(available_cores(), max(1, total // _PER_WORKER))
        began, done = time.perf_counter(), 0
        for label, count in map_in_processes(one, pieces, workers):
            done += count
            self.progress.update(done, f"{label}, {done / (time.perf_counter() - began):,.0f} rows/s")
        for _, chunks, _ in work:
            chunks.reload()


def deduplicate_and_cap(plans: Sequence[SourcePlan], data: Data, seed: int, hands: WorkerPool) -> None:
    """Duplicates, near duplicates and rows beyond the caps get their fates; the others are chosen."""
    if data.duplicates == "near":
        everything = [(p, p.bands, np.arange(len(p.rows))) for p in plans]
        hands.compute_missing("Comparing rows", everything, near_duplicates.band_columns)
        hands.compute_missing(
            "Reading words", [(p, p.words, places) for p, _, places in everything], word_hashes.word_columns
        )
    keys = [np.asarray(plan.rows.keys) for plan in plans]
    starts = np.cumsum([0, *map(len, keys)])
    equal = mixture.equal_groups(np.concatenate(keys))
    groups = equal
    if data.duplicates == "keep":
        groups = np.arange(len(equal))
    elif data.duplicates == "near":
        groups = _near_groups(plans, starts, equal)
    taken = np.zeros(len(groups), bool)
    for plan, start, end in zip(plans, starts[:-1], starts[1:], strict=True):
        here = slice(int(start), int(end))
        chosen, copies = mixture.choose_distinct(plan.rows.keys, groups[here], taken, seed, plan.source.rows)
        plan.set_fate(~chosen & ~copies, "not sampled", f"beyond the cap of {plan.source.rows} rows")
        # A copy that is no exact copy of any row before it can only be a near one.
        exact = equal[here] != np.arange(here.start, here.stop)
        plan.set_fate(copies & exact, "duplicate")
        plan.set_fate(copies & ~exact, "near duplicate")


def _near_groups(plans: Sequence[SourcePlan], starts: NDArray[Any], equal: Ints) -> Ints:
    signatures = [p.bands.column("bands", np.arange(len(p.rows))).reshape(-1, near_duplicates.BANDS) for p in plans]

    def words(row: int) -> NDArray[np.uint32]:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        arrays, i = plans[number].words.locate(row - int(starts[number]))
        return arrays["words"][arrays["word_ends"][i] : arrays["word_ends"][i + 1]]

    return near_duplicates.group_near_duplicates(np.concatenate(signatures).astype(np.uint64), equal, words)


def encode_selected(plans: Sequence[SourcePlan], data: Data, template: Template, hands: WorkerPool) -> None:
    """The chosen rows are encoded, and dropped where they cannot be trained on."""
    limit = data.max_length
    work = [(plan, plan.encoded, plan.rows_with()) for plan in plans]
    hands.compute_missing("Encoding rows", work, lambda records: encoding.encode_rows(records, template, limit))
    for plan, encoded, places in work:
        for name in ("tokens", "trained_tokens", "lost_end"):
            getattr(plan, name)[places] = encoded.column(name, places)
        _judge(plan, places, data)


def _judge(plan: SourcePlan, places: Ints, data: Data) -> None:
    limit = data.max_length
    reason, longest = (plan.encoded.column(name, places) for name in ("reason", "longest"))
    for place in places[reason >= 0]:
        arrays, i = plan.encoded.locate(int(place))
        why: list[str] = json.loads(arrays["reasons"].tobytes())
        plan.set_fate(np.array([place]), "dropped", why[int(arrays["reason"][i])])
    refused = reason >= 0
    plan.tokens[places[refused]] = plan.trained_tokens[places[refused]] = UNSET
    overlong = ~refused & (longest > limit)
    masked = ~refused & (plan.encoded.column("least_trained", places) == 0)
    if data.overlong == "drop":
        plan.set_fate(places[overlong], "dropped", f"longer than {limit} tokens")
        masked &= ~overlong
        plan.lost_end[places] = False
    plan.set_fate(
        places[masked & overlong], "fully masked", f"fully masked: none of the first {limit} tokens is trained"
    )
    plan.set_fate(places[masked & ~overlong], "fully masked", "fully masked: none of its tokens is trained")
    plan.set_fate(places[overlong & ~masked & (data.overlong == "truncate")], "truncated")
    plan.set_fate(places[~overlong & ~masked & ~refused], "kept")


def assign_sides(plans: Sequence[SourcePlan], data: Data, seed: int) -> None:
    """The rows that are left get their side."""
    places = [plan.rows_with("kept", "truncated") for plan in plans]
    keys = [np.asarray(plan.rows.keys[here]) for plan, here in zip(plans, places, strict=True)]
    for plan, here, sides in zip(plans, places, mixture.split_sides(keys, seed, data.split), strict=True):
        plan.side[here] = sides


def mark_contaminated(plans: Sequence[SourcePlan], data: Data, hands: WorkerPool) -> None:
    """Training rows that share passages with held-out rows are marked, and taken out if the recipe says so."""
    if data.contamination == "ignore" or not any((plan.side > SIDES.index("train")).any() for plan in plans):
        return
    used = [(plan, plan.words, plan.rows_with("kept", "truncated")) for plan in plans]
    hands.compute_missing("Reading words", used, word_hashes.word_columns)
    hands.progress.start("Comparing with held-out rows", None)
    train = [np.flatnonzero(plan.side == SIDES.index("train")) for plan in plans]
    held_out = [np.flatnonzero(plan.side > SIDES.index("train")) for plan in plans]

    def blocks(places: Sequence[Ints]) -> Iterator[word_hashes.Block]:
        for plan, here in zip(plans, places, strict=True):
            yield from plan.word_blocks(here)

    found = contamination.find_contaminated(blocks(held_out), blocks(train))
    for plan, here, flags in zip(plans, train, np.split(found, np.cumsum([len(t) for t in train])[:-1]), strict=True):
        plan.contaminated[here[flags]] = True
        if data.contamination == "drop":
            plan.set_fate(here[flags], "contaminated")
            plan.side[here[flags]] = UNSET


def apply_weights(plans: Sequence[SourcePlan], seed: int) -> None:
    """Where sources have weights, the training rows beyond a source's part of the mixture are taken out."""
    weights = [plan.source.weight for plan in plans if plan.source.weight is not None]
    if not weights:
        return
    train = [np.flatnonzero(plan.side == SIDES.index("train")) for plan in plans]
    used = mixture.weighted_row_counts([len(rows) for rows in train], weights, [plan.source.repeat for plan in plans])
    for plan, rows, number, weight in zip(plans, train, used, weights, strict=True):
        beyond = rows[~mixture.sample(plan.rows.keys[rows], number, seed)]
        why = f"beyond the weight {weight:g} of {sum(weights):g}, which takes {number:,} of {len(rows):,} training rows"
        plan.set_fate(beyond, "not sampled", why)
        plan.side[beyond] = UNSET
        plan.beyond_weight[beyond] = True
