"""Without a GPU the GPU benchmark says so; rehearsed on tiny models it claims nothing."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return Forked(run_script, list(options), env=environment, cwd=folder).finish()


def run_script(options: list[str]) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = ["gpu.py", *options]
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", str(tmp_path / "gpu.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no CUDA device")
    assert not list(tmp_path.iterdir())


def test_in_a_rehearsal_both_sides_run_and_no_claim_is_made(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run(tmp_path, "--rehearse", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"packed_gap"'))
    assert found["packed_gap"]["float32"] < 1e-3
    assert found["generation_3b"]["equal_share"] == 1
    for name in ("3b long", "3b mix", "8b long"):
        assert {f"{name} {side}:" in done.stdout for side in ("corral", "plain")} == {True}
    claims = json.loads(out.read_text("utf-8"))["claims"]
    assert {"mfu_3b", "tokens_per_second_8b"} <= {claim["name"] for claim in claims}
    assert {(claim["value"], claim["met"]) for claim in claims} == {(None, "not run")}


@pytest.mark.parametrize(("name", "parameters"), [("3b", 3_212_749_824), ("8b", 8_030_261_248)])
def test_the_models_have_the_published_sizes(name: str, parameters: int, gpu: Any) -> None:
    model = gpu.base_model(gpu.SHAPES[name], "meta", "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_mix_has_rows_of_every_length_up_to_512_with_answers_trained(gpu: Any) -> None:
    rows = gpu.mix(2000, 1000)
    lengths = [len(ids) for ids, _ in rows]
    assert max(lengths) == 512
    assert min(lengths) < 60
    assert 150 < sum(lengths) / len(lengths) < 260  # the prepared mix has 174 tokens a row
    assert all(any(marks) and not all(marks) and len(marks) == len(ids) for ids, marks in rows)
