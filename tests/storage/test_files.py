"""Files and directories are there whole or not at all, also after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from corral.errors import StorageError
from corral.storage import (
    cache_root,
    link_or_copy_tree,
    new_directory,
    remove_tree,
    tree_hashes,
    write_atomic,
    write_json,
)
from tests.conftest import run_python


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_holds_the_content_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "Grüße")
    write_atomic(path, "Grüße, again")
    assert path.read_bytes() == "Grüße, again".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["b.txt"]


def test_written_files_and_directories_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
        with new_directory(tmp_path / "folder") as folder:
            private = os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600)
            os.close(private)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("file", "folder", "folder/private")]
    assert modes == [0o640, 0o750, 0o640]


def test_json_is_strict_and_refused_values_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"loss": 1.5, "name": "é"})
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text("utf-8")) == {"loss": 1.5, "name": "é"}
    assert "é" in path.read_text("utf-8")


def write_folder(final: Path, content: str) -> None:
    with new_directory(final) as folder:
        (folder / "weights").write_text(content)


def test_a_new_directory_replaces_the_old_one_whole_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "run" / "model"
    with new_directory(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
        assert not final.exists()
        assert folder.parent == final.parent
    assert (final / "sub" / "weights").read_text() == "w"
    write_folder(final, "new")
    assert names(final) == ["weights"]
    assert names(final.parent) == ["model"]


def test_a_new_directory_that_fails_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    final = tmp_path / "model"
    write_folder(final, "old")
    with pytest.raises(KeyboardInterrupt), new_directory(final) as folder:  # noqa: PT012 - the block is what is tested
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (final / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_the_old_directory_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "model"
    write_folder(final, "old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if source.name.startswith(".corral-tmp-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"), new_directory(final):
        pass
    assert (final / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_file_with_the_name_of_a_new_directory_is_not_deleted(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.write_text("mine")
    with pytest.raises(StorageError, match="not a directory") as caught, new_directory(final):
        pass
    assert str(final) in str(caught.value)
    assert final.read_text() == "mine"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("renames_before_the_kill", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_whole_directory_and_the_next_writer_clears_up(
    tmp_path: Path, renames_before_the_kill: int
) -> None:
    final = tmp_path / "model"
    write_folder(final, "old")
    code = """
import os, signal, sys
from pathlib import Path
from corral.storage import new_directory
left, rename = int(sys.argv[2]), os.rename
def counted(a, b):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(a, b)
os.rename = counted
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("new")
if left == 0:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python("-c", code, final, renames_before_the_kill)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # One more writer, which fails: afterwards whatever was whole last is in place, and nothing else is left.
    with pytest.raises(KeyboardInterrupt), new_directory(final):
        raise KeyboardInterrupt
    expected = "new" if renames_before_the_kill == 2 else "old"
    assert (final / "weights").read_text() == expected
    assert names(tmp_path) == ["model"]


def test_removing_leftovers_spares_directories_of_other_names(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a.b") as other:
        with new_directory(tmp_path / "a"):
            pass
        assert other.is_dir()
    assert names(tmp_path) == ["a", "a.b"]


def test_a_linked_tree_has_the_same_files_and_shares_their_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_text("w")
    (source / "link").symlink_to("sub/weights")
    link_or_copy_tree(source, tmp_path / "target")
    assert tree_hashes(tmp_path / "target") == tree_hashes(source)
    assert (tmp_path / "target" / "sub" / "weights").stat().st_ino == (source / "sub" / "weights").stat().st_ino
    assert not (tmp_path / "target" / "link").is_symlink()
    write_atomic(tmp_path / "target" / "sub" / "weights", "replaced")
    assert (source / "sub" / "weights").read_text() == "w"


def test_a_tree_is_copied_where_links_cannot_reach(tmp_path: Path, small_disk: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_text("w")
    assert small_disk.stat().st_dev != source.stat().st_dev
    link_or_copy_tree(source, small_disk / "target")
    assert tree_hashes(small_disk / "target") == tree_hashes(source)


def test_removing_takes_trees_files_and_links_but_not_what_a_link_names(tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "missing"):
        remove_tree(tmp_path / name)
    assert names(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ".cache/corral"),
        ({"XDG_CACHE_HOME": "relative"}, ".cache/corral"),
        ({"XDG_CACHE_HOME": "{home}/xdg"}, "xdg/corral"),
        ({"XDG_CACHE_HOME": "{home}/xdg", "CORRAL_CACHE": "~/own"}, "own"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CORRAL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in (variables | {"HOME": "{home}"}).items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert cache_root() == tmp_path / expected
