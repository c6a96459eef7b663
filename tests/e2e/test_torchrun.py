"""`torchrun … -m corral run`: two processes give the run that one process gives, and only one reports.

Tests that are not about the launcher fork the two processes themselves.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from corral.run.promotion import read_promotion
from tests.conftest import write_rows
from tests.e2e.test_alignment import write_preferences, write_recipe
from tests.forked import rank_environments, start_corral
from tests.training.tiny import read_metrics


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


def run_ranks(folder: Path, *args: object) -> tuple[list[int], str]:
    """`corral run r.toml --out run` in two processes as torchrun would start them. Returns: their exit codes, their errors."""
    command = ("run", folder / "r.toml", "--out", folder / "run", *args)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, which outlives rank 0
    settings = {"MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [start_corral(*command, cwd=folder, env=environment | settings) for environment in rank_environments()]
    done = [process.finish() for process in started]
    return [each.returncode for each in done], "".join(each.stderr for each in done)


def rank_1_pid(launcher: subprocess.Popen[str]) -> int:
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has no process of rank 1")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_after_one_of_two_processes_is_killed_the_run_resumes_to_the_result_of_one_process(
    workspace: Path, finished_run: Path
) -> None:
    run, stage = workspace / "run", workspace / "run/train-1-sft"
    started = torchrun(workspace)
    while started.poll() is None and not ((stage / "metrics.jsonl").exists() and len(read_metrics(stage)) >= 4):
        time.sleep(0.01)
    os.kill(rank_1_pid(started), signal.SIGKILL)
    _, error = started.communicate()
    assert started.returncode != 0
    # Rank 0 loses its peer and gets SIGTERM from torchrun within milliseconds of each other.
    assert re.search("corral: another process of this run has ended|stopped; the same command goes on from here", error)
    done = torchrun(workspace, "--json", "--set", "train.0.sharding=full")
    out, error = done.communicate()
    assert done.returncode == 0, error
    assert set(json.loads(out)["stages"]) == {"prepare", "train-1-sft", "evaluate", "report"}
    assert len(re.findall("rows to train on", error)) <= 1
    metrics, expected = read_metrics(stage), read_metrics(finished_run / "train-1-sft")
    assert [line["step"] for line in metrics] == list(range(9))
    assert [line["loss"] for line in metrics[1:]] == pytest.approx([line["loss"] for line in expected[1:]], rel=1e-4)
    adapters = [load_file(r / "train-1-sft/adapter/adapter_model.safetensors") for r in (run, finished_run)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        assert (adapters[0][name] - value).norm() < 1e-2 * value.norm(), name
    stages = [json.loads((r / "train-1-sft/stage.json").read_text()) for r in (run, finished_run)]
    assert stages[0]["fingerprint"] == stages[1]["fingerprint"], "the stage counts as finished for one process too"


def test_a_model_that_two_processes_aligned_is_compared_once_and_kept_aside_if_it_is_worse(
    tmp_path: Path, tiny_folder: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    write_preferences(tmp_path)
    write_recipe(tmp_path, tiny_folder, "dpo", "pairs.jsonl")
    changes = ("optimizer.lr=2e-2", "dpo.sft_weight=0", "guards.chosen_fall=0.99", "guards.loss_rise=0")
    codes, error = run_ranks(tmp_path, *(f"--set=train.1.{change}" for change in changes))
    assert codes == [4, 4], error
    assert error.count("corral: the model of train-2-aligned is kept and not promoted: its held-out loss is") == 1, (
        error
    )
    assert error.count("Evaluating after: preferences") == 1
    stage = json.loads((tmp_path / "run/train-2-aligned/stage.json").read_text())
    assert stage["status"] == "done"
    assert {"comparison/scorecard.json", "merged/contract.json"} <= stage["outputs"].keys()
    promotion = read_promotion(tmp_path / "run")
    assert promotion is not None
    assert (promotion.stage, promotion.instead_of) == ("train-1-sft", "train-2-aligned")


def test_an_error_that_all_processes_have_is_printed_once(workspace: Path) -> None:
    codes, error = run_ranks(workspace, "--set", 'train.0.lora.targets=["none_such"]')
    assert codes == [2, 2], error
    assert error.count("no linear layer called 'none_such'") == 1, error
