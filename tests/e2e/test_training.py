"""The settings of a training stage, through `corral run`: ways to hold and train weights, optimizers, early stopping."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from corral import cli
from tests.conftest import RECIPE
from tests.e2e.conftest import succeed
from tests.e2e.test_run import read_json
from tests.training.tiny import read_metrics

LORA = "[train.lora]\nrank = 4\n"
# Replacement of the recipe's [train.lora], the dtype, and the last checks of the contract.
WEIGHTS = {
    "nf4": (f'quantization = "nf4"\nmerge = "best"\n{LORA}', "float32", ["choice of the merge"]),
    "int8": (f'quantization = "int8"\n{LORA}', "float32", ["held-out loss, merged and int8"]),
    "full": ('method = "full"\n', "float32", ["trained and saved model"]),
    "full, bfloat16": (
        'method = "full"\n',
        "bfloat16",
        ["trained and saved model", "loss, saved model and training"],
    ),
}


def run_edited(workspace: Path, *edits: tuple[str, str]) -> int:
    """Run the recipe with parts of its text replaced, and one answer instead of six. Returns the exit code."""
    text = (workspace / "r.toml").read_text()
    for old, new in (*edits, ("answer_rows = 6", "answer_rows = 1")):
        assert old in text
        text = text.replace(old, new)
    (workspace / "r.toml").write_text(text)
    return cli.main(["run", str(workspace / "r.toml"), "--out", str(workspace / "run")])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_recipe_gives_a_model_with_a_contract(name: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, dtype, last_checks = WEIGHTS[name]
    assert run_edited(workspace, (LORA, settings), ("[model]", f'[model]\ndtype = "{dtype}"')) == 0, capsys.readouterr()
    run = workspace / "run"
    record = read_json(run / "train-1-sft/merged/contract.json")
    first = "trained and saved weights" if name.startswith("full") else "adapter and merged model"
    assert record["passed"]
    assert [c["name"] for c in record["checks"]][2:] == [first, *last_checks]
    printed = " ".join(capsys.readouterr().err.split())
    assert all(check["detail"] in printed for check in record["checks"])
    config = read_json(run / "train-1-sft/merged/config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == dtype
    loss = {
        name: v["metrics"]["loss"]["mean"] for name, v in read_json(run / "evaluate/scorecard.json")["variants"].items()
    }
    assert loss["tuned"] < loss["base"] - 0.5


def test_a_second_stage_quantises_the_model_that_the_first_one_left(workspace: Path) -> None:
    stage = RECIPE[RECIPE.index("[[train]]") : RECIPE.index("[evaluate]")]
    short = stage.replace("steps = 8", 'steps = 4\nquantization = "nf4"')
    assert run_edited(workspace, (stage, short * 2)) == 0
    run = workspace / "run"
    adapter = read_json(run / "train-2-sft/adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == str(run / "train-1-sft/merged")
    assert read_json(run / "train-1-sft/merged/contract.json")["passed"]


def test_without_bitsandbytes_a_quantised_run_stops_before_it_prepares(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run_edited(workspace, (LORA, WEIGHTS["nf4"][0])) == 3
    assert 'pip install "corral[quant]"' in capsys.readouterr().err
    assert not (workspace / "run/prepare/ledger.json").exists()


def test_early_stopping_tensorboard_the_profile_and_a_paged_optimizer(workspace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {
        "trackers": '["tensorboard"]',
        "train.0.optimizer.kind": "paged_adamw_8bit",
        "train.0.optimizer.lr": "0.3",  # too high, so that the held-out loss rises at once
        "train.0.optimizer.warmup_steps": "0",
        "train.0.group_by_length": "true",
        "train.0.evaluate_every": "2",
        "train.0.early_stopping": "2",
        "train.0.steps": "40",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = succeed("run", workspace / "r.toml", "--out", workspace / "run", "--profile", *options, cwd=workspace)
    stage = workspace / "run/train-1-sft"

    metrics = read_metrics(stage)
    losses = [line["eval_loss"] for line in metrics if line["eval_loss"] is not None]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert metrics[-1]["step"] == 2 * (best + 2)
    assert read_json(stage / "outcome.json")["best_step"] == 2 * best

    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([line["loss"] for line in metrics if line["loss"] is not None])

    assert "processor time of 3 steps, by operation" in done.stderr
    trace = read_json(stage / "profile/trace.json")
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])

    if not torch.cuda.is_available():
        assert "paged_adamw_8bit: there is no GPU" in done.stderr
