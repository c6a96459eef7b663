"""A file of rows, wherever it lies: its kind by its name, its bytes unpacked, and what the first of them give away.

Knows three things about content only: gzip, zstd, and the first bytes of files that are not what their name says. Whether a
file is packed is seen from its first bytes, whatever its name says. It does not know what a row is, nor how the kinds are
read.
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
"""The kinds of files that can be read."""
COMPRESSIONS = (".gz", ".zst")
"""What may stand after them."""
MAX_ROW_BYTES = 64 * 2**20
"""Bytes of the longest line, and characters of the longest row of a list: no row that fits a model's context comes near it,
and a file without line breaks must not fill the memory."""

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
        name: below the source's folder, or its own name if the source is this file alone.
        where: the whole path or address, for errors.
        kind: one of KINDS.
        packed: one of PACKED, or empty, by its name.
        start: opens its bytes as they lie there. Raises: OSError.
        digest: what its content depends on. Raises: OSError.
        path: of the file, if it lies on this machine.
    """

    name: str
    where: str
    kind: str
    compression: str
    open_stored: Callable[[], IO[bytes]]
    digest: Callable[[], str]
    path: Path | None = None

    @contextmanager
    def open_unpacked(self) -> Generator[io.BufferedReader[Any]]:
        """Its content, unpacked. Raises: OSError, EOFError and zlib.error where it is cut short or damaged."""
        with self.open_stored() as raw, _buffered(raw) as lying:
            # What is packed by its name alone is damaged.
            packed = _packed(lying.peek(4)) or self.compression
            if packed == ".gz":
                with io.BufferedReader(gzip.GzipFile(fileobj=lying, mode="rb")) as stream:
                    yield stream
            elif packed == ".zst":
                import pyarrow

                unpacked: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(lying, mode="r"), "zstd")
                with io.BufferedReader(unpacked) as stream:
                    yield stream
            else:
                yield lying

    @contextmanager
    def local_copy(self) -> Generator[Path]:
        """A file on this machine with its content, unpacked: a temporary one, unless it is one.

        Raises:
            StorageError: there is no room for the temporary one.
            OSError, EOFError, zlib.error: it is cut short or damaged.
        """
        if self.path is not None:
            with self.open_stored() as raw:
                packed = _packed(raw.read(4))
            if not packed:
                yield self.path
                return
        with self.open_unpacked() as stream, tempfile.NamedTemporaryFile(prefix="corral-") as whole:
            while content := stream.read(2**20):
                with storage_errors(Path(whole.name)):
                    whole.write(content)
                    whole.flush()
            yield Path(whole.name)

    @contextmanager
    def open_text(self) -> Generator[tuple[io.BufferedReader[Any], int]]:
        """Its content, unpacked, behind a byte order mark, and the number of bytes before.

        Raises:
            DataError: it is UTF-16, or no text at all.
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


def _packed(head: bytes) -> str:
    """How content that begins so is packed."""
    return next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), "")


def parse_kind(name: str) -> tuple[str, str] | None:
    """(kind, packing) of a file name; None if it is of no kind that can be read."""
    stem = name.lower()
    packed = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    stem = stem.removesuffix(packed)
    kind = next((kind for kind in KINDS if stem.endswith(kind)), None)
    return None if kind is None else (kind, packed)


def require_kind(name: str, where: str) -> tuple[str, str]:
    """`kind_of`, or the error. Raises: DataError."""
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
    """Those of the names below a folder that are its rows, in order. Hidden files, and files of no known kind, are not.

    Raises:
        DataError: there are none, or of several kinds: the same rows in two forms would count twice.
    """
    seen = sorted(name for name in names if not any(part.startswith((".", "_")) for part in name.split("/")))
    kinds = {name: kind[0] for name in seen if (kind := parse_kind(name))}
    others = [name for name in seen if name not in kinds]
    if not kinds:
        holds = f"it holds {_some(others)}" if others else "it is empty"
        raise DataError(
            f"the folder has no file that can be read: {holds}",
            where=where,
            hint=f"the kinds are {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}",
        )
    if len(found := sorted(set(kinds.values()))) > 1:
        raise DataError(
            f"the folder holds files of several kinds: {', '.join(found)}",
            where=where,
            hint=f"name those that are meant by a glob: {where.rstrip('/')}/*{found[0]}",
        )
    if others:
        say(f"{where}: left out, as no rows: {_some(others)}")
    return list(kinds)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
