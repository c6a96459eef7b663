"""Resumed ≡ uninterrupted, to the last bit: after a stop on request, and after kill -9 at any moment."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import make_training

ROOT = Path(__file__).parent.parent.parent


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-000012"
    return {**load_file(newest / "adapter.safetensors"), **load_file(newest / "optimizer.safetensors")}


def curve(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"], x["eval_loss"], x["lr"], x["grad_norm"], x["tokens"]) for x in lines]


@pytest.fixture(scope="module")
def job(encoded_rows: list[Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a worker process needs to repeat the tiny training."""
    path = tmp_path_factory.mktemp("job") / "rows"
    path.write_bytes(pickle.dumps((encoded_rows, len(tiny_tokenizer))))
    return path


@pytest.fixture(scope="module")
def uninterrupted(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    work(job, folder)
    return folder


def work(job: Path, folder: Path, **run: Any) -> None:
    rows, vocabulary = pickle.loads(job.read_bytes())
    make_training(folder, rows, vocabulary, dropout=0.1).run(**run)


def assert_equal(folder: Path, expected: Path) -> None:
    assert curve(folder) == curve(expected)
    ours, theirs = final(folder), final(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_stopped_on_request_and_resumed(step: int, job: Path, uninterrupted: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        work(job, tmp_path, on_step=lambda m: seen.append(m.step), should_stop=lambda: seen[-1] >= step)
    work(job, tmp_path)
    assert_equal(tmp_path, uninterrupted)


def kill_when(condition: Callable[[Path], bool], job: Path, folder: Path) -> bool:
    """Start the job in a process, kill it once the condition holds; whether it was killed before its end."""
    code = "from tests.invariants.test_resume import work; from pathlib import Path; "
    code += f"work(Path({str(job)!r}), Path({str(folder)!r}))"
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while worker.poll() is None and not condition(folder):
        time.sleep(0.001)
    os.kill(worker.pid, signal.SIGKILL)
    return worker.wait() == -signal.SIGKILL


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    "moment",
    [
        lambda f: lines(f) >= 3,
        lambda f: any((f / "checkpoints").glob(".corral-tmp-*")),
        lambda f: lines(f) >= 8,
    ],
    ids=["before the first checkpoint", "while a checkpoint is written", "between checkpoints"],
)
def test_killed_and_resumed(moment: Callable[[Path], bool], job: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kill_when(moment, job, tmp_path)
    work(job, tmp_path)
    assert_equal(tmp_path, uninterrupted)


@pytest.mark.full
def test_killed_fifty_times_and_resumed(job: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kills = 0
    for round_ in range(50):
        started, wait = time.monotonic(), 3.0 + 0.05 * round_
        kills += kill_when(lambda _, s=started, w=wait: time.monotonic() - s > w, job, tmp_path)
    assert kills > 5
    work(job, tmp_path)
    assert_equal(tmp_path, uninterrupted)
