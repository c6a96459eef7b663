"""A full, read-only or closed disk is one error that says what to do, and leaves nothing half-written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from corral.errors import ModelError, StorageError
from corral.storage import new_directory, write_atomic
from tests.conftest import file_size_limit, unprivileged
from tests.storage.test_files import names, write_folder


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
