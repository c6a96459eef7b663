"""The cache of what was computed from a source's rows: folders that are named after everything their content depends on.

`hold_cache` keeps the cache within `MAX_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from corral.errors import StorageError
from corral.storage import cache_root, read_write_lock, remove_tree, storage_errors, tree_size

MAX_BYTES = 20 * 10**9
"""The size to which the cache is trimmed; one preparation may need more."""


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
