"""A file of rows, local or remote: its kind by its name, its bytes decompressed.

Compression (gzip, zstd) is detected from the first bytes, whatever the name says. Files that are not what their name says
are recognised by their first bytes and refused.
"""

from __future__ import annotations

import codecs
import gzip
import io
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from corral.errors import DataError
from corral.storage import storage_errors

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Extensions of the files that can be read."""
COMPRESSIONS = (".gz", ".zst")
"""Extensions that may follow them."""
MAX_ROW_BYTES = 64 * 2**20
"""Limit of a line in bytes, and of a row of a list in characters. No row that fits a model's context comes near it, and a
file without line breaks must not fill the memory."""

_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_FOREIGN = {
    b"\x1f\x8b": "packed twice, the second time with gzip",
    b"\x28\xb5\x2f\xfd": "packed twice, the second time with zstd",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or save it as .csv",
    b"PAR1": "a parquet file: its name should end in .parquet",
    b"ARRO": "an Arrow file: save it as parquet",
    b"\x7fELF": "a program, not text",
    b"%PDF": "a PDF, not text",
}
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source.

    Args:
        name: its path below the source's folder, or its own name if the source is this file alone.
        where: the whole path or address, for errors.
        kind: one of KINDS.
        compression: one of COMPRESSIONS, or empty, by its name.
        open_stored: opens its bytes as they are stored. Raises OSError.
        digest: changes with its content, where the address tells it; else a local file's bytes are hashed.
        path: of the file, if it is local.
    """

    name: str
    where: str
    kind: str
    compression: str
    open_stored: Callable[[], IO[bytes]]
    digest: str | None = None
    path: Path | None = None

    @contextmanager
    def open_unpacked(self) -> Generator[io.BufferedReader[Any]]:
        """Its content, decompressed. Raises OSError, EOFError or zlib.error if it is cut short or damaged."""
        with self.open_stored() as raw, _buffered(raw) as stored:
            # A file that is compressed by its name only is damaged: decompressing it fails.
            compression = _detect_compression(stored.peek(4)) or self.compression
            if compression == ".gz":
                with io.BufferedReader(gzip.GzipFile(fileobj=stored, mode="rb")) as stream:
                    yield stream
            elif compression == ".zst":
                import pyarrow

                unpacked: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), "zstd")
                with io.BufferedReader(unpacked) as stream:
                    yield stream
            else:
                yield stored

    @contextmanager
    def local_copy(self) -> Generator[Path]:
        """The path of a local file with its content, decompressed: the file itself or a temporary copy.

        Raises:
            StorageError: there is no space for the temporary copy.
            OSError, EOFError, zlib.error: it is cut short or damaged.
        """
        if self.path is not None:
            with self.open_stored() as raw:
                compression = _detect_compression(raw.read(4))
            if not compression:
                yield self.path
                return
        with self.open_unpacked() as stream, tempfile.NamedTemporaryFile(prefix="corral-") as copy:
            while content := stream.read(2**20):
                with storage_errors(Path(copy.name)):
                    copy.write(content)
                    copy.flush()
            yield Path(copy.name)

    @contextmanager
    def open_text(self) -> Generator[tuple[io.BufferedReader[Any], int]]:
        """Its content, decompressed, after a byte order mark if it has one, and the length of that mark.

        Raises DataError if it is UTF-16 or not text at all.
        """
        with self.open_unpacked() as stream:
            head = stream.peek(4)[:4]
            for magic, what in _FOREIGN.items():
                if head.startswith(magic):
                    raise DataError(f"the file is {what}", where=self.where, hint="rename, unpack or convert it")
            if head.startswith(_WIDE) or b"\0" in head[:4]:
                raise DataError(
                    "the file is not UTF-8 text: it looks like UTF-16 or binary data",
                    where=self.where,
                    hint="save it again as UTF-8; `iconv -f utf-16 -t utf-8` converts it",
                )
            mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
            stream.read(mark)
            yield stream, mark


@contextmanager
def _buffered(raw: IO[bytes]) -> Generator[io.BufferedReader[Any]]:
    if isinstance(raw, io.BufferedReader):
        yield cast("io.BufferedReader[Any]", raw)
    else:
        with io.BufferedReader(cast("io.RawIOBase", raw)) as stream:
            yield stream


def _detect_compression(head: bytes) -> str:
    """The compression of content that begins with these bytes."""
    return next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), "")


def parse_kind(name: str) -> tuple[str, str] | None:
    """(kind, compression) of a file name; None if the kind is unknown."""
    stem = name.lower()
    compression = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    stem = stem.removesuffix(compression)
    kind = next((kind for kind in KINDS if stem.endswith(kind)), None)
    return None if kind is None else (kind, compression)


def require_kind(name: str, where: str) -> tuple[str, str]:
    """`parse_kind`, or DataError if the kind is unknown."""
    kind = parse_kind(name)
    if kind is None:
        ending = name[name.rfind(".") :] if "." in name else "a name without extension"
        raise DataError(
            f"{ending!r} is no kind of file that can be read",
            where=where,
            hint=f"the kinds are {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}",
        )
    return kind


def select_row_files(names: list[str], where: str, say: Callable[[str], None]) -> list[str]:
    """The file names below a folder that hold rows, sorted. Hidden files are ignored; others of unknown kinds are reported.

    Raises DataError if there are none, or of several kinds, as the same rows in two kinds would count twice.
    """
    visible = sorted(name for name in names if not any(part.startswith((".", "_")) for part in name.split("/")))
    kinds = {name: kind[0] for name in visible if (kind := parse_kind(name))}
    others = [name for name in visible if name not in kinds]
    if not kinds:
        content = f"it holds {_list_some(others)}" if others else "it is empty"
        raise DataError(
            f"the folder has no file that can be read: {content}",
            where=where,
            hint=f"the kinds are {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}",
        )
    if len(distinct := sorted(set(kinds.values()))) > 1:
        raise DataError(
            f"the folder holds files of several kinds: {', '.join(distinct)}",
            where=where,
            hint=f"choose some with a glob: {where.rstrip('/')}/*{distinct[0]}",
        )
    if others:
        say(f"{where}: left out, as they hold no rows: {_list_some(others)}")
    return list(kinds)


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
