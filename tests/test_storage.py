from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.errors import ModelError, StorageError
from corral.storage import (
    cache_root,
    file_lock,
    link_or_copy_tree,
    new_directory,
    remove_tree,
    sha256_file,
    tree_hashes,
    tree_size,
    write_atomic,
    write_json,
)
from tests.conftest import file_size_limit, mount_small_disk, run_python, unprivileged


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mount_small_disk(tmp_path / "small-disk", "256k") as disk:
        yield disk


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


def test_an_error_about_an_input_is_not_called_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "model"):
        (tmp_path / "missing-input").read_text()
    with pytest.raises(ModelError), new_directory(tmp_path / "model"):
        raise ModelError("bad") from OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_more_space_than_the_disk_has_is_refused_at_once_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, new_directory(tmp_path / "model", needed=10**18):
        pytest.fail("the block must not run")
    assert "disk is full" in caught.value.what
    assert "1000000 TB needed" in caught.value.what
    assert "free" in caught.value.what
    assert caught.value.where == str(tmp_path / "model")
    assert caught.value.hint
    assert names(tmp_path) == []


def test_a_full_disk_is_one_error_with_figures_and_leaves_nothing(small_disk: Path) -> None:
    write_atomic(small_disk / "kept", "old")
    with pytest.raises(StorageError, match="disk is full") as caught:
        write_atomic(small_disk / "kept", b"x" * 1_000_000)
    assert "1.00 MB needed" in caught.value.what
    assert (small_disk / "kept").read_text() == "old"
    with pytest.raises(StorageError, match="disk is full"):
        write_folder(small_disk / "model", "x" * 1_000_000)
    assert names(small_disk) == ["kept"]


def test_torch_and_safetensors_on_a_full_disk_are_storage_errors_too(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"w": torch.zeros(1_000_000)}
    with pytest.raises(StorageError, match="disk is full"), new_directory(small_disk / "a") as folder:
        torch.save(weights, folder / "weights.pt")
    with pytest.raises(StorageError, match="disk is full"), new_directory(small_disk / "b") as folder:
        save_file(weights, folder / "weights.safetensors")
    assert names(small_disk) == []


def test_a_read_only_disk_is_named_as_such(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="read-only"):
        write_atomic(small_disk / "file", "x")
    with pytest.raises(StorageError, match="read-only"), new_directory(small_disk / "model"):
        pass


def test_a_file_size_limit_is_an_error_with_a_next_step_and_leaves_nothing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "kept", "old")
    message = "larger than this disk or user may write"
    with file_size_limit(100_000):
        with pytest.raises(StorageError, match=message) as of_file:
            write_atomic(tmp_path / "kept", b"x" * 1_000_000)
        with pytest.raises(StorageError, match=message) as of_directory:
            write_folder(tmp_path / "model", "x" * 1_000_000)
    assert [error.value.where for error in (of_file, of_directory)] == [str(tmp_path / n) for n in ("kept", "model")]
    assert of_file.value.hint
    assert of_directory.value.hint
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_a_folder_without_write_permission_is_one_error_that_names_it(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with unprivileged(closed):
        with pytest.raises(StorageError, match="permission denied") as caught:
            write_atomic(closed / "file", "x")
        with pytest.raises(StorageError, match="permission denied"), new_directory(closed / "model"):
            pass
    assert caught.value.where == str(closed / "file")
    assert caught.value.exit_code == 2
    assert names(closed) == []


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from corral.storage import file_lock
folder = Path(sys.argv[1])
for _ in range(20):
    with file_lock(folder / "lock"):
        number = int((folder / "number").read_text())
        time.sleep(0.001)
        (folder / "number").write_text(str(number + 1))
"""
    (tmp_path / "number").write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "60"


def test_a_lock_that_is_held_is_not_waited_for_on_request_and_a_killed_process_gives_it_back(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from corral.storage import file_lock
with file_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(TimeoutError), file_lock(tmp_path / "lock", wait=False):
        pass
    holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_hashes_are_sha256_by_relative_path_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "b" / "x") == abc
    assert list(tree_hashes(tmp_path).items()) == [("a", hashlib.sha256(b"").hexdigest()), ("b/x", abc)]
    assert tree_size(tmp_path) == 3
    assert tree_size(tmp_path / "missing") == 0


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
