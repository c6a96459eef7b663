"""Files and directories that are there whole or not at all, and what their bytes hash to.

Everything is written beside its final place, flushed to the disk and renamed, so a reader, a full disk or a `kill -9`
sees the old content or the new, never half of it. This is the one place where an operating-system error about writing
becomes a `StorageError`.

This module knows nothing about runs, models or recipes, nor what the files mean. It writes to the local disk only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

from corral.errors import CorralError, StorageError

_TEMPORARY = ".corral-tmp-"
_REPLACED = ".corral-old-"
_CHUNK = 2**20
_TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")  # torch.save drops the reason
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def cache_root() -> Path:
    """Where assets and converted models are kept: `$CORRAL_CACHE`, else `corral` in `$XDG_CACHE_HOME` or `~/.cache`."""
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
        path: what was being written, or read back.
        needed: bytes the whole of it takes, where that is known.
    """
    try:
        yield
    except CorralError:
        raise
    except OSError as error:
        raise _translate(error, path, needed) from error
    except Exception as error:
        # torch and safetensors report a full disk as RuntimeError or their own class: look for the cause beneath.
        cause = _os_error_beneath(error, path)
        if cause is None:
            raise
        raise _translate(cause, path, needed) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replaces the file at `path`, creating its parent directories. Text is written as UTF-8.

    Raises:
        StorageError: the disk is full, or the place cannot be written; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with storage_errors(path, needed=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync_directory(path.parent)


def remove_temporary_files(directory: Path) -> None:
    """Removes what killed writers left below `directory`, which nobody else may be writing to."""
    for left in sorted(directory.rglob(f"{_TEMPORARY}*"), reverse=True):
        remove_tree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as indented JSON. NaN and infinity are refused: no strict reader would take them back.

    Raises:
        StorageError: as `write_atomic`.
        ValueError: the value holds NaN or infinity.
    """
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_directory(final: Path, *, needed: int | None = None) -> Generator[Path]:
    """Yields an empty directory beside `final`; when the block ends well it becomes `final`, else it is removed.

    A directory that is at `final` already is superseded: it is moved aside, the new one is renamed into place, and only
    then is the old one deleted. If the second rename fails the old one is put back. What a killed writer of the same
    `final` left is cleared first, so two writers of one `final` must hold a lock (`locked`) between them.

    Args:
        final: the directory to create or supersede.
        needed: bytes it will take, where that is known: refused at once when the disk has less.

    Raises:
        StorageError: the disk is full, or the place cannot be written; `final` is as it was.
    """
    with storage_errors(final, needed=needed):
        final.parent.mkdir(parents=True, exist_ok=True)
        _recover(final)
        if needed is not None and shutil.disk_usage(final.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final))
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{final.name}.", dir=final.parent))
    try:
        try:
            yield temporary
        except CorralError:
            raise
        except Exception as error:
            cause = _os_error_beneath(error, temporary)
            if cause is None or not _about_writing(cause, temporary):
                raise
            raise _translate(cause, final, needed) from error
        with storage_errors(final, needed=needed):
            _open_modes(temporary)
            _sync_tree(temporary)
            _rename_into_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Holds an exclusive lock on the file `path` (created if need be), waiting for whoever holds it.

    The system releases it when the process ends, however it ends, so a killed process leaves nothing to clear.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with storage_errors(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def read_write_lock(path: Path, mode: Literal["read", "write"], *, wait: bool = True) -> Generator[None]:
    """Holds the lock file `path` (created if need be) together with other readers, or alone as the writer.

    The system releases it when the process ends. Raises StorageError if the file cannot be written, or if the lock is
    held elsewhere and `wait` is False.
    """
    from filelock import ReadWriteLock

    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # with the usual permissions: other users may share the cache
        lock = ReadWriteLock(path, is_singleton=False)
        (lock.acquire_read if mode == "read" else lock.acquire_write)(blocking=wait)
    try:
        yield
    finally:
        lock.close()


def remove_tree(path: Path) -> None:
    """Deletes a directory or file; nothing happens if there is none.

    Raises:
        StorageError: it cannot be deleted.
    """
    with storage_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_file_hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """`{name: sha256}` of files in `folder`, remembered in the cache by size, number and times of change.

    Raises:
        OSError: a file cannot be read.
    """
    place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:32]
    memory = cache_root() / "identities" / f"{place}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = cast("dict[str, Any]", json.loads(memory.read_text(encoding="utf-8")))
    fresh: dict[str, Any] = {}
    for path in files:
        status = path.stat()
        # The time of writing can be set back (tar, rsync -t); that of the change of the entry cannot.
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        entry = known.get(path.name)
        same = isinstance(entry, list) and cast("list[Any]", entry)[:-1] == stamp
        fresh[path.name] = entry if same else [*stamp, sha256_file(path)]
    if fresh != {name: known.get(name) for name in fresh}:
        with suppress(StorageError):  # it only saves time
            write_json(memory, {**known, **fresh})
    return {name: str(entry[-1]) for name, entry in fresh.items()}


def tree_hashes(directory: Path) -> dict[str, str]:
    """`{relative path with forward slashes: sha256}` of every file below `directory`, in sorted order."""
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in _files(directory)}


def tree_size(directory: Path) -> int:
    """Bytes of all files below `directory`; 0 if there is none."""
    return sum(path.stat().st_size for path in _files(directory))


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Makes `destination` hold the same files as `source`: hard links where the disk allows, else copies.

    Linked files share their bytes: replace them (`write_atomic`), never edit them in place. Links in `source` are
    followed.

    Raises:
        StorageError: the disk is full, or `destination` cannot be written.
    """
    with storage_errors(destination, needed=None):
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


def _umask() -> int:
    # It can only be read by setting it; a thread that creates a file in between gets a tighter mode, not a looser one.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _open_modes(directory: Path) -> None:
    """Gives what was made privately (`mkdtemp`, safetensors) the mode any new file has; linked files keep theirs."""
    mask = _umask()
    os.chmod(directory, 0o777 & ~mask)
    for path in _files(directory):
        if not path.is_symlink() and path.stat().st_nlink == 1:
            os.chmod(path, 0o666 & ~mask)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(directory: Path) -> None:
    for path in _files(directory):
        if not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    for child in [*directory.rglob("*"), directory]:
        if child.is_dir() and not child.is_symlink():
            _sync_directory(child)


def _rename_into_place(temporary: Path, final: Path) -> None:
    replaced: Path | None = None
    if os.path.lexists(final):
        if final.is_symlink() or not final.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it exists and is not a directory", str(final))
        replaced = _replaced_name(final)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    _sync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _replaced_name(final: Path) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}")


