"""`corral run`: the files it writes, the stages it skips, and how it stops and resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.data.prepare import Prepared
from tests.batch.work import read_rows
from tests.e2e.conftest import fail, succeed
from tests.forked import start_corral

STABLE_NAMES = (
    "recipe.toml",
    "environment.json",
    "lineage.json",
    "prepare/ledger.json",
    "train-1-sft/metrics.jsonl",
    "train-1-sft/adapter/adapter_model.safetensors",
    "train-1-sft/merged/model.safetensors",
    "train-1-sft/merged/contract.json",
    "evaluate/scorecard.json",
    "evaluate/completions.jsonl",
    "report/index.html",
)


def run(workspace: Path, *settings: str, redo: str | None = None) -> dict[str, str]:
    """Run the recipe into `run`. Returns what happened to each stage."""
    options = [part for setting in settings for part in ("--set", setting)]
    options += ["--redo", redo] if redo else []
    done = succeed("run", workspace / "r.toml", "--out", workspace / "run", "--json", *options)
    return json.loads(done.stdout)["stages"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_has_the_files_with_stable_names(finished_run: Path) -> None:
    assert not [name for name in STABLE_NAMES if not (finished_run / name).is_file()]


def test_training_lowers_the_held_out_loss_and_the_comparison_is_of_the_means(finished_run: Path) -> None:
    card = read_json(finished_run / "evaluate/scorecard.json")
    (loss,) = [c for c in card["comparisons"] if c["metric"] == "loss"]
    assert (loss["a"], loss["b"]) == ("tuned", "base")
    means = {name: v["metrics"]["loss"]["mean"] for name, v in card["variants"].items()}
    assert loss["difference"] == pytest.approx(means["tuned"] - means["base"])
    assert loss["high"] < 0, "training a tiny model on sums must lower its held-out loss"


def test_the_ledger_adds_up_and_test_rows_were_not_trained_on(finished_run: Path) -> None:
    ledger = read_json(finished_run / "prepare/ledger.json")
    assert ledger["rows"] == 80 == sum(ledger["fates"].values())
    rows = read_rows(finished_run / "evaluate/completions.jsonl")
    trained = {example.key for example in Prepared.open(finished_run / "prepare").train}
    assert len(rows) == 12
    assert not any(row["id"] in trained for row in rows)


def test_lineage_has_every_stage_with_the_hashes_of_its_outputs(finished_run: Path) -> None:
    lineage = read_json(finished_run / "lineage.json")
    assert [s["name"] for s in lineage["stages"]] == ["prepare", "train-1-sft", "evaluate", "report"]
    train = next(s for s in lineage["stages"] if s["name"] == "train-1-sft")
    weights = finished_run / "train-1-sft/merged/model.safetensors"
    assert train["outputs"]["merged/model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_second_run_skips_finished_stages_and_a_change_repeats_what_depends_on_it(run_copy: Path) -> None:
    workspace = run_copy.parent

    def repeated(*settings: str) -> list[str]:
        return [name for name, outcome in run(workspace, *settings).items() if outcome == "done"]

    assert set(run(workspace).values()) == {"skipped"}, "a run may be moved with its data"
    assert repeated("evaluate.loss_rows=5") == ["evaluate", "report"]
    assert repeated("train.0.optimizer.lr=1e-3") == ["train-1-sft", "evaluate", "report"]
    assert set(run(workspace).values()) == {"skipped"}, "superseded outputs come back with the old settings"


def test_after_ctrl_c_the_same_command_ends_with_the_weights_of_an_uninterrupted_run(
    workspace: Path, finished_run: Path
) -> None:
    process = start_corral("run", workspace / "r.toml", "--out", workspace / "run")
    log = workspace / "run/train-1-sft/metrics.jsonl"
    while process.is_running and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    stopped = process.finish()
    assert stopped.returncode == 130, stopped.stderr
    assert "the same command goes on from here" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (workspace / "run/model").exists()
    assert run(workspace)["train-1-sft"] == "done"
    weights, expected = (
        load_file(r / "train-1-sft/last/adapter_model.safetensors") for r in (workspace / "run", finished_run)
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_transformers_loads_the_merged_model_and_answers_as_corral_does(finished_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corral.answering.answerer import Answerer
    from corral.answering.sync import SyncAnswerer
    from corral.engines.base import Sampling
    from corral.engines.registry import load_engine
    from corral.messages import Conversation
    from corral.model.loading import load_tokenizer
    from corral.template import Template

    folder = finished_run / "train-1-sft/merged"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = Conversation.from_turns(("user", "What is 7 plus 7?"))
    inputs = tokenizer.apply_chat_template(
        question.to_json()["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answerer = Answerer(
        load_engine("transformers", folder, dtype="float32", device="cpu"), Template.load(load_tokenizer(folder))
    )
    with SyncAnswerer(answerer) as sync_answerer:
        ours = sync_answerer.answer(question, Sampling(max_tokens=12))
    assert ours.text == tokenizer.decode(theirs, skip_special_tokens=True)
    assert set(model.generation_config.eos_token_id) == set(answerer.template.stop_ids)


def test_the_merged_model_equals_the_adapter_on_held_out_rows(finished_run: Path, tiny_folder: Path) -> None:
    from corral.data.prepare import Prepared
    from corral.model import adapters
    from corral.model.loading import load_model
    from corral.model.packed_forward import score

    rows = Prepared.open(finished_run / "prepare").test
    ids = [rows[i].sequences[0].ids for i in range(6)]
    adapted = adapters.load(load_model(tiny_folder), finished_run / "train-1-sft/adapter")
    merged = load_model(finished_run / "train-1-sft/merged")
    for a, b in zip(score(adapted, ids, [1] * 6), score(merged, ids, [1] * 6), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_finished_stage_that_lost_a_file_is_not_trained_again_unasked(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "train-1-sft" / "checkpoints")
    (run_copy / "train-1-sft" / "metrics.jsonl").unlink()
    (run_copy / "evaluate" / "scorecard.json").unlink()
    assert run(run_copy.parent) == {
        "prepare": "skipped",
        "train-1-sft": "skipped",
        "evaluate": "done",
        "report": "skipped",
    }
    (run_copy / "train-1-sft" / "merged" / "config.json").unlink()
    words = ["train-1-sft has lost merged/config.json", "--redo train-1-sft"]
    fail(2, words, "run", run_copy.parent / "r.toml", "--out", run_copy)
    assert run(run_copy.parent, redo="train-1-sft")["train-1-sft"] == "done"


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_quickstart_runs_on_the_real_model(exported: bool, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    short = ("train.0.steps=2", "train.0.batch_size=1", "train.0.evaluate_rows=2")
    short += ("evaluate.loss_rows=4", "evaluate.answer_rows=1", "answer.max_tokens=8")
    short += () if exported else ("export.gguf=[]", "export.openvino=[]")
    sets = [part for s in short for part in ("--set", s)]
    done = succeed("run", root / "recipes/quickstart.toml", "--out", tmp_path / "run", "--json", *sets)
    stages = json.loads(done.stdout)["stages"]
    assert set(stages.values()) == {"done"}
    assert ("export" in stages) == exported
    ledger = read_json(tmp_path / "run/prepare/ledger.json")
    assert ledger["rows"] == 3129 == sum(ledger["fates"].values())
    loss = read_json(tmp_path / "run/evaluate/scorecard.json")["variants"]["base"]["metrics"]["loss"]
    assert 1.5 < loss["mean"] < 3.5, "the base model must know English"


def test_a_broken_contract_stops_the_run_with_4_and_promotes_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral import cli
    from corral.model import merging

    honest = merging.merge_adapter

    def faulty(model: Any) -> Any:
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.1)
        return honest(model)

    monkeypatch.setattr(merging, "merge_adapter", faulty)
    assert cli.main(["run", str(workspace / "r.toml"), "--out", str(workspace / "run")]) == 4
    assert not (workspace / "run/model").exists(), "nothing is promoted"
    record = read_json(workspace / "run/train-1-sft/merged/contract.json")
    assert not record["passed"]
    assert [c["name"] for c in record["checks"] if not c["passed"]] == ["adapter and merged model"]
