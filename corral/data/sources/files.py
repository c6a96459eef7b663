"""A file of rows, local or remote: its kind by its name, its bytes decompressed.

Compression (gzip, zstd) is detected from the first bytes, whatever the name says.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from corral.errors import DataError
from corral.storage import storage_errors

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""Extensions of the files that can be read."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Extensions that may follow them, and Arrow's names for them."""
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods")
SPREADSHEET_HINT = "save the spreadsheet as CSV UTF-8 (.csv)"
Say: TypeAlias = Callable[[str], None]
"""Reports a message to the user."""

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


class BrokenFileError(Exception):
    """A file cannot be read further. The message says why, and where in the file."""


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
        encoding: of its text, a codec of Python; None for UTF-8, or what a byte order mark says.
        delimiter: between the cells of a table; None for the one that the header shows.
    """

    name: str
    where: str
    kind: str
    compression: str
    open_stored: Callable[[], IO[bytes]]
    digest: str | None = None
    path: Path | None = None
    encoding: str | None = None
    delimiter: str | None = None

    @contextmanager
    def open_unpacked(self) -> Generator[io.BufferedReader[Any]]:
        """Its content, decompressed.

        Raises:
            DataError: it is a Git LFS pointer.
            OSError: it is cut short or damaged.
        """
        with self.open_stored() as raw, _buffered(raw) as stored:
            # A file that is compressed by its name only is damaged: decompressing it fails.
            compression = self._detect_compression(stored.peek(len(_LFS_POINTER))) or COMPRESSIONS.get(self.compression)
            if compression is None:
                yield stored
                return
            import pyarrow

            unpacked: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), compression)
            with io.BufferedReader(unpacked) as stream:
                yield stream

    @contextmanager
    def local_copy(self) -> Generator[Path]:
        """The path of a local file with its content, decompressed: the file itself or a temporary copy.

        Raises:
            DataError: it is a Git LFS pointer.
            StorageError: there is no space for the temporary copy.
            OSError: it is cut short or damaged.
        """
        if self.path is not None:
            with self.open_stored() as raw:
                compression = self._detect_compression(raw.read(len(_LFS_POINTER)))
            if not compression:
                yield self.path
                return
        with self.open_unpacked() as stream, tempfile.NamedTemporaryFile(prefix="corral-") as copy:
            while content := stream.read(2**20):
                with storage_errors(Path(copy.name)):
                    copy.write(content)
                    copy.flush()
            yield Path(copy.name)

    def _detect_compression(self, head: bytes) -> str | None:
        """The compression of content that begins with these bytes. Raises DataError if they are a Git LFS pointer."""
        if head.startswith(_LFS_POINTER):
            raise DataError(
                "the file is a Git LFS pointer, not the file itself",
                where=self.where,
                hint="run `git lfs pull` in the folder that was cloned",
            )
        return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def _buffered(raw: IO[bytes]) -> Generator[io.BufferedReader[Any]]:
    if isinstance(raw, io.BufferedReader):
        yield cast("io.BufferedReader[Any]", raw)
    else:
        with io.BufferedReader(cast("io.RawIOBase", raw)) as stream:
            yield stream


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
        raise DataError(f"{ending!r} is no kind of file that can be read", where=where, hint=kind_hint([name]))
    return kind


def kind_hint(names: list[str]) -> str:
    """The next step where none of these files can be read."""
    if any(name.lower().endswith(SPREADSHEETS) for name in names):
        return SPREADSHEET_HINT
    return f"the kinds are {', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)}"
