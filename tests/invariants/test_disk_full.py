"""A disk that fills while training writes: one clear error, nothing lost, and the same result once there is space.

The system itself refuses to write: through a limit on file sizes, which any user may set, and on a small disk where one may
be mounted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from corral.errors import StorageError
from tests.conftest import file_size_limit, mount_small_disk
from tests.invariants.work import Case, Job, assert_same

CASE = Case({"checkpoint_every": 5}, {"kind": "adamw_8bit"}, {"rank": 64})


Uninterrupted = Callable[[Case], tuple[Job, Path]]


def assert_intact(folder: Path, step: int) -> None:
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert (folder / "best" / "weights.safetensors").stat().st_size > 30_000
    assert not list(folder.rglob(".corral-*"))


# The step after which the limit is set, the limit, and the path that then cannot be written.
LIMITS: dict[str, tuple[int, Callable[[Path], int], str]] = {
    "a checkpoint": (9, lambda _: 40_000, "checkpoints/step-000010"),
    "the best weights": (7, lambda _: 30_000, "best"),
    "metrics": (6, lambda folder: (folder / "metrics.jsonl").stat().st_size + 10, "metrics.jsonl"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_that_exceeds_a_limit(name: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    job, expected = uninterrupted(CASE)
    after, largest, path = LIMITS[name]
    with ExitStack() as stack:

        def limit(step: int) -> None:
            if step == after:
                stack.enter_context(file_size_limit(largest(tmp_path)))

        with pytest.raises(StorageError, match="larger than this disk or user may write") as full:
            job.run(tmp_path, on_step=lambda m: limit(m.step))
    assert full.value.where == str(tmp_path / path)
    assert "ulimit -f" in str(full.value.hint)
    assert_intact(tmp_path, 5)
    job.run(tmp_path)
    assert_same(tmp_path, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mount_small_disk(tmp_path / "small-disk", "2m") as disk:
        yield disk


@pytest.mark.parametrize(("after", "path"), [(9, "checkpoints/step-000010"), (7, "best"), (6, "metrics.jsonl")])
def test_a_disk_that_is_full(after: int, path: str, uninterrupted: Uninterrupted, small_disk: Path) -> None:
    job, expected = uninterrupted(CASE)
    ballast = small_disk / "ballast"

    def fill(step: int) -> None:
        if step == after:
            with ballast.open("wb", buffering=0) as file:
                # With no space left the next line of metrics fails; with a few pages left, the next larger file.
                free = os.statvfs(small_disk)
                file.write(b"x" * free.f_frsize * (free.f_bavail - (0 if path == "metrics.jsonl" else 8)))

    folder = small_disk / "training"
    with pytest.raises(StorageError, match="the disk is full") as full:
        # The last page of the metrics file has space for a few more lines.
        job.run(folder, on_step=lambda m: fill(m.step))
    assert "free some space" in str(full.value.hint)
    if path.startswith("checkpoints"):
        assert full.value.where == str(folder / path)
        assert "resumes from step 5" in str(full.value.hint)
        assert "needed" in full.value.what
    assert_intact(folder, 5)
    ballast.unlink()
    job.run(folder)
    assert_same(folder, expected)
