"""`corral run`: what it leaves, what it skips, how it is stopped and goes on."""

from __future__ import annotations

import json
import shutil
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

from tests.e2e.conftest import corral

STABLE = (
    "recipe.toml",
    "environment.json",
    "lineage.json",
    "prepare/ledger.json",
    "train-1-sft/metrics.jsonl",
    "train-1-sft/adapter/adapter_model.safetensors",
    "merge/model/model.safetensors",
    "merge/model/contract.json",
    "evaluate/scorecard.json",
    "evaluate/completions.jsonl",
    "report/index.html",
)


def stages(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["stages"]


def rerun(folder: Path, *settings: str) -> dict[str, str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    return stages(corral("run", folder / "r.toml", "--out", folder / "run", "--json", *sets))


def test_the_stable_names_are_there(finished: Path) -> None:
    for name in STABLE:
        assert (finished / "run" / name).is_file(), name


def test_the_scorecard_has_the_shape_others_read(finished: Path) -> None:
    card = json.loads((finished / "run/evaluate/scorecard.json").read_text())
    for name in ("base", "tuned"):
        metrics = card["variants"][name]["metrics"]
        assert set(metrics) == {"loss", "rouge1", "rouge2", "rougeL", "bleu"}
        assert all({"mean", "se", "n"} <= set(value) for value in metrics.values())
    (loss,) = [c for c in card["comparisons"] if c["metric"] == "loss"]
    assert (loss["a"], loss["b"]) == ("tuned", "base")
    assert {"difference", "low", "high", "p", "n"} <= set(loss)
    means = {name: v["metrics"]["loss"]["mean"] for name, v in card["variants"].items()}
    assert loss["difference"] == pytest.approx(means["tuned"] - means["base"])
    assert loss["high"] < 0, "training a tiny model on sums must lower its held-out loss"


def test_the_ledger_adds_up_and_test_rows_were_not_trained_on(finished: Path) -> None:
    ledger = json.loads((finished / "run/prepare/ledger.json").read_text())
    assert ledger["rows"] == 80 == sum(ledger["fates"].values())
    rows = [json.loads(line) for line in (finished / "run/evaluate/completions.jsonl").read_text().splitlines()]
    trained = (finished / "run/prepare/rows/train/records.jsonl").read_text()
    assert len(rows) == 12
    assert not any(row["id"] in trained for row in rows)


def test_lineage_names_every_stage_and_the_hash_of_what_it_made(finished: Path) -> None:
    import hashlib

    lineage = json.loads((finished / "run/lineage.json").read_text())
    assert [s["name"] for s in lineage["stages"]] == ["prepare", "train-1-sft", "merge", "evaluate", "report"]
    merge = next(s for s in lineage["stages"] if s["name"] == "merge")
    weights = finished / "run/merge/model/model.safetensors"
    assert merge["outputs"]["model/model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_second_run_finds_everything_done_and_a_change_redoes_what_depends_on_it(
    finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    assert set(rerun(folder).values()) == {"skipped"}, "a run may be moved with its data"
    changed = rerun(folder, "evaluate.loss_rows=5")
    assert [n for n, what in changed.items() if what == "done"] == ["evaluate", "report"]
    changed = rerun(folder, "train.0.optimizer.lr=1e-3")
    assert [n for n, what in changed.items() if what == "done"] == ["train-1-sft", "merge", "evaluate", "report"]
    back = rerun(folder)
    assert set(back.values()) == {"skipped"}, "what was superseded comes back"


def test_ctrl_c_and_the_same_command_again_ends_where_an_uninterrupted_run_does(
    workspace: Callable[[], Path], finished: Path
) -> None:
    folder = workspace()
    command = [sys.executable, "-m", "corral", "run", str(folder / "r.toml"), "--out", str(folder / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = folder / "run/train-1-sft/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not (folder / "run/merge").exists()
    done = corral("run", folder / "r.toml", "--out", folder / "run", "--json")
    assert stages(done)["train-1-sft"] == "done"
    ours, theirs = (load_file(f / "run/train-1-sft/last/adapter_model.safetensors") for f in (folder, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_merged_model_is_a_plain_folder_that_transformers_loads_and_that_stops(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corral.answering.answerer import Answerer
    from corral.answering.sync import SyncAnswerer
    from corral.engines.base import Sampling
    from corral.engines.registry import load_engine
    from corral.messages import Conversation
    from corral.model.loading import load_tokenizer
    from corral.template import Template

    folder = finished / "run/merge/model"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = Conversation.from_turns(("user", "What is 7 plus 7?"))
    inputs = tokenizer.apply_chat_template(
        asked.to_json()["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answerer = Answerer(
        load_engine("transformers", folder, dtype="float32", device="cpu"), Template.load(load_tokenizer(folder))
    )
    with SyncAnswerer(answerer) as sync:
        ours = sync.answer(asked, Sampling(max_tokens=12))
    assert ours.text == tokenizer.decode(theirs, skip_special_tokens=True)
    assert set(model.generation_config.eos_token_id) == set(answerer.template.stop_ids)


def test_merged_equals_adapter_on_held_out_rows(finished: Path, tiny_folder: Path) -> None:
    from corral.data.prepare import Prepared
    from corral.model import adapters
    from corral.model.loading import load_model
    from corral.model.packed_forward import score

    rows = Prepared.open(finished / "run/prepare").test
    ids = [rows[i].sequences[0].ids for i in range(6)]
    adapted = adapters.load(load_model(tiny_folder), finished / "run/train-1-sft/adapter")
    merged = load_model(finished / "run/merge/model")
    for a, b in zip(score(adapted, ids, [1] * 6), score(merged, ids, [1] * 6), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("name", ["train-1-sft/adapter/adapter_model.safetensors", "merge/model/config.json"])
def test_a_done_stage_that_lost_a_file_is_done_anew(name: str, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "run" / name).unlink()
    assert rerun(folder)[name.split("/")[0]] == "done"
    assert (folder / "run" / name).is_file()
    assert set(rerun(folder).values()) == {"skipped"}


def test_a_stop_between_promoting_a_model_and_recording_it_is_made_good(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    path = folder / "run/merge/stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    assert rerun(folder)["merge"] == "done"


def test_sigterm_stops_with_143(workspace: Callable[[], Path]) -> None:
    folder = workspace()
    command = [sys.executable, "-m", "corral", "run", str(folder / "r.toml"), "--out", str(folder / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "run/train-1-sft/metrics.jsonl").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def test_the_quickstart_runs_on_the_real_model(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    short = ("train.0.steps=2", "train.0.evaluate_rows=2", "evaluate.loss_rows=4", "evaluate.answer_rows=2")
    sets = [part for s in (*short, "answer.max_tokens=16") for part in ("--set", s)]
    done = corral("run", root / "recipes/quickstart.toml", "--out", tmp_path / "run", "--json", *sets)
    assert set(stages(done).values()) == {"done"}
    ledger = json.loads((tmp_path / "run/prepare/ledger.json").read_text())
    assert ledger["rows"] == 3129 == sum(ledger["fates"].values())
    loss = json.loads((tmp_path / "run/evaluate/scorecard.json").read_text())["variants"]["base"]["metrics"]["loss"]
    assert 1.5 < loss["mean"] < 3.5, "the base model must know English"


def test_a_broken_contract_stops_the_run_with_4_and_promotes_nothing(
    workspace: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from corral import cli
    from corral.model import merging

    honest = merging.merge_adapter

    def faulty(model: Any) -> Any:
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.1)
        return honest(model)

    monkeypatch.setattr(merging, "merged", faulty)
    folder = workspace()
    assert cli.main(["run", str(folder / "r.toml"), "--out", str(folder / "run")]) == 4
    assert not (folder / "run/merge/model").exists()
    record = json.loads((folder / "run/merge/candidate/contract.json").read_text())
    assert not record["passed"]
    assert [c["name"] for c in record["checks"] if not c["passed"]] == ["adapter and merged model"]
