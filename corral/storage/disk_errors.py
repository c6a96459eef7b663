"""The one place where an operating-system error about writing becomes a `StorageError`: a full disk, a missing permission."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from corral.errors import CorralError, StorageError
from corral.formatting import format_bytes

_TORCH_WRITE_ERRORS = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")  # torch.save drops the reason
_CANNOT_GROW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def storage_errors(path: Path, *, needed: int | None = None) -> Generator[None]:
    """Turns any `OSError` raised inside into a `StorageError` about `path`.

    Args:
        path: what is being written or read.
        needed: bytes the whole of it takes, where that is known.
    """
    try:
        yield
    except CorralError:
        raise
    except OSError as error:
        raise storage_error(error, path, needed) from error
    except Exception as error:
        # torch and safetensors report a full disk as RuntimeError or their own class: look for the cause.
        cause = find_os_error(error, path)
        if cause is None:
            raise
        raise storage_error(cause, path, needed) from error


def is_write_error(error: OSError, temporary: Path) -> bool:
    """Whether an error in a `new_directory` block is about writing there: a missing input file is no storage error."""
    if error.errno in _CANNOT_GROW:
        return True
    return isinstance(error.filename, str) and error.filename.startswith(str(temporary))


def find_os_error(error: BaseException, path: Path) -> OSError | None:
    """The OSError among an error's causes, or the one that a library's message stands for."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    # safetensors (Rust) and torch's zip writer give the system's message as text only.
    text = str(error)
    for number in _CANNOT_GROW:
        if f"os error {number})" in text or os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    if any(message in text for message in _TORCH_WRITE_ERRORS):
        number = errno.ENOSPC if (_free_bytes(path) or 0) < 2**24 else errno.EFBIG
        return OSError(number, os.strerror(number))
    return None


def storage_error(error: OSError, path: Path, needed: int | None) -> StorageError:
    """The error that says what is wrong at `path`, and what to do; `needed` as in `storage_errors`."""
    size = format_bytes(needed) if needed else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            free = _free_bytes(path)
            what = f"the disk is full: {format_bytes(free)} free" if free is not None else "the disk is full"
            what += f", {size} needed" if size else ""
            hint = "free some space and run the same command again, or choose another folder; nothing half-written was left"
        case errno.EFBIG:
            what = f"the file{f' of {size}' if size else ''} is larger than this disk or user may write"
            hint = "raise the file-size limit (ulimit -f), or choose another disk; nothing half-written was left"
        case errno.EROFS:
            what, hint = "the disk is mounted read-only", "choose a folder that can be written"
        case errno.EACCES | errno.EPERM:
            what = f"permission denied ({_describe_owner(path)})"
            hint = "choose a folder you may write to, or change its permissions"
        case _:
            what, hint = f"cannot write: {error.strerror or error}", "check that the path is right"
    return StorageError(what, where=str(path), hint=hint)


def _nearest_existing(path: Path) -> Path | None:
    return next((parent for parent in (path, *path.parents) if os.path.exists(parent)), None)


def _free_bytes(path: Path) -> int | None:
    existing = _nearest_existing(path)
    with suppress(OSError):
        return shutil.disk_usage(existing).free if existing is not None else None
    return None


def _describe_owner(path: Path) -> str:
    existing = _nearest_existing(path)
    if existing is None:
        return "no such folder"
    with suppress(OSError):
        status = existing.stat()
        user = f"; you are {os.geteuid()}" if hasattr(os, "geteuid") else ""
        return f"{existing} has mode {stat.filemode(status.st_mode)}, owner {status.st_uid}{user}"
    return str(existing)
