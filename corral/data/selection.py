"""Decides what becomes of each row: copies, caps, encoding, sides, contamination and weights, in this order.

A `SourcePlan` holds the fates of one source's rows; the functions here take the plans of all sources and fill them in. What
is costly is computed by several processes and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import corral.template
from corral.data import contamination, encoding, mixture, near_duplicates, plain_text, word_hashes
from corral.data.cache import cache_name, hash_code
from corral.data.example_store import ExampleStore
from corral.data.ledger import FATES, MAX_REASONS, OTHER_REASONS, USED_FATES, Fate
from corral.data.mixture import SIDES
from corral.data.row_store import RowStore, split_list_column
from corral.data.source_rows import SourceRows, split_key
from corral.data.worker_pool import WorkerPool
from corral.formatting import count_of
from corral.messages import Record
from corral.progress import Progress
from corral.recipe import Data, Source
from corral.template import Template

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

UNSET = -1
_TRAIN = SIDES.index("train")
_PROGRESS_EVERY = 500  # rows


def fate_code(fate: Fate) -> int:
    """A fate's index in `FATES`, as arrays hold it."""
    return FATES.index(fate)


@dataclass
class SourcePlan:
    """The rows of one source and what is known of them, in arrays of [rows].

    Attributes:
        fate: index into `FATES`; -1 while undecided.
        reason: index into `reasons`; -1 for none.
        side: index into `SIDES`; -1 for none.
        tokens: of all sequences, before truncation; -1 if the row was not encoded.
        trained_tokens: tokens that count in the loss, after truncation; -1 if the row was not encoded.
        lost_end: whether the end of an answer was cut off.
        contaminated: whether it is a training row that shares a passage with a held-out row; in rows for an evaluation alone,
            whether it is a row that shares one with a training row.
        original_source, original: of a copy, the index of the source of the row that it copies, and that row's position
            there; else -1.
        beyond_weight: whether it could be trained on but exceeds its source's weight.
    """

    source: Source
    rows: SourceRows
    encoded: RowStore
    words: RowStore
    bands: RowStore
    reasons: list[str] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.rows)
        self.reasons = list(self.rows.reasons)
        self.fate = np.full(n, UNSET, np.int8)
        self._reason_numbers = {reason: number for number, reason in enumerate(self.reasons)}
        self.reason = self.rows.reason.astype(np.int32)
        self.fate[self.reason != UNSET] = fate_code("dropped")
        self.side = np.full(n, UNSET, np.int8)
        self.tokens = np.full(n, UNSET, np.int64)
        self.trained_tokens = np.full(n, UNSET, np.int64)
        self.original_source, self.original = np.full(n, UNSET, np.int16), np.full(n, UNSET, np.int64)
        self.lost_end, self.contaminated, self.beyond_weight = (np.zeros(n, bool) for _ in range(3))

    @classmethod
    def from_source(cls, source: Source, rows: SourceRows, template: Template, data: Data, cache: Path) -> SourcePlan:
        """A plan in which the fate of every usable row is undecided."""
        encoding_code = hash_code(
            Path(corral.template.__file__).parent, Path(encoding.__file__), Path(plain_text.__file__)
        )
        settings = data.model_dump(mode="json", include={"max_length", "overlong", "train_on"})
        encoding_key = (rows.identity, template.fingerprint, settings, encoding_code, version("tokenizers"))
        words_key = (rows.identity, hash_code(Path(word_hashes.__file__), Path(near_duplicates.__file__)))
        return cls(
            source,
            rows,
            RowStore(cache / cache_name("tokens", encoding.VERSION, *encoding_key)),
            RowStore(cache / cache_name("words", word_hashes.VERSION, *words_key)),
            RowStore(cache / cache_name("bands", near_duplicates.VERSION, *words_key)),
        )

    @property
    def cache_folders(self) -> tuple[Path, ...]:
        """The folders in the cache of its rows and of what is computed from them; not all need exist."""
        computed = (self.encoded.folder, self.words.folder, self.bands.folder)
        return computed[0].parent / self.rows.identity, *computed

    def rows_with(self, *fates: Fate) -> Ints:
        """Positions of the rows with one of these fates, ascending; of undecided rows if none is named."""
        return np.flatnonzero(np.isin(self.fate, [fate_code(fate) for fate in fates] or [UNSET]))

    def set_fate(self, positions: Ints | Bools, fate: Fate, reason: str | None = None) -> None:
        """Give rows their fate."""
        self.fate[positions] = fate_code(fate)
        if reason is not None:
            self.reason[positions] = self._number_reason(reason)

    def _number_reason(self, reason: str) -> int:
        """The reason's index in `reasons`, where it is added; the number of different ones is bounded."""
        if reason not in self._reason_numbers and len(self.reasons) >= MAX_REASONS:
            reason = OTHER_REASONS
        if reason not in self._reason_numbers:
            self._reason_numbers[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self._reason_numbers[reason]

    def set_encoding_fates(self, positions: Ints) -> None:
        """Give rows that were encoded their fate, and what their encoding tells of them."""
        for name in ("tokens", "trained_tokens", "lost_end"):
            getattr(self, name)[positions] = self.encoded.column(name, positions)
        fit, reason = (self.encoded.column(name, positions) for name in ("fit", "reason"))
        self.fate[positions] = np.array([fate_code(fate) for fate in encoding.FITS], np.int8)[fit]
        texts, codes = np.unique(reason, return_inverse=True)
        numbers = [self._number_reason(text) if text else UNSET for text in texts.tolist()]
        self.reason[positions] = np.array(numbers, np.int32)[codes]
        refused = positions[(reason != "") & (self.tokens[positions] == 0)]
        self.tokens[refused] = self.trained_tokens[refused] = UNSET
        mended = positions[self.rows.store.column("mended", positions)]
        self.set_fate(mended[np.isin(self.fate[mended], [fate_code("kept"), fate_code("split")])], "trimmed")

    def word_blocks(self, positions: Ints) -> Iterator[word_hashes.Block]:
        """The words of rows, some hundreds of rows at a time."""
        for piece in self.rows.split(positions):
            ((_, batch),) = self.words.read(piece)
            words, bounds = split_list_column(batch["words"])
            yield words.to_numpy(), bounds, batch["prompt_words"].to_numpy()


def deduplicate_and_cap(plans: Sequence[SourcePlan], data: Data, seed: int, pool: WorkerPool) -> None:
    """Set the fates of duplicates, near duplicates and rows beyond a source's cap; the others stay undecided.

    The rows of held-out sources stay as they are, copies included; rows of other sources that equal one of them, or are
    about its prompt, are copies whatever `duplicates` says.
    """
    # The copy that is left out is never one of a held-out source, and one of a source to train on only for such a row.
    numbers = sorted(range(len(plans)), key=lambda n: (not plans[n].source.is_held_out, plans[n].source.side is None))
    ordered = [plans[n] for n in numbers]
    candidates = [_cap_held_out(plan, seed) if plan.source.is_held_out else plan.rows.usable for plan in ordered]
    if data.duplicates == "near":
        bands = [(plan, plan.bands, positions) for plan, positions in zip(ordered, candidates, strict=True)]
        words = [(plan, plan.words, positions) for plan, positions in zip(ordered, candidates, strict=True)]
        pool.compute_missing("Comparing rows", bands, near_duplicates.band_columns)
        pool.compute_missing("Reading words", words, word_hashes.word_columns)
    keys = [plan.rows.keys(positions) for plan, positions in zip(ordered, candidates, strict=True)]
    starts = np.cumsum([0, *map(len, keys)])
    held_out = int(starts[sum(plan.source.is_held_out for plan in plans)])
    all_positions = np.concatenate(candidates)
    equal = mixture.equal_groups(np.concatenate(keys))
    groups = equal
    if data.duplicates == "keep":
        groups = np.where(equal < held_out, equal, np.arange(len(equal)))
    elif data.duplicates == "near":
        groups = _group_near_duplicates(ordered, all_positions, starts, equal, held_out)
    name = split_key(plan.rows for plan in plans)
    group_keys = [plan.rows.keys(positions, name) for plan, positions in zip(ordered, candidates, strict=True)]
    first_of_group = mixture.equal_groups(np.concatenate(group_keys))
    shares_prompt = (first_of_group < held_out) & (equal >= held_out)
    groups = np.where(shares_prompt, first_of_group, groups)
    taken = np.arange(len(groups)) < held_out
    for number, (plan, positions) in enumerate(zip(ordered, candidates, strict=True)):
        if plan.source.is_held_out:
            continue
        part = slice(int(starts[number]), int(starts[number + 1]))
        chosen, copies = mixture.choose_distinct(keys[number], groups[part], taken, seed, plan.source.rows)
        plan.set_fate(positions[~chosen & ~copies], "not sampled", _beyond_cap(plan))
        # A copy that neither equals a row before it nor shares a held-out prompt can only be a near one.
        exact = (equal[part] != np.arange(part.start, part.stop)) | shares_prompt[part]
        plan.set_fate(positions[copies & exact], "duplicate")
        plan.set_fate(positions[copies & ~exact], "near duplicate")
        originals = groups[part][copies]
        sources = np.searchsorted(starts, originals, side="right") - 1
        plan.original_source[positions[copies]] = np.array(numbers, np.int16)[sources]
        plan.original[positions[copies]] = all_positions[originals]


def _cap_held_out(plan: SourcePlan, seed: int) -> Ints:
    """Positions of the rows of a held-out source that are used, ascending; sets the fate of those beyond its cap."""
    usable, cap = plan.rows.usable, plan.source.rows
    if cap is None:
        return usable
    chosen = mixture.sample(plan.rows.keys(usable), cap, seed)
    plan.set_fate(usable[~chosen], "not sampled", _beyond_cap(plan))
    return usable[chosen]


def _beyond_cap(plan: SourcePlan) -> str:
    return f"beyond the cap of {count_of(plan.source.rows or 0, 'row')}"


def _group_near_duplicates(
    plans: Sequence[SourcePlan], positions: Ints, starts: NDArray[Any], equal: Ints, kept: int
) -> Ints:
    """The group of each row, as `near_duplicates.group_near_duplicates`, of which the first `kept` are all kept."""
    parts = zip(plans, np.split(positions, starts[1:-1]), strict=True)
    # A source of which nothing is chosen has no bands, not even the type of bands.
    bands = [plan.bands.column("bands", part) for plan, part in parts if len(part)]

    def words_of_row(row: int) -> NDArray[np.uint32]:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        batch, i = plans[number].words.locate(int(positions[row]))
        return batch["words"][i].values.to_numpy()

    all_bands = np.concatenate([np.zeros((0, near_duplicates.BANDS), np.uint64), *bands])
    return near_duplicates.group_near_duplicates(all_bands, equal, words_of_row, kept)


def encode_selected(plans: Sequence[SourcePlan], data: Data, template: Template, pool: WorkerPool) -> None:
    """Encode the undecided rows and set their fates, as `encoding.FITS`."""
    work = [(plan, plan.encoded, plan.rows_with()) for plan in plans]
    pool.compute_missing("Encoding rows", work, lambda records: encoding.encode_rows(records, template, data))
    for plan, _, positions in work:
        if len(positions):
            plan.set_encoding_fates(positions)


def assign_sides(plans: Sequence[SourcePlan], data: Data, seed: int) -> None:
    """Put the rows that are used on a side: train, validation or test; those of a source that has a `side` on that one."""
    positions = [plan.rows_with(*USED_FATES) for plan in plans]
    for plan, part in zip(plans, positions, strict=True):
        if plan.source.side is not None:
            plan.side[part] = SIDES.index(plan.source.side)
    name = split_key(plan.rows for plan in plans)
    keys = [plan.rows.keys(part, name) for plan, part in zip(plans, positions, strict=True)]
    free, trained = ([k for k, p in zip(keys, plans, strict=True) if p.source.side == side] for side in (None, "train"))
    split = iter(
        mixture.split_sides(
            free, seed, validation=data.held_out("validation"), test=data.held_out("test"), trained=trained
        )
    )
    for plan, part in zip(plans, positions, strict=True):
        if plan.source.side is None:
            plan.side[part] = next(split)


def mark_contaminated(plans: Sequence[SourcePlan], data: Data, pool: WorkerPool) -> None:
    """Mark training rows that share passages with held-out rows; drop them if the recipe says so."""
    if data.contamination == "ignore" or not any((plan.side > _TRAIN).any() for plan in plans):
        return
    used = [(plan, plan.words, plan.rows_with(*USED_FATES)) for plan in plans]
    pool.compute_missing("Reading words", used, word_hashes.word_columns)
    pool.progress.start("Comparing with held-out rows", None)
    train = [np.flatnonzero(plan.side == _TRAIN) for plan in plans]
    held_out = [np.flatnonzero(plan.side > _TRAIN) for plan in plans]

    def blocks(positions: Sequence[Ints]) -> Iterator[word_hashes.Block]:
        for plan, part in zip(plans, positions, strict=True):
            yield from plan.word_blocks(part)

    flags, _ = contamination.find_contaminated(blocks(held_out), blocks(train))
    ends = np.cumsum([len(part) for part in train])[:-1]
    for plan, part, part_flags in zip(plans, train, np.split(flags, ends), strict=True):
        plan.contaminated[part[part_flags]] = True
        if data.contamination == "drop":
            plan.set_fate(part[part_flags], "contaminated")
            plan.side[part[part_flags]] = UNSET


def mark_trained_on(plan: SourcePlan, trained: ExampleStore, data: Data, pool: WorkerPool) -> None:
    """Mark the held-out rows of a source that equal a row of a training side, or share passages with one."""
    positions = plan.rows_with(*USED_FATES)
    keys = [bytes(key).hex() for key in plan.rows.keys(positions)]
    plan.contaminated[positions] = np.isin(keys, list(trained.keys_among(keys)))
    if data.contamination == "ignore":
        return
    pool.compute_missing("Reading words", [(plan, plan.words, positions)], word_hashes.word_columns)
    pool.progress.start("Comparing with training rows", len(trained))
    training = word_hashes.word_blocks(_report(trained.records(), pool.progress))
    plan.contaminated[positions] |= contamination.find_contaminated(plan.word_blocks(positions), training)[1]


def _report(records: Iterable[Record], progress: Progress) -> Iterator[Record]:
    for done, record in enumerate(records, start=1):
        yield record
        if done % _PROGRESS_EVERY == 0:
            progress.update(done)


def apply_weights(plans: Sequence[SourcePlan], seed: int, mixtures: Sequence[Collection[str]] | None = None) -> None:
    """Take out the training rows that exceed their source's share of its mixture, if sources have weights.

    Args:
        plans: of all sources.
        seed: decides which rows stay.
        mixtures: labels of the sources of each mixture; by default all are one.
    """
    for labels in mixtures or [{plan.source.label for plan in plans}]:
        _apply_weights([plan for plan in plans if plan.source.label in labels], seed)


def _apply_weights(plans: Sequence[SourcePlan], seed: int) -> None:
    weights = [plan.source.weight for plan in plans if plan.source.weight is not None]
    if not weights:
        return
    plans = [plan for plan in plans if plan.source.weight is not None]
    train = [np.flatnonzero(plan.side == _TRAIN) for plan in plans]
    examples = [plan.encoded.column("examples", rows) for plan, rows in zip(plans, train, strict=True)]
    counts = mixture.weighted_row_counts([int(n.sum()) for n in examples], weights, [p.source.repeat for p in plans])
    for plan, rows, per_row, count, weight in zip(plans, train, examples, counts, weights, strict=True):
        beyond = rows[~mixture.sample(plan.rows.keys(rows), count, seed, per_row)]
        reason = (
            f"beyond the weight {weight:g} of {sum(weights):g}, which takes {count:,} of {int(per_row.sum()):,} training "
            f"{'rows' if int(per_row.sum()) == len(rows) else 'examples'}"
        )
        plan.set_fate(beyond, "not sampled", reason)
        plan.side[beyond] = UNSET
        plan.beyond_weight[beyond] = True
