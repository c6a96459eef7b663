"""A disk that fills while training writes: one clear error, nothing lost, and after room is made the same result.

The system itself refuses to write: by a limit on the size of files, which any user may set, and by a small disk where one may
be mounted.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corral.errors import StorageError
from tests.invariants.work import Case, Job, assert_same

CASE = Case({"checkpoint_every": 5}, {"kind": "adamw_8bit"}, {"rank": 64})


@pytest.fixture(scope="module")
def uninterrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    job = Job(rows, CASE)
    folder = tmp_path_factory.mktemp("whole")
    job.run(folder)
    return job, folder


def check_what_stands(folder: Path, step: int) -> None:
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert (folder / "best" / "weights.safetensors").stat().st_size > 30_000
    assert not list(folder.rglob(".corral-*"))


# Which step the limit comes after, how large a file may then be, and what cannot be written.
LIMITS: dict[str, tuple[int, Callable[[Path], int], str]] = {
    "a checkpoint": (9, lambda _: 40_000, "checkpoints/step-000010"),
    "the best weights": (7, lambda _: 30_000, "best"),
    "metrics": (6, lambda folder: (folder / "metrics.jsonl").stat().st_size + 10, "metrics.jsonl"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_that_may_not_grow(name: str, uninterrupted: tuple[Job, Path], tmp_path: Path) -> None:
    job, expected = uninterrupted
    after, most, place = LIMITS[name]
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step: int) -> None:
        if step == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most(tmp_path), hard))

    try:
        with pytest.raises(StorageError, match="larger than this disk or user may write") as full:
            job.run(tmp_path, on_step=lambda m: limit(m.step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert full.value.where == str(tmp_path / place)
    assert "ulimit -f" in str(full.value.hint)
    check_what_stands(tmp_path, 5)
    job.run(tmp_path)
    assert_same(tmp_path, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk; limits on files are tested all the same")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(("after", "place"), [(9, "checkpoints/step-000010"), (7, "best"), (6, "metrics.jsonl")])
def test_a_disk_that_is_full(after: int, place: str, uninterrupted: tuple[Job, Path], small_disk: Path) -> None:
    job, expected = uninterrupted
    ballast = small_disk / "ballast"

    def fill(step: int) -> None:
        if step == after:
            with ballast.open("wb", buffering=0) as file:
                # A disk with nothing left stops at the next line of metrics; one with a few pages at what is larger.
                free = os.statvfs(small_disk)
                file.write(b"x" * free.f_frsize * (free.f_bavail - (0 if place == "metrics.jsonl" else 8)))

    folder = small_disk / "training"
    with pytest.raises(StorageError, match="the disk is full") as full:
        # What is left of the last page of metrics takes a few lines more.
        job.run(folder, on_step=lambda m: fill(m.step))
    assert "free some space" in str(full.value.hint)
    if place.startswith("checkpoints"):
        assert full.value.where == str(folder / place)
        assert "resumes from step 5" in str(full.value.hint)
        assert "needed" in full.value.what
    check_what_stands(folder, 5)
    ballast.unlink()
    job.run(folder)
    assert_same(folder, expected)
