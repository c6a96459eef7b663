"""Locks between processes, which the system releases when their holder ends."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from corral.storage.disk_errors import storage_errors


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Generator[None]:
    """Holds an exclusive lock on the file `path` (created if need be), waiting for its holder unless `wait` is False.

    The system releases it when the process ends, however it ends, so a killed process leaves nothing to clear.

    Raises:
        StorageError: the file cannot be written.
        TimeoutError: another process holds the lock, and `wait` is False.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, fallback_to_soft=False)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(blocking=wait)
    if not lock.is_locked:
        raise TimeoutError(f"{path} is locked")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def read_write_lock(path: Path, mode: Literal["read", "write"], *, wait: bool = True) -> Generator[None]:
    """Holds the lock file `path` (created if need be) together with other readers, or alone as the writer.

    The system releases it when the process ends. Where it has no shared locks (Windows), readers take turns. Raises
    StorageError if the file cannot be written, or if the lock is held elsewhere and `wait` is False.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
    except ImportError:
        with ExitStack() as stack:
            with storage_errors(path):
                stack.enter_context(file_lock(path, wait=wait))
            yield
        return
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        with storage_errors(path):
            flock(file, (LOCK_SH if mode == "read" else LOCK_EX) | (0 if wait else LOCK_NB))
        yield
