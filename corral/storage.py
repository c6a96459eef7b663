"""Files and directories that are there whole or not at all, their hashes, and locks between processes.

Everything is written beside its final path, flushed to the disk and renamed, so a reader, a full disk or a `kill -9`
sees the old content or the new, never half of it. This is the one place where an operating-system error about writing
becomes a `StorageError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, cast

from corral.errors import CorralError, StorageError
from corral.formatting import format_bytes

_TEMPORARY = ".corral-tmp-"
_REPLACED = ".corral-old-"
_CHUNK = 2**20
_TORCH_WRITE_ERRORS = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")  # torch.save drops the reason
_CANNOT_GROW = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def cache_root() -> Path:
    """The folder of assets and converted models: `$CORRAL_CACHE`, else `corral` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("CORRAL_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "corral"


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
        raise _storage_error(error, path, needed) from error
    except Exception as error:
        # torch and safetensors report a full disk as RuntimeError or their own class: look for the cause.
        cause = _find_os_error(error, path)
        if cause is None:
            raise
        raise _storage_error(cause, path, needed) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replaces the file at `path`, creating its parent directories. Text is written as UTF-8.

    Raises:
        StorageError: the disk is full, or the path cannot be written; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path, needed=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_path(path)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON. NaN and infinity are refused: strict readers reject them.

    Raises:
        StorageError: as `write_atomic`.
        ValueError: the value holds NaN or infinity.
    """
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_directory(final: Path, *, needed: int | None = None) -> Generator[Path]:
    """Yields an empty directory beside `final`; when the block ends well it becomes `final`, else it is removed.

    An existing directory at `final` is replaced: it is moved aside, the new one is renamed into place, and only then is
    the old one deleted. If the second rename fails the old one is put back. Leftovers of a killed writer of the same
    `final` are removed first, so two writers of one `final` must hold a lock (`file_lock`) between them.

    Args:
        final: the directory to create or replace.
        needed: bytes it will take, where that is known: refused at once when the disk has less.

    Raises:
        StorageError: the disk is full, or the path cannot be written; `final` is as it was.
    """
    with storage_errors(final, needed=needed):
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final)
        if needed is not None and shutil.disk_usage(final.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        temporary = _temporary_path(final)
        temporary.mkdir()
    try:
        try:
            yield temporary
        except CorralError:
            raise
        except Exception as error:
            cause = _find_os_error(error, temporary)
            if cause is None or not _is_write_error(cause, temporary):
                raise
            raise _storage_error(cause, final, needed) from error
        with storage_errors(final, needed=needed):
            _apply_umask(temporary)
            _flush_tree(temporary)
            _rename_into_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_temporary_files(directory: Path) -> None:
    """Removes what killed writers left below `directory`; nobody else may be writing there."""
    for left in sorted(directory.rglob(f"{_TEMPORARY}*"), reverse=True):
        remove_tree(left) if left.is_dir() else left.unlink(missing_ok=True)


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


def remove_tree(path: Path) -> None:
    """Deletes a directory or file; does nothing if there is none.

    Raises:
        StorageError: it cannot be deleted.
    """
    with storage_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in _files(directory)}


def tree_size(directory: Path) -> int:
    """Bytes of all files below `directory`; 0 if there is none."""
    return sum(path.stat().st_size for path in _files(directory))


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Makes `destination` hold the same files as `source`: hard links where the disk allows, else copies.

    Linked files share their bytes: replace them (`write_atomic`), never edit them in place. Symbolic links in `source`
    are followed.

    Raises:
        StorageError: the disk is full, or `destination` cannot be written.
    """
    with storage_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        for path in _files(source):
            target = destination / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            real = path.resolve()
            try:
                os.link(real, target)
            except OSError as error:
                # Other disk, a file system without links, too many links, or links forbidden to this user.
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES):
                    raise
                shutil.copyfile(real, target)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _temporary_path(final: Path) -> Path:
    return final.with_name(f"{_TEMPORARY}{final.name}.{token_hex(4)}")


def _apply_umask(directory: Path) -> None:
    """Gives files that a library created as private (safetensors) the mode any new file has; linked files keep theirs."""
    # The umask can only be read by setting it; a file that another thread creates in between gets a tighter mode.
    mask = os.umask(0o077)
    os.umask(mask)
    for path in _files(directory):
        if not path.is_symlink() and path.stat().st_nlink == 1:
            os.chmod(path, 0o666 & ~mask)


def _flush(path: Path) -> None:
    """Writes a file's or directory's buffers to the disk. Windows cannot: it opens no directory, and no file read-only."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_tree(directory: Path) -> None:
    paths = [path for path in (*directory.rglob("*"), directory) if not path.is_symlink()]
    for path in sorted(paths, key=Path.is_dir):  # files first
        if path.is_file() or path.is_dir():
            _flush(path)


def _rename_into_place(temporary: Path, final: Path) -> None:
    replaced: Path | None = None
    if os.path.lexists(final):
        if final.is_symlink() or not final.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it exists and is not a directory", str(final))
        replaced = _replaced_path(final)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    _flush(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced_path(final: Path) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}")


def _recover(final: Path) -> None:
    """Removes a killed writer's temporary directories, and puts the old directory back if it died between two renames."""
    temporary = re.compile(re.escape(f"{_TEMPORARY}{final.name}.") + r"[^.]{8}")
    for path in final.parent.iterdir():
        if temporary.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
    replaced = _replaced_path(final)
    if replaced.is_dir():
        if os.path.lexists(final):
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)


def _is_write_error(error: OSError, temporary: Path) -> bool:
    """Whether an error in a `new_directory` block is about writing there: a missing input file is no storage error."""
    if error.errno in _CANNOT_GROW:
        return True
    return isinstance(error.filename, str) and error.filename.startswith(str(temporary))


def _find_os_error(error: BaseException, path: Path) -> OSError | None:
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
        number = errno.ENOSPC if (_free_bytes(path) or 0) < 16 * _CHUNK else errno.EFBIG
        return OSError(number, os.strerror(number))
    return None


def _storage_error(error: OSError, path: Path, needed: int | None) -> StorageError:
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
