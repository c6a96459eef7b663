"""The cache of what was computed from a source's rows.

A `ChunkStore` is a folder of files with a few hundred rows each, named after everything its content depends on. Rows may be
computed in any order, by any number of processes and over several runs. Finished chunks are never computed again, so an
interrupted run continues from them. `hold_cache` keeps the cache within `MAX_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.errors import StorageError
from corral.storage import cache_root, read_write_lock, remove_tree, storage_errors, tree_size

Ints: TypeAlias = NDArray[np.int64]
Arrays: TypeAlias = dict[str, NDArray[Any]]

CHUNK_ROWS = 500
MAX_BYTES = 20 * 10**9
"""The size to which the cache is trimmed; one preparation may need more."""
_OPEN_CHUNKS = 24  # a chunk of tokens is about 1 MB
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def default_folder() -> Path:
    """The cache of prepared rows within corral's cache."""
    return cache_root() / "prepared"


def cache_name(kind: str, *parts: Any) -> str:
    """A folder name made of `kind` and a hash of all `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@contextmanager
def hold_cache(cache: Path) -> Generator[set[Path]]:
    """Hold the cache, so that no other process removes anything from it. Yields an empty set for the caller to fill with
    the folders in it that it uses.

    Afterwards the least recently used folders are removed until the others fit into `MAX_BYTES`, never those in the set.
    If other processes hold the cache too, the last of them does that. Raises StorageError if the cache cannot be written.
    """
    used: set[Path] = set()
    try:
        with read_write_lock(_lock_file(cache), "read"):
            try:
                yield used
            finally:
                with suppress(OSError):  # not all need exist
                    for folder in filter(Path.is_dir, used):
                        os.utime(folder)
    finally:
        with suppress(StorageError):  # held elsewhere or not writable: the trim only saves space
            _trim(cache, used)


def _trim(cache: Path, used: set[Path]) -> None:
    with read_write_lock(_lock_file(cache), "write", wait=False), storage_errors(cache):
        folders = [path for path in cache.iterdir() if path.is_dir()]
        abandoned = {
            path for path in folders if path.name.startswith(".")
        }  # by killed writers: nobody else holds the lock
        for path in (*abandoned, *cache.glob("*/.corral-tmp-*")):
            remove_tree(path)
        size = 0
        kept = (path for path in folders if path not in abandoned)
        for folder in sorted(kept, key=lambda path: (path in used, path.stat().st_mtime_ns), reverse=True):
            size += tree_size(folder)
            if size > MAX_BYTES and folder not in used:
                remove_tree(folder)
                (cache / f".{folder.name}.lock").unlink(missing_ok=True)


def _lock_file(cache: Path) -> Path:
    # Beside the cache, so that it survives clearing: `assets.clear_cache` takes it too.
    return cache.with_name(f"{cache.name}.lock")


@lru_cache
def hash_code(*paths: Path) -> str:
    """sha256 of the source code of modules and packages, so that other code does not reuse what this code computed."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


class DamagedCacheError(Exception):
    """What the cache holds cannot be read. The damaged file is gone; what it held is computed again by the next attempt."""


class ChunkStore:
    """Arrays for some of a source's usable rows, by position: the row's number among them, from 0.

    Each file holds `positions`, ascending, and the arrays saved with them. A damaged file counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []
        self._open: OrderedDict[int, Arrays] = OrderedDict()
        self._positions, self._file, self._offset = (np.empty(0, np.int64) for _ in range(3))
        self.reload()

    def reload(self) -> None:
        """List the files anew, with those that were saved since."""
        self._files, self._open = [], OrderedDict()
        parts: list[Ints] = []
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    positions: Ints = arrays["positions"]
            except _DAMAGE:
                path.unlink(missing_ok=True)
                continue
            self._files.append(path)
            parts.append(positions)
        # Two runs at the same time may have saved a row twice; both are the same.
        self._positions, first = np.unique(np.concatenate([np.empty(0, np.int64), *parts]), return_index=True)
        self._file = np.repeat(np.arange(len(parts)), [len(p) for p in parts])[first]
        self._offset = np.concatenate([np.empty(0, np.int64), *(np.arange(len(p)) for p in parts)])[first]

    def select_missing(self, positions: Ints) -> Ints:
        """Those of the positions that are not stored."""
        return positions[~np.isin(positions, self._positions)]

    def save(self, positions: Ints, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store what was computed for some rows; `reload` makes it available. Raises StorageError."""
        digest = hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16]
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".corral-tmp-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    columns: dict[str, Any] = {"positions": positions, **arrays}
                    np.savez(file, **columns)
                os.replace(name, self.folder / f"{digest}.npz")
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise

    def locate(self, position: int) -> tuple[Arrays, int]:
        """(the arrays of the file that holds this position, its offset among that file's rows)."""
        i = int(np.searchsorted(self._positions, position))
        return self._load(int(self._file[i])), int(self._offset[i])

    def column(self, name: str, positions: Ints) -> NDArray[Any]:
        """One value for each of the positions, from an array that holds one for each row."""
        indices = np.searchsorted(self._positions, positions)
        files, offsets = self._file[indices], self._offset[indices]
        values: NDArray[Any] | None = None
        for number in np.unique(files):
            in_file = files == number
            part = self._load(int(number))[name][offsets[in_file]]
            values = np.zeros((len(positions), *part.shape[1:]), part.dtype) if values is None else values
            values[in_file] = part
        return np.zeros(0, np.int64) if values is None else values

    def _load(self, number: int) -> Arrays:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        try:
            with np.load(self._files[number], allow_pickle=False) as arrays:
                loaded = {name: arrays[name] for name in arrays.files}
        except _DAMAGE as error:
            self._remove_damaged()
            raise DamagedCacheError(str(error)) from error
        self._open[number] = loaded
        if len(self._open) > _OPEN_CHUNKS:
            self._open.popitem(last=False)
        return loaded

    def _remove_damaged(self) -> None:
        for path in self._files:
            try:
                with zipfile.ZipFile(path) as file:  # it has a checksum of each array
                    damaged = file.testzip() is not None
            except _DAMAGE:
                damaged = True
            if damaged:
                path.unlink(missing_ok=True)


def split_positions(positions: Ints) -> list[Ints]:
    """The positions in pieces of `CHUNK_ROWS`."""
    return [positions[at : at + CHUNK_ROWS] for at in range(0, len(positions), CHUNK_ROWS)]
