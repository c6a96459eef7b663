"""Rows of documents: the windows of one are joined, and of two runs the documents that both measured whole are compared.

Windows depend on the tokenizer and on `data.max_length`, documents do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from corral.errors import InputError
from corral.evaluation.scoring import Row, VariantRows


def join_windows(rows: Sequence[Row], documents: Mapping[str, str]) -> list[Row]:
    """The rows, with one row for each document in place of those of its windows.

    A document without the loss of one of its windows has no loss, but the reason why.

    Args:
        rows: of conversations and of windows.
        documents: by the id of a window, that of its document.
    """
    joined: list[Row] = []
    by_document: dict[str, list[Row]] = {}
    for row in rows:
        if row.id in documents:
            by_document.setdefault(documents[row.id], []).append(row)
        else:
            joined.append(row)
    for document, windows in by_document.items():
        skipped = {source: reason for window in windows for source, reason in window.skipped.items()}
        whole = Row(document, bytes=sum(w.bytes or 0 for w in windows), skipped=skipped, kind="text")
        if not skipped:
            whole = replace(whole, nll=sum(w.nll or 0.0 for w in windows), tokens=sum(w.tokens or 0 for w in windows))
        joined.append(whole)
    return joined


def keep_common_documents(variants: Mapping[str, VariantRows]) -> tuple[Mapping[str, VariantRows], list[str]]:
    """(the variants with the documents that all of them have, sentences about the others).

    Variants without documents stay as they are.

    Raises InputError if they have documents, and none is the same.
    """
    ids = {name: {row.id for row in v.rows if row.kind == "text"} for name, v in variants.items() if v.has_texts}
    common = set[str].intersection(*ids.values()) if ids else set[str]()
    if all(own == common for own in ids.values()):
        return variants, []
    if not common:
        raise InputError(
            f"no document was measured whole in each of {', '.join(ids)}",
            hint="evaluate all on the same test documents, with `evaluate.loss_rows` above the number of their windows",
        )
    kept = {
        name: replace(v, rows=[row for row in v.rows if row.kind != "text" or row.id in common])
        for name, v in variants.items()
    }
    counts = ", ".join(f"{len(own)} in {name}" for name, own in ids.items())
    return kept, [f"only documents that were measured whole on all sides are compared: {len(common)}, of {counts}"]
