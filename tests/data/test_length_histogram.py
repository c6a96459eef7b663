from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.ledger import FATES, Fate, LedgerWriter, RowFates
from corral.data.length_histogram import Bin, read_histogram, to_html, to_lines
from corral.data.prepare import Prepared
from tests.data.conftest import chat, chats, source, write_rows

TRAINED = ("kept", "trimmed", "split")


def written(path: Path, groups: list[list[tuple[Fate, int]]]) -> Path:
    """A ledger's table with a row group for each list of (fate, tokens)."""
    with LedgerWriter(path) as file:
        for rows in groups:
            n = len(rows)
            nothing, no = np.full(n, -1), np.zeros(n, bool)
            fates = np.array([FATES.index(fate) for fate, _ in rows], np.int8)
            tokens = np.array([t for _, t in rows], np.int64)
            side, reason = nothing.astype(np.int8), nothing.astype(np.int16)
            columns = (
                np.arange(n),
                nothing,
                [],
                fates,
                reason,
                side,
                [None] * n,
                tokens,
                nothing,
                no,
                [None] * n,
                no,
                [],
            )
            file.add("a", RowFates(*columns))
    return path


@given(st.lists(st.lists(st.tuples(st.sampled_from(FATES), st.integers(-1, 5000)), max_size=20), max_size=3))
def test_every_encoded_row_is_in_the_bin_that_holds_its_length(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[tuple[Fate, int]]]
) -> None:
    bins = read_histogram(written(tmp_path_factory.mktemp("ledger") / "ledger.parquet", groups))
    lengths = [t for rows in groups for _, t in rows if t > 0]
    assert sum(b.total for b in bins) == len(lengths)
    for b in bins:
        assert b.total == sum(b.min_tokens <= t <= b.max_tokens for t in lengths)
        kept = sum(
            b.min_tokens <= t <= b.max_tokens and fate in TRAINED for rows in groups for fate, t in rows if t > 0
        )
        assert b.counts[0] == kept
    assert all(later.min_tokens == earlier.max_tokens + 1 for earlier, later in pairwise(bins))
    assert not bins or (bins[0].total and bins[-1].total)


def test_bars_are_in_proportion_and_every_group_with_rows_is_visible() -> None:
    bins = [Bin(1, 15, (400, 0, 0)), Bin(16, 31, (0, 0, 0)), Bin(32, 63, (200, 1, 3))]
    assert to_lines(bins)[1:] == [
        "    1–15        400 " + "█" * 40,
        "   16–31          0",
        "   32–63        204 " + "█" * 20 + "▓░",
    ]
    assert to_lines([]) == []
    assert to_html([]) == ""
    assert to_html(bins).count("<rect") == 4


def test_a_histogram_of_prepared_rows_counts_truncated_rows_apart(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    rows = [*chats(30), chat("Long?", "yes " * 100), chat("long " * 200, "Yes.")]
    result = prepared(source(write_rows(tmp_path / "a.jsonl", rows)), max_length=90, overlong="truncate")
    bins = read_histogram(result.folder / "ledger.parquet")
    assert tuple(sum(b.counts[i] for b in bins) for i in range(3)) == (30, 1, 1)
    assert bins[-1].max_tokens > 600
