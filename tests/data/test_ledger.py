from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from corral.data.ledger import FATES, OTHER_REASONS, Fate, Ledger, LedgerWriter, RowFates, format_summary


def filled() -> Ledger:
    ledger = Ledger()
    for _ in range(12):
        ledger.add_read("a")
    ledger.add_fate("a", 1, "kept", side="train")
    ledger.add_fate("a", 2, "kept", side="test")
    ledger.add_fate("a", 3, "truncated", side="train")
    ledger.add_fate("a", 4, "duplicate")
    ledger.add_fate("a", 5, "not sampled", "beyond the cap")
    for index in range(6, 12):
        ledger.add_fate("a", index, "dropped", "no answer")
    ledger.add_fate("a", 12, "dropped", "empty")
    return ledger


def test_the_json_form_counts_rows_by_source_fate_side_and_reason() -> None:
    fates = dict.fromkeys(FATES, 0) | {"kept": 2, "truncated": 1, "dropped": 7, "duplicate": 1, "not sampled": 1}
    assert filled().to_json() == {
        "rows": 12,
        "fates": fates,
        "sources": {
            "a": {
                "rows": 12,
                "fates": fates,
                "sides": {"train": 2, "validation": 0, "test": 1},
                "reasons": {
                    "no answer": {"fate": "dropped", "count": 6, "examples": [6, 7, 8, 9, 10]},
                    "beyond the cap": {"fate": "not sampled", "count": 1, "examples": [5]},
                    "empty": {"fate": "dropped", "count": 1, "examples": [12]},
                },
            }
        },
    }


def test_rows_without_a_fate_or_with_two_are_detected() -> None:
    ledger = filled()
    ledger.add_read("a")
    with pytest.raises(AssertionError, match="13 rows were read, 12 have a fate"):
        ledger.to_json()
    ledger.add_fate("a", 13, "duplicate")
    ledger.check()
    ledger.add_fate("a", 13, "duplicate")
    with pytest.raises(AssertionError, match="13 rows were read, 14 have a fate"):
        ledger.to_json()


def test_a_fate_without_its_reason_or_side_is_refused() -> None:
    for wrong in (
        lambda: Ledger().add_fate("a", 1, "dropped"),
        lambda: Ledger().add_fate("a", 1, "not sampled"),
        lambda: Ledger().add_fate("a", 1, "kept"),
        lambda: Ledger().add_fate("a", 1, "duplicate", side="train"),
        lambda: Ledger().add_fate("a", 1, "kept", "why", "train"),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_reasons_are_counted_by_kind_and_named_in_full_where_rows_agree() -> None:
    ledger = Ledger()
    for index in range(5000):
        ledger.add_read("a")
        ledger.add_fate("a", index, "dropped", f"role is 'r{index}'" if index % 2 else "longer than 512 tokens")
    reasons = ledger.to_json()["sources"]["a"]["reasons"]
    assert reasons == {
        "longer than 512 tokens": {"fate": "dropped", "count": 2500, "examples": [0, 2, 4, 6, 8]},
        "role is …": {"fate": "dropped", "count": 2500, "examples": [1, 3, 5, 7, 9]},
    }


def test_the_kinds_of_reasons_are_bounded() -> None:
    ledger = Ledger()
    for index in range(5000):
        ledger.add_read("a")
        ledger.add_fate("a", index, "dropped", f"reason {'a' * index}")
    ledger.add_read("a")
    ledger.add_fate("a", 5000, "not sampled", "beyond the cap")
    reasons = ledger.to_json()["sources"]["a"]["reasons"]
    assert len(reasons) == 102
    assert reasons[OTHER_REASONS] == {"fate": "dropped", "count": 4900, "examples": [100, 101, 102, 103, 104]}
    assert reasons["beyond the cap"]["count"] == 1


def test_the_summary_has_a_line_for_each_source_and_reason() -> None:
    assert format_summary(filled().to_json()).splitlines() == [
        "12 rows: 2 kept, 1 truncated, 7 dropped, 1 duplicate, 1 not sampled",
        "  a: 12 rows: 2 kept, 1 truncated, 7 dropped, 1 duplicate, 1 not sampled",
        "    sides: 2 train, 1 test",
        "    dropped: 6 × no answer (rows 6, 7, 8, 9, 10 …)",
        "    not sampled: 1 × beyond the cap (row 5)",
        "    dropped: 1 × empty (row 12)",
    ]


def rows_of(first: int, fates: list[Fate], reasons: list[str]) -> RowFates:
    n = len(fates)
    return RowFates(
        row=np.arange(first, first + n),
        file=np.full(n, -1),
        files=[],
        fate=np.array([FATES.index(f) for f in fates], np.int8),
        reason=np.array([0 if f == "dropped" else -1 for f in fates], np.int16),
        side=np.array([0 if f == "kept" else -1 for f in fates], np.int8),
        key=[None if f == "dropped" else f"{i:064x}" for i, f in enumerate(fates)],
        tokens=np.array([12 if f == "kept" else -1 for f in fates]),
        trained_tokens=np.array([5 if f == "kept" else -1 for f in fates]),
        lost_end=np.zeros(n, bool),
        original=["b row 7" if f == "duplicate" else None for f in fates],
        contaminated=np.zeros(n, bool),
        reasons=reasons,
    )


def test_the_table_has_nulls_where_values_are_missing(tmp_path: Path) -> None:
    with LedgerWriter(tmp_path / "ledger.parquet") as file:
        file.add("a", rows_of(1, ["kept", "dropped"], ["no answer"]))
        file.add("a", rows_of(3, ["duplicate"], ["no answer", "empty"]))
        file.add("b", rows_of(1, ["kept"], []))
    table = parquet.read_table(tmp_path / "ledger.parquet")
    assert parquet.ParquetFile(tmp_path / "ledger.parquet").num_row_groups == 3
    lines = table.to_pylist()
    assert [(x["source"], x["row"], x["fate"], x["reason"], x["side"], x["tokens"]) for x in lines] == [
        ("a", 1, "kept", None, "train", 12),
        ("a", 2, "dropped", "no answer", None, None),
        ("a", 3, "duplicate", None, None, None),
        ("b", 1, "kept", None, "train", 12),
    ]
    assert lines[1]["key"] is None
    assert lines[0]["trained_tokens"] == 5


def test_an_unfinished_table_leaves_no_file(tmp_path: Path) -> None:
    def stop_in_the_middle() -> None:
        with LedgerWriter(tmp_path / "ledger.parquet") as file:
            file.add("a", rows_of(1, ["kept"], []))
            raise KeyError

    with pytest.raises(KeyError):
        stop_in_the_middle()
    assert list(tmp_path.iterdir()) == []
