"""Files and directories that are there whole or not at all.

Everything is written beside its final path, flushed to the disk and renamed, so a reader, a full disk or a `kill -9`
sees the old content or the new, never half of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from corral.errors import CorralError
from corral.storage.disk_errors import find_os_error, is_write_error, storage_error, storage_errors

_TEMPORARY = ".corral-tmp-"
_REPLACED = ".corral-old-"


def cache_root() -> Path:
    """The folder of assets and converted models: `$CORRAL_CACHE`, else `corral` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("CORRAL_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "corral"


def write_atomic(path: Path, content: bytes | str, *, flush: bool = True) -> None:
    """Replaces the file at `path`, creating its parent directories. Text is written as UTF-8.

    Args:
        path: of the file.
        content: the whole of it.
        flush: whether it has reached the disk on return, so that no power cut takes it away.

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
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if flush:
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
            cause = find_os_error(error, temporary)
            if cause is None or not is_write_error(cause, temporary):
                raise
            raise storage_error(cause, final, needed) from error
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


def tree_size(directory: Path) -> int:
    """Bytes of all files below `directory`; 0 if there is none."""
    return sum(path.stat().st_size for path in files_below(directory))


def link_or_copy_tree(source: Path, destination: Path) -> None:
    """Makes `destination` hold the same files as `source`: hard links where the disk allows, else copies.

    Linked files share their bytes: replace them (`write_atomic`), never edit them in place. Symbolic links in `source`
    are followed.

    Raises:
        StorageError: the disk is full, or `destination` cannot be written.
    """
    with storage_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        for path in files_below(source):
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


def files_below(directory: Path) -> Iterator[Path]:
    """All files below `directory`, sorted by path."""
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _temporary_path(final: Path) -> Path:
    return final.with_name(f"{_TEMPORARY}{final.name}.{token_hex(4)}")


def _apply_umask(directory: Path) -> None:
    """Gives files that a library created as private (safetensors) the mode any new file has; linked files keep theirs."""
    # The umask can only be read by setting it; a file that another thread creates in between gets a tighter mode.
    mask = os.umask(0o077)
    os.umask(mask)
    for path in files_below(directory):
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
