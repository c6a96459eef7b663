"""kill -9 everywhere: at every write of a training, and fifty times at random."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.invariants.work import Case, Instant, Job, assert_same, killed, train

pytestmark = pytest.mark.full

CASE = Case({"method": "full", "evaluate_every": 3}, {"kind": "paged_adamw_8bit"})
Uninterrupted = Callable[[Case], tuple[Job, Path]]


@pytest.mark.parametrize("call", ["rename", "replace", "fsync", "save_file", "append", "backward"])
def test_killed_at_each_call_and_resumed(call: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    job, expected = uninterrupted(CASE)
    kills = 0
    while killed(train(job, tmp_path / str(kills), Instant(call, nth=kills + 1))):
        assert not killed(train(job, tmp_path / str(kills)))
        assert_same(tmp_path / str(kills), expected)
        kills += 1
    assert kills >= 8


def test_killed_fifty_times_at_random(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    job, expected = uninterrupted(CASE)
    began = time.monotonic()
    assert not killed(train(job, tmp_path / "timed"))
    duration = time.monotonic() - began
    generator = random.Random(0)
    kills = rounds = 0
    while kills < 50:
        process = train(job, tmp_path / str(rounds))
        process.join(generator.uniform(0.2, 1.0) * duration)
        process.kill()
        if killed(process):
            kills += 1
        else:
            assert_same(tmp_path / str(rounds), expected)
            rounds += 1
    assert not killed(train(job, tmp_path / str(rounds)))
    assert_same(tmp_path / str(rounds), expected)
    assert rounds < 50
