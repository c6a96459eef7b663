"""What was computed once for the rows of a source, kept under a name that says all it depends on.

`Chunks` is a folder of files with a few hundred rows each. Rows may be computed in any order, by any number of processes
and over several runs: what is there is never computed again, so an interrupted run goes on from its finished chunks, and
the order in which they came about shows nowhere. `in_use` keeps the whole within bounds, and what is at work in it. `each`
spreads work over processes. This module does not know what is computed, nor what rows are.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from corral.errors import CorralError, StorageError
from corral.storage import cache_root, read_write_lock, remove_tree, storage_errors, tree_size

Ints: TypeAlias = NDArray[np.int64]
Arrays: TypeAlias = dict[str, NDArray[Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_ROWS = 500
MAX_BYTES = 20 * 10**9
"""What the cache holds at most, unless one preparation alone needs more."""
_OPEN_CHUNKS = 24  # a chunk of tokens is about 1 MB
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def default_folder() -> Path:
    """Where prepared rows are kept unless a caller says otherwise."""
    return cache_root() / "prepared"


def cache_name(kind: str, *parts: Any) -> str:
    """A folder's name that stands for `kind` and everything in `parts` (JSON values)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@contextmanager
def hold_cache(cache: Path) -> Generator[set[Path]]:
    """Holds the cache while the block runs: no other process removes anything from it. Yields a set, empty, for the folders
    in it that the block uses.

    Afterwards the folders used longest ago are removed until the others fit into `MOST_BYTES`, never those just used; if
    other processes hold the cache, that is left to the last of them. Raises: StorageError.
    """
    used: set[Path] = set()
    try:
        with read_write_lock(_lock_file(cache), "read"):
            try:
                yield used
            finally:
                with suppress(OSError):  # not all need have been made
                    for folder in filter(Path.is_dir, used):
                        os.utime(folder)
    finally:
        with suppress(StorageError):  # others hold it, or it cannot be written: it only saves room
            _trim(cache, used)


def _trim(cache: Path, used: set[Path]) -> None:
    with read_write_lock(_lock_file(cache), "write", wait=False), storage_errors(cache):
        folders = [path for path in cache.iterdir() if path.is_dir()]
        abandoned = {path for path in folders if path.name.startswith(".")}  # by killed writers: the lock is ours
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
    # Beside the cache, so that it outlives clearing: `assets.clear_cache` takes it too.
    return cache.with_name(f"{cache.name}.lock")


@lru_cache
def hash_code(*places: Path) -> str:
    """sha256 of modules and packages: what other code computes is kept apart."""
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


class ChunkStore:
    """Arrays for some rows of a source, by place (the row's number among the source's usable rows, from 0).

    Each file holds `places`, ascending, and whatever arrays were put beside it. A damaged file counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []
        self._open: OrderedDict[int, Arrays] = OrderedDict()
        self._places, self._file, self._offset = (np.empty(0, np.int64) for _ in range(3))
        self.reload()

    def reload(self) -> None:
        """Take in files that were put since."""
        self._files, self._open = [], OrderedDict()
        places: list[Ints] = []
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    found: Ints = arrays["places"]
            except _DAMAGE:
                path.unlink(missing_ok=True)
                continue
            self._files.append(path)
            places.append(found)
        everything = np.concatenate([np.empty(0, np.int64), *places])
        # Two runs at the same time may have put a row twice; both are the same.
        self._places, where = np.unique(everything, return_index=True)
        self._file = np.repeat(np.arange(len(places)), [len(p) for p in places])[where]
        self._offset = np.concatenate([np.empty(0, np.int64), *(np.arange(len(p)) for p in places)])[where]

    def select_missing(self, places: Ints) -> Ints:
        """Those of the places that are not here."""
        return places[~np.isin(places, self._places)]

    def save(self, places: Ints, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what was computed for some rows. Raises: StorageError."""
        digest = hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()[:16]
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".corral-tmp-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    everything: dict[str, Any] = {"places": places, **arrays}
                    np.savez(file, **everything)
                os.replace(name, self.folder / f"{digest}.npz")
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise

    def locate(self, place: int) -> tuple[Arrays, int]:
        """(the arrays of the file that holds this place, its offset among that file's rows)."""
        found = int(np.searchsorted(self._places, place))
        return self._arrays(int(self._file[found])), int(self._offset[found])

    def column(self, name: str, places: Ints) -> NDArray[Any]:
        """One value for each of the places, from an array that holds one for each row."""
        found = np.searchsorted(self._places, places)
        files, offsets = self._file[found], self._offset[found]
        values: NDArray[Any] | None = None
        for number in np.unique(files):
            here = files == number
            part = self._arrays(int(number))[name][offsets[here]]
            values = np.zeros((len(places), *part.shape[1:]), part.dtype) if values is None else values
            values[here] = part
        return np.zeros(0, np.int64) if values is None else values

    def _arrays(self, number: int) -> Arrays:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        with np.load(self._files[number], allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        self._open[number] = loaded
        if len(self._open) > _OPEN_CHUNKS:
            self._open.popitem(last=False)
        return loaded


def split_positions(places: Ints) -> list[Ints]:
    """The places in pieces of `CHUNK_ROWS`."""
    return [places[at : at + CHUNK_ROWS] for at in range(0, len(places), CHUNK_ROWS)]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of each item, as they are done, in any order; with one worker, in this process.

    Workers are forked: they share what the function holds with this process, whatever it is. They must not use torch, nor
    threads of libraries. Where processes cannot be forked safely (macOS, Windows) the work is done here.

    Raises: what the function raises; CorralError (a worker was killed). When the caller stops early, items that have begun
        are finished first.
    """
    if workers <= 1 or sys.platform != "linux":
        yield from map(function, items)
        return
    waiting = iter(items)
    context = multiprocessing.get_context("fork")
    # The tokenizers library warns of a fork after it used threads, unless it is told beforehand not to use them.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(function,))
    try:
        running: set[Future[Any]] = {executor.submit(_call, item) for item in islice(waiting, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {executor.submit(_call, item) for item in islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise CorralError(
            "a worker process was killed while it prepared rows",
            where=f"{workers} worker processes",
            hint="often for want of memory: free some and run again; what is finished is kept",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_function: Callable[[Any], Any] = print


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # The parent hears Ctrl-C and lets chunks that have begun be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
