"""Windows of a document are one row, and documents of two runs are compared whatever their windows are."""

from __future__ import annotations

import pytest

from corral.errors import InputError
from corral.evaluation.documents import join_windows, keep_common_documents
from corral.evaluation.scorecard import build_scorecard
from corral.evaluation.scoring import Row, VariantRows


def document(name: str, nll: float) -> Row:
    return Row(name, nll, 10, bytes=40, kind="text")


def test_the_windows_of_a_document_are_one_row() -> None:
    windows = [Row("w1", 2.0, 4, bytes=9, kind="text"), Row("w2", 3.0, 5, bytes=8, kind="text")]
    chat = Row("chat", 1.0, 2, "yes", "no", bytes=3)
    rows = join_windows([*windows, chat], {"w1": "d", "w2": "d"})
    assert rows == [chat, Row("d", 5.0, 9, bytes=17, kind="text")]


def test_a_document_whose_window_was_refused_has_no_loss_and_says_why() -> None:
    windows = [Row("w1", 2.0, 4, bytes=9, kind="text"), Row("w2", bytes=8, skipped={"loss": "long"}, kind="text")]
    (row,) = join_windows(windows, {"w1": "d", "w2": "d"})
    assert (row.nll, row.tokens, row.skipped) == (None, None, {"loss": "long"})


def test_documents_that_both_sides_have_are_compared_and_the_others_are_counted() -> None:
    sides = {
        "a": VariantRows([document(f"d{n}", 5.0 + n % 3) for n in range(8)] + [Row("chat", 1.0, 3)]),
        "b": VariantRows([document(f"d{n}", 6.0 + n % 2) for n in range(3, 12)] + [Row("chat", 2.0, 3)]),
    }
    card = build_scorecard(sides, baseline="b")
    assert {(c.metric, c.n) for c in card.comparisons} >= {("loss", 6)}
    assert "only documents that were measured whole on all sides are compared: 5, of 8 in a, 9 in b" in card.cautions
    same = {"a": sides["a"], "c": sides["a"], "without documents": VariantRows([Row("chat", 1.0, 3)])}
    assert keep_common_documents(same) == (same, [])


def test_sides_without_a_common_document_are_refused() -> None:
    sides = {"a": VariantRows([document("x", 1.0)]), "b": VariantRows([document("y", 1.0)])}
    with pytest.raises(InputError, match="no document was measured whole in each of a, b") as refused:
        build_scorecard(sides, baseline="a")
    assert "loss_rows" in str(refused.value.hint)
