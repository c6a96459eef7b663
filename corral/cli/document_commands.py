"""The verb rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.cli.terminal import TerminalProgress
from corral.errors import DataError

if TYPE_CHECKING:
    from corral.retrieval.collection import RefusedDocument
    from corral.retrieval.documents import Document


def rows(args: argparse.Namespace) -> dict[str, Any]:
    """Write question and answer rows from the headings and FAQ pairs of documents."""
    from corral.retrieval.collection import find_document_files, read_documents
    from corral.retrieval.question_rows import EXAMPLES_PER_REASON, RowLedger, question_rows
    from corral.storage import write_atomic

    ledger, progress = RowLedger(), TerminalProgress()

    def read() -> Iterator[Document | RefusedDocument]:
        for number, file in enumerate(files):
            progress.update(number)
            yield from read_documents([file], columns=args.columns, progress=progress)

    try:
        files = find_document_files(args.documents, progress)
        progress.start("Reading documents", len(files))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in question_rows(read(), ledger)]
    finally:
        progress.stop()
    for reason, count in ledger.skipped.most_common():
        more = " …" if count > EXAMPLES_PER_REASON else ""
        print(f"no row  {count} × {reason}: {'; '.join(ledger.examples[reason])}{more}")
    if not lines:
        raise DataError(
            f"there is no question in {ledger.documents} documents",
            where=", ".join(args.documents),
            hint="a heading that ends with a question mark, or a pair of `Q:` and `A:`, gives a row",
        )
    write_atomic(Path(args.out), "".join(lines))
    print(f"wrote   {args.out}: {ledger.rows} rows from {ledger.documents} documents")
    return {
        "rows": ledger.rows,
        "documents": ledger.documents,
        "skipped": dict(ledger.skipped),
        "out": str(args.out),
    }