def _recover(final: Path) -> None:
    """Undoes what a killed writer left: temporary directories, and the old one between the two renames."""
    ours = re.compile(re.escape(f"{_TEMPORARY}{final.name}.") + r"[^.]{8}")
    for path in final.parent.iterdir():
        if ours.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
    replaced = _replaced_name(final)
    if replaced.is_dir():
        if os.path.lexists(final):
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)


def _about_writing(error: OSError, temporary: Path) -> bool:
    """Whether an error inside a `new_directory` block is about what it writes: a missing input is no storage fault."""
    if error.errno in _NO_ROOM:
        return True
    return isinstance(error.filename, str) and error.filename.startswith(str(temporary))


def _os_error_beneath(error: BaseException, path: Path) -> OSError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    # safetensors (Rust) and torch's zip writer give the system's message as text only.
    text = str(error)
    for number in _NO_ROOM:
        if f"os error {number})" in text or os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    if any(words in text for words in _TORCH_CANNOT_WRITE):
        number = errno.ENOSPC if (_free(path) or 0) < 16 * _CHUNK else errno.EFBIG
        return OSError(number, os.strerror(number))
    return None


def _translate(error: OSError, path: Path, needed: int | None) -> StorageError:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            free = _free(path)
            room = f"{_size(free)} free" if free is not None else "no room"
            need = f", {_size(needed)} needed" if needed else ""
            return StorageError(
                f"the disk is full: {room}{need}",
                where=str(path),
                hint="free some space and give the same command again, or choose another place; nothing half-written was left",
            )
        case errno.EFBIG:
            need = f" of {_size(needed)}" if needed else ""
            return StorageError(
                f"the file{need} is larger than this disk or user may write",
                where=str(path),
                hint="raise the file-size limit (ulimit -f), or choose another disk; nothing half-written was left",
            )
        case errno.EROFS:
            return StorageError(
                "the disk is mounted read-only", where=str(path), hint="choose a place that can be written"
            )
        case errno.EACCES | errno.EPERM:
            return StorageError(
                f"permission denied ({_owner(path)})",
                where=str(path),
                hint="choose a place you may write, or change its permissions",
            )
        case _:
            reason = error.strerror or str(error)
            return StorageError(f"cannot write: {reason}", where=str(path), hint="check that the path is right")


def _existing(path: Path) -> Path | None:
    return next((place for place in (path, *path.parents) if os.path.exists(place)), None)


def _free(path: Path) -> int | None:
    place = _existing(path)
    with suppress(OSError):
        return shutil.disk_usage(place).free if place is not None else None
    return None


def _owner(path: Path) -> str:
    place = _existing(path)
    if place is None:
        return "no such place"
    with suppress(OSError):
        status = place.stat()
        return f"{place} has mode {stat.filemode(status.st_mode)}, owner {status.st_uid}; you are {os.geteuid()}"
    return str(place)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
