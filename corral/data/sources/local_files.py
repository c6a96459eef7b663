"""Finds local files: one file, those in a folder and its subfolders, or those that match a glob, sorted by name."""

from __future__ import annotations

import difflib
import glob
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from corral.data.sources.files import Say, SourceFile, parse_kind, require_kind
from corral.data.sources.folders import select_row_files
from corral.errors import DataError
from corral.storage import cached_file_hashes, sha256_file

_CLOCK_TICK = 2 * 10**9  # nanoseconds: the coarsest disks tell times of change to two seconds


def find_local_files(spec: str, say: Say) -> list[SourceFile]:
    """The files of a path. `say` reports files in a folder that are left out, and which of several files are empty.

    Raises DataError if there are none, all are empty, or one is of an unknown kind.
    """
    path = Path(spec)
    with _read_errors(path):
        if path.is_dir():
            names = [below.relative_to(path).as_posix() for below in path.rglob("*") if below.is_file()]
            chosen = select_row_files(names, spec, say, lambda name: (path / name).read_bytes())
            matches = [(name, path / name) for name in chosen]
        elif path.is_file():
            matches = [(path.name, path)]
        elif glob.has_magic(spec):
            matches = _match_glob(path)
        else:
            raise DataError(f"there is no file {path.name!r}", where=spec, hint=_suggest_name(path))
        for name, _ in matches:
            _check_name(name, spec)
        files = [make_local_file(name, file, *require_kind(file.name, str(file))) for name, file in matches]
        sizes = [match.stat().st_size for _, match in matches]
    if not any(sizes):
        what = "the file is empty" if len(files) == 1 else f"all {len(files)} files are empty"
        raise DataError(what, where=files[0].where, hint="write rows into it, or leave it out")
    for file, size in zip(files, sizes, strict=True):
        if not size:
            say(f"{file.where}: the file is empty")
    return [file for file, size in zip(files, sizes, strict=True) if size]


def open_local_file(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises DataError."""
    with _read_errors(path):
        return path.open("rb")


def make_local_file(name: str, path: Path, kind: str, compression: str = "") -> SourceFile:
    """A local file whose kind is known."""
    return SourceFile(name, str(path), kind, compression, partial(open_local_file, path), path=path)


def hash_local_files(paths: Sequence[Path]) -> dict[str, str]:
    """`{path: sha256}` of files, a folder at a time: the hashes kept of a folder are one file. Raises DataError."""
    hashes: dict[str, str] = {}
    known: dict[Path, list[Path]] = {}
    now = time.time_ns()
    for path in paths:
        with _read_errors(path):
            # A file changed just now may change again within the same tick of its disk's clock: do not remember its hash.
            if now - path.stat().st_mtime_ns < _CLOCK_TICK:
                hashes[str(path)] = sha256_file(path)
            else:
                known.setdefault(path.parent, []).append(path)
    for folder, files in known.items():
        with _read_errors(folder):
            by_name = cached_file_hashes(folder, files)
        hashes |= {str(file): by_name[file.name] for file in files}
    return hashes


def _match_glob(path: Path) -> list[tuple[str, Path]]:
    """(name below the part without wildcards, file) of each match of a glob. Raises DataError if nothing matches."""
    folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    matches = sorted({Path(match) for match in glob.glob(str(path), recursive=True)})
    files = [match for match in matches if match.is_file()]
    if not files:
        inside = _list_names(folder) if folder.is_dir() else f"; there is no folder {str(folder)!r}"
        raise DataError("no file matches this glob", where=str(path), hint=f"check `path` in data.sources{inside}")
    return [(file.relative_to(folder).as_posix(), file) for file in files]


@contextmanager
def _read_errors(path: Path) -> Generator[None]:
    """Turns an OSError into a DataError about its file, or about `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(path)
        what, hint = f"the file cannot be read: {error.strerror or error}", "check the path and its permissions"
        raise DataError(what, where=where, hint=hint) from None


def _check_name(name: str, where: str) -> None:
    """Raises DataError if a file's name is not UTF-8, as names from archives of other systems may be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"a file's name is not UTF-8 text: {name!a}", where=where, hint="rename it") from None


def _suggest_name(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either"
    close = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir() if p.is_file()], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"check `path` in data.sources{_list_names(folder)}"


def _list_names(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if parse_kind(p.name))
    return f"; there are {', '.join(names[:5])}" + (" …" if len(names) > 5 else "") if names else ""
