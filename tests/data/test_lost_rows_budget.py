"""Losses of plans and ledgers made for the test; `prepare` as a whole is tested in test_prepare and test_prepare_mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.data.ledger import Fate, Ledger
from corral.data.lost_rows_budget import check_loss_budget, check_not_empty, count_losses
from corral.data.mixture import SIDES, Side
from corral.data.selection import SourcePlan
from corral.errors import DataError, GateError
from corral.recipe import Data, Source, Split
from tests.data.conftest import chats, source, write_rows

Planned = Callable[..., list[SourcePlan]]
PLACE = Path("prepare/ledger.parquet")


# ---- how much is lost


@pytest.mark.parametrize(
    ("usable", "broken", "expected"),
    [
        ({"kept": 10}, 0, (10, 0)),
        ({"kept": 9}, 1, (10, 1)),
        ({"kept": 5, "truncated": 1, "dropped": 2, "fully masked": 3}, 4, (15, 10)),
        # Left out on purpose: not asked for, so no loss.
        ({"kept": 6, "duplicate": 3, "near duplicate": 4, "contaminated": 2}, 2, (8, 2)),
        # A cap keeps a quarter: a quarter of the broken rows counts too.
        ({"kept": 4, "dropped": 1, "not sampled": 15}, 8, (7, 3)),
        ({"kept": 4, "contaminated": 1, "not sampled": 15}, 8, (6, 2)),
        ({}, 5, (5, 5)),
        ({"duplicate": 3}, 2, (2, 2)),
    ],
)
def test_lost_rows_are_wanted_rows_not_trained_on_whole(
    planned: Planned, tmp_path: Path, usable: dict[Fate, int], broken: int, expected: tuple[float, float]
) -> None:
    rows: list[Any] = [*chats(sum(usable.values())), *[{"messages": []}] * broken]
    (plan,) = planned(source(write_rows(tmp_path / "a.jsonl", rows), format="messages"))
    at = 0
    for fate, count in usable.items():
        plan.set_fate(np.arange(at, at + count), fate)
        at += count
    assert count_losses(plan) == expected


def test_rows_beyond_a_weight_are_wanted_and_not_lost(planned: Planned, tmp_path: Path) -> None:
    rows: list[Any] = [*chats(20), *[{"messages": []}] * 4]
    (plan,) = planned(source(write_rows(tmp_path / "a.jsonl", rows)))
    plan.set_fate(np.arange(20), "kept")
    before = count_losses(plan)
    plan.set_fate(np.arange(10), "not sampled")
    plan.beyond_weight[:10] = True
    assert count_losses(plan) == before == (24, 4)
    plan.beyond_weight[:] = False  # as a cap, they would hide half of the loss
    assert count_losses(plan) == (12, 2)


# ---- what is too much


def ledger_of(**sources: Mapping[str, int]) -> dict[str, Any]:
    """Of each source rows kept, or the reason why they are not; all of them asked for."""
    ledger = Ledger()
    lost: dict[str, int] = {}
    for label, counts in sources.items():
        ledger.add_read(label, sum(counts.values()))
        lost[label] = sum(count for what, count in counts.items() if what not in ("kept", "beyond a cap"))
        fates = [what for what, count in counts.items() for _ in range(count)]
        for row, what in enumerate(fates, start=1):
            _add(ledger, label, row, what)
    summary = ledger.to_json()
    for label, entry in summary["sources"].items():
        entry |= {"asked": entry["rows"], "lost": lost[label], "contaminated": 0}
    return summary


def _add(ledger: Ledger, label: str, row: int, what: str) -> None:
    if what in ("kept", "truncated"):
        ledger.add_fate(label, row, "kept" if what == "kept" else "truncated", None, "train")
    elif what == "beyond a cap":
        ledger.add_fate(label, row, "not sampled", what, None)
    else:
        ledger.add_fate(label, row, "fully masked" if what.startswith("fully masked") else "dropped", what, None)


def data_of(max_loss: Any = None, **settings: Any) -> Data:
    return Data(sources=(Source(path="a.jsonl"),), max_loss=max_loss, **settings)


def gate(data: Data, ledger: dict[str, Any]) -> GateError:
    with pytest.raises(GateError) as caught:
        check_loss_budget(data, ledger, PLACE)
    return caught.value


def test_losses_up_to_exactly_max_loss_over_all_sources_are_allowed() -> None:
    ledger = ledger_of(a={"kept": 90, "no answer": 4}, b={"no answer": 2, "kept": 4})
    check_loss_budget(data_of("6%"), ledger, PLACE)
    check_loss_budget(data_of(None), ledger, PLACE)
    error = gate(data_of(0.0599), ledger)
    assert error.what.startswith("6.00% of the rows asked for are lost (6 of 100); `data.max_loss` allows 5.99%")
    assert (error.exit_code, error.where) == (4, str(PLACE))
    assert "corral inspect RECIPE" in str(error.hint)
    check_loss_budget(data_of(0), ledger_of(a={"kept": 3}), PLACE)
    assert "(1 of 4)" in gate(data_of(0), ledger_of(a={"kept": 3, "no answer": 1})).what


def test_the_five_worst_reasons_are_listed_with_source_and_rows() -> None:
    a = {"kept": 3, "truncated": 5, "fully masked: all of it": 4, "empty": 2, "beyond a cap": 50}
    b = {"kept": 1, "no answer": 7, "half a pair": 3, "odd": 1}
    lines = gate(data_of(0.01), ledger_of(a=a, b=b)).what.splitlines()
    assert lines[1:] == [
        "  b: 7 × no answer (rows 2, 3, 4, 5, 6 …)",
        "  a: 5 × truncated",
        "  a: 4 × fully masked: all of it (rows 9, 10, 11, 12)",
        "  b: 3 × half a pair (rows 9, 10, 11)",
        "  a: 2 × empty (rows 13, 14)",
    ]


# ---- nothing where something should be


Check = Callable[..., None]


@pytest.fixture
def check(planned: Planned, tmp_path: Path) -> Check:
    """`check({side: rows}, split, ledger)`: one source whose usable rows are on these sides."""

    def make(sides: Mapping[Side, int], split: Split, ledger: dict[str, Any] | None = None, **settings: Any) -> None:
        (plan,) = planned(source(write_rows(tmp_path / "a.jsonl", chats(sum(sides.values()) or 1))))
        placed = np.repeat([SIDES.index(side) for side in sides], list(sides.values()))
        plan.set_fate(np.arange(len(plan.rows)), "kept" if len(placed) else "dropped")
        plan.side[: len(placed)] = placed
        check_not_empty([plan], data_of(split=split, **settings), ledger or ledger_of(a={"kept": len(placed)}))

    return make


def refusal(check: Check, *what: Any, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        check(*what, **settings)
    assert caught.value.exit_code == 2
    assert caught.value.where == "a.jsonl"
    return caught.value


def test_sides_with_rows_or_without_a_share_pass(check: Check) -> None:
    check({"train": 8, "validation": 1, "test": 1}, Split(validation=0.1, test=0.1))
    check({"train": 8, "test": 1}, Split(validation=0, test=0.1))
    check({"train": 8}, Split(validation=0, test=0))


def test_an_empty_share_error_suggests_a_share_that_fits_with_the_other(check: Check) -> None:
    error = refusal(check, {"train": 8, "test": 2}, Split(validation=0.01, test=0.2))
    assert "the validation side is empty: none of the 10 usable rows" in error.what
    assert str(error.hint).startswith("set data.split.validation to 0.05 or more, set data.split.validation to 0, or")
    error = refusal(check, {"train": 1, "test": 9}, Split(validation=0.01, test=0.96))
    assert str(error.hint) == "set data.split.validation to 0, or add rows", "0.05 and 0.96 are more than there is"


def test_a_side_whose_rows_the_other_side_took_is_refused(check: Check) -> None:
    error = refusal(check, {"train": 1, "test": 9}, Split(validation=3, test=9))
    assert "the validation side is empty: the other side takes all 10 usable rows" in error.what
    assert "lower the numbers in data.split" in str(error.hint)


def test_no_training_rows_error_says_what_took_them(check: Check) -> None:
    split = Split(validation=4, test=4)
    ledger = ledger_of(a={"kept": 8})
    ledger["sources"]["a"]["contaminated"] = 3
    for contamination, also in (("drop", ", and 3 share passages with them"), ("report", "")):
        error = refusal(check, {"validation": 4, "test": 4}, split, ledger, contamination=contamination)
        assert error.what == f"no row is left to train on: all 8 usable rows are held out{also}"


def test_the_worst_reason_decides_the_advice_of_a_nothing_left_error(check: Check) -> None:
    split = Split(validation=0, test=0)

    def said(counts: Mapping[str, int], **settings: Any) -> tuple[list[str], str]:
        error = refusal(check, {}, split, ledger_of(a=counts), **settings)
        return error.what.splitlines(), str(error.hint)

    lines, hint = said({"no answer": 3, "longer than 60 tokens": 2}, max_length=60)
    assert lines[0] == "no row is left to train on: 5 rows read, 5 dropped"
    assert lines[1].startswith("  3 × no answer")
    assert hint.startswith("fix the rows, or set the `format`")
    _, hint = said({"no answer": 1, "longer than 60 tokens": 2}, max_length=60)
    assert hint == 'raise data.max_length (it is 60), or set data.overlong = "truncate"'
    _, hint = said({"fully masked: none of the first 60 tokens is trained": 2}, max_length=60, overlong="truncate")
    assert hint == "raise data.max_length (it is 60)"


def test_a_source_that_loses_all_rows_is_refused_among_others(
    check: Check,
) -> None:
    split = Split(validation=0, test=0)
    ledger = ledger_of(a={"kept": 50}, b={"no `messages`": 3, "empty": 1})
    error = refusal(check, {"train": 50}, split, ledger)
    assert error.what.splitlines() == [
        "all 4 rows of the source 'b' are lost",
        "  3 × no `messages` (rows 1, 2, 3)",
        "  1 × empty (row 4)",
    ]
    assert "format" in str(error.hint)
    check({"train": 50}, split, ledger_of(a={"kept": 50}, b={"beyond a cap": 3, "empty": 1}))
    check({"train": 50}, split, ledger_of(a={"kept": 50}, b={"truncated": 3}))


def test_a_weighted_source_without_training_rows_is_refused_if_another_has_some(
    planned: Planned, tmp_path: Path
) -> None:
    sources = [source(write_rows(tmp_path / f"{n}.jsonl", chats(4, 10 * n)), weight=n + 1) for n in range(2)]
    data = Data(sources=tuple(sources), split=Split(validation=0, test=0))
    a, b = planned(*sources)
    a.set_fate(np.arange(4), "kept")
    a.side[:] = SIDES.index("train")
    b.set_fate(np.arange(4), "duplicate")
    ledger = ledger_of(a={"kept": 4})
    with pytest.raises(DataError, match="the source '1' has the weight 2 and no row to train on"):
        check_not_empty([a, b], data, ledger)
    # Rows that a weight itself took out would have been there.
    b.set_fate(np.arange(4), "not sampled")
    b.beyond_weight[:] = True
    check_not_empty([a, b], data, ledger)
    a.side[:] = b.side[:] = -1
    b.beyond_weight[:] = False
    with pytest.raises(DataError, match="no row is left to train on"):
        check_not_empty([a, b], data, ledger_of(a={"empty": 4}))
