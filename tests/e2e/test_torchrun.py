"""`torchrun … -m corral run`: two processes make the run that one makes, and one of them tells of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


def torchrun(folder: Path, *args: object) -> subprocess.Popen[str]:
    """`corral run r.toml --out run` in two processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "corral"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += ["run", folder / "r.toml", "--out", folder / "run", *args]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/train-1-sft/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def second_process(started: subprocess.Popen[str]) -> int:
    """The process id of rank 1."""
    for child in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has no second process")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_of_two_processes_is_killed_in_one_and_goes_on_to_what_one_process_makes(
    workspace: Callable[[], Path], finished: Path
) -> None:
    folder = workspace()
    started = torchrun(folder)
    while started.poll() is None and len(curve(folder)) < 4:
        time.sleep(0.01)
    os.kill(second_process(started), signal.SIGKILL)
    _, error = started.communicate()
    assert started.returncode != 0
    # Which of the two it learns first, that the other is gone or that torchrun ends it, is a matter of milliseconds.
    assert re.search("corral: another process of this run has ended|stopped; the same command goes on from here", error)
    done = torchrun(folder, "--json", "--set", "train.0.sharding=full")
    out, error = done.communicate()
    assert done.returncode == 0, error
    assert set(json.loads(out)["stages"]) == {"prepare", "train-1-sft", "merge", "evaluate", "report"}
    assert len(re.findall("rows to train on", error)) <= 1
    ours, theirs = curve(folder), curve(finished)
    assert [line["step"] for line in ours] == list(range(9))
    for line, other in zip(ours[1:], theirs[1:], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    adapters = [load_file(f / "run/train-1-sft/adapter/adapter_model.safetensors") for f in (folder, finished)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        assert (adapters[0][name] - value).norm() < 1e-2 * value.norm(), name
    stages = [json.loads((f / "run/train-1-sft/stage.json").read_text()) for f in (folder, finished)]
    assert stages[0]["fingerprint"] == stages[1]["fingerprint"], "one process takes the stage for its own"


def test_a_fault_that_all_have_is_told_once(workspace: Callable[[], Path]) -> None:
    folder = workspace()
    started = torchrun(folder, "--set", 'train.0.lora.targets=["none_such"]')
    _, error = started.communicate()
    assert started.returncode != 0
    assert error.count("no linear layer called 'none_such'") == 1, error
