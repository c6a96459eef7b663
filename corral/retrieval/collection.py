"""Finds the files of documents (files, folders, `s3://`, `asset:`) and reads them one at a time.

A file that cannot be read does not end the reading of the others. A `.jsonl` file holds a document in each row.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral import assets
from corral.data.sources.files import COMPRESSIONS, SourceFile
from corral.data.sources.json_files import read_jsonl
from corral.data.sources.local_files import hash_local_files, make_local_file
from corral.data.sources.raw_row import RawRow
from corral.data.sources.s3_files import find_s3_files, is_s3_error
from corral.errors import DataError
from corral.progress import Progress
from corral.retrieval.documents import Document, DocumentBuilder
from corral.retrieval.readers import READERS
from corral.retrieval.readers.plain_text import add_paragraphs

MAX_FILE = 200_000_000
"""Bytes of a file, except of `.jsonl`, which is read row by row."""
ROWS = ".jsonl"


@dataclass(frozen=True, slots=True)
class RefusedDocument:
    """A file or row that gave no document, and why."""

    name: str
    error: DataError


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file of one document, or of a document in each row.

    Args:
        name: of the document: its path below the folder that was named, or its address where two would be the same.
        digest: changes with its content.
    """

    name: str
    digest: str
    source: SourceFile


def find_document_files(specs: Sequence[str], progress: Progress | None = None) -> list[DocumentFile]:
    """The files of files, folders, `s3://` addresses and `asset:` names, in order, each once.

    `progress` reports the licence of a new asset, and files in a folder that are no documents.

    Raises:
        DataError: a path does not exist, or holds no file that can be read as a document.
        AssetError: the asset cannot be fetched.
        MissingExtraError: S3 needs a package that is not installed.
    """
    progress = progress or Progress()
    sources = list({file.where: file for spec in specs for file in _find(spec, progress)}.values())
    names = Counter(file.name for file in sources)
    hashes = hash_local_files([file.path for file in sources if file.path is not None])
    return [
        DocumentFile(
            file.name if names[file.name] == 1 else file.where,
            hashes[file.where] if file.digest is None else hashlib.sha256(file.digest.encode()).hexdigest(),
            file,
        )
        for file in sources
    ]


def read_documents(
    files: Sequence[DocumentFile], *, columns: Sequence[str] = ("text",), progress: Progress | None = None
) -> Iterator[Document | RefusedDocument]:
    """The documents of files, in order. One without text has no blocks.

    Args:
        files: as `find_document_files` gives them.
        columns: of the rows of `.jsonl` files: the text, each column after the one before; `title` is the title, if given.
        progress: reports how a file is read where that is not plain.

    Raises MissingExtraError if a package for one of the kinds is not installed.
    """
    say = (progress or Progress()).say
    for file in files:
        try:
            if file.source.kind == ROWS:
                for row in read_jsonl(file.source, say):
                    yield _read_row(file, row, columns)
            else:
                yield _read_file(file)
        except DataError as error:
            yield RefusedDocument(file.name, error)
        except Exception as error:
            if not (isinstance(error, OSError) or is_s3_error(error)):
                raise
            what = f"the file is damaged or cut short: {error}"
            yield RefusedDocument(file.name, DataError(what, where=file.source.where, hint="fetch or write it again"))


def _read_file(file: DocumentFile) -> Document:
    where = file.source.where
    with file.source.open_unpacked() as stream:
        content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise DataError(f"the file is larger than {MAX_FILE:,} bytes", where=where, hint="split it into several files")
    return READERS[file.source.kind](content, where).build(file.name, hashlib.sha256(content).hexdigest())


def _read_row(file: DocumentFile, row: RawRow, columns: Sequence[str]) -> Document | RefusedDocument:
    name = f"{file.name}#{row.index}"
    where = f"{file.source.where}, {row.location}"
    if row.value is None:
        hint = "mend the row, or leave it out"
        return RefusedDocument(name, DataError(row.reason or "the row cannot be read", where=where, hint=hint))
    values = {column: row.value.get(column) for column in ("title", *columns)}
    texts = [values[column] for column in columns]
    if missing := next(
        (column for column, text in zip(columns, texts, strict=True) if not isinstance(text, str)), None
    ):
        what = f"the row has no text in the column {missing!r}: its columns are {', '.join(map(repr, row.value))}"
        return RefusedDocument(name, DataError(what, where=where, hint="choose others with --columns"))
    builder = DocumentBuilder()
    title = values["title"]
    builder.title = title if isinstance(title, str) else ""
    for text in texts:
        add_paragraphs(builder, str(text))
    return builder.build(name, hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())


def _find(spec: str, progress: Progress) -> list[SourceFile]:
    if spec.startswith("s3://"):
        return find_s3_files(spec, progress.say, select=_select, kind_of=_require_kind)
    if spec.startswith("asset:"):
        fetched = assets.fetch(spec.removeprefix("asset:"), progress=progress.say)
        if fetched.fetched:
            progress.say(fetched.licence_text)
        names = [path.relative_to(fetched.path).as_posix() for path in fetched.files]
        return _local_files(fetched.path, _select(names, spec, progress.say, lambda _: b""))
    path = Path(spec)
    try:
        if path.is_dir():
            names = [below.relative_to(path).as_posix() for below in path.rglob("*") if below.is_file()]
            return _local_files(path, _select(names, spec, progress.say, lambda _: b""))
        if path.is_file():
            return [make_local_file(path.name, path, *_require_kind(path.name, spec))]
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        what = f"it cannot be read: {error.strerror or error}"
        raise DataError(what, where=spec, hint="check the path and its permissions") from None
    close = difflib.get_close_matches(path.name, near, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "name files, folders, s3://BUCKET/KEY or asset:NAME"
    raise DataError(f"there is no file or folder {path.name!r}", where=spec, hint=hint)


def _local_files(folder: Path, names: list[str]) -> list[SourceFile]:
    return [make_local_file(name, folder / name, *_require_kind(name, str(folder / name))) for name in names]


def _select(names: list[str], where: str, say: Callable[[str], None], _: Callable[[str], bytes]) -> list[str]:
    """The names of documents below a folder, sorted; hidden ones are ignored, others reported. DataError if there are none."""
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    chosen = [name for name in visible if _kind(name) is not None]
    others = [name for name in visible if _kind(name) is None]
    some = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    if not chosen:
        holds = f"it holds {some}" if others else "it is empty"
        raise DataError(f"the folder has no documents: {holds}", where=where, hint=_KINDS_HINT)
    if others:
        say(f"{where}: left out, as they are no documents: {some}")
    return chosen


def _kind(name: str) -> tuple[str, str] | None:
    """(kind, compression) by a file's name; None if it is no document."""
    stem = name.lower()
    compression = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    kind = Path(stem.removesuffix(compression)).suffix
    return (kind, compression) if kind in READERS or kind == ROWS else None


def _require_kind(name: str, where: str) -> tuple[str, str]:
    kind = _kind(name)
    if kind is None:
        ending = Path(name).suffix or "a name without extension"
        raise DataError(f"{ending!r} is no kind of document that can be read", where=where, hint=_KINDS_HINT)
    return kind


_KINDS_HINT = f"the kinds are {', '.join((*READERS, ROWS))}, each also with {' or '.join(COMPRESSIONS)}"
