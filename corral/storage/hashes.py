"""sha256 of files and folders; those of big files are remembered, so that unchanged files are not read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from corral.errors import StorageError
from corral.storage.files import cache_root, files_below, write_json


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_file_hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """`{name: sha256}` of files in `folder`. Hashes are kept in the cache while a file's size, inode and times are the same.

    Raises:
        OSError: a file cannot be read.
    """
    folder_hash = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    cache_file = cache_root() / "identities" / f"{folder_hash}.json"
    cached: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        cached = cast("dict[str, Any]", json.loads(cache_file.read_text(encoding="utf-8")))
    entries: dict[str, Any] = {}
    for path in files:
        status = path.stat()
        # The modification time can be set back (tar, rsync -t); the change time of the inode cannot.
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        entry = cached.get(path.name)
        unchanged = isinstance(entry, list) and cast("list[Any]", entry)[:-1] == stamp
        entries[path.name] = entry if unchanged else [*stamp, sha256_file(path)]
    if entries != {name: cached.get(name) for name in entries}:
        with suppress(StorageError):  # the cache only saves time
            write_json(cache_file, {**cached, **entries})
    return {name: str(entry[-1]) for name, entry in entries.items()}


def tree_hashes(directory: Path) -> dict[str, str]:
    """`{relative path with forward slashes: sha256}` of every file below `directory`, in sorted order."""
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files_below(directory)}
