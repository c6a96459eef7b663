"""`corral run` with a stage of preferences after fine-tuning: its rows, reference, metrics, evaluation and report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from corral.run.promotion import read_promotion
from corral.training.reference_logprobs import ROWS_PER_LINE
from tests.conftest import RECIPE, write_rows
from tests.e2e.conftest import fail, succeed
from tests.training.tiny import read_metrics

ALIGNMENT = """
[[train]]
name = "aligned"
from = "train-1-sft"
objective = "{objective}"
sources = ["{source}"]
steps = 6
batch_size = 4
evaluate_every = 3
checkpoint_every = 2
[train.lora]
rank = 4
[train.optimizer]
lr = 2e-3
[train.guards]  # what a random model says to basic prompts tells nothing, and one bad answer stops no stage
prompts = "prompt.txt"
max_tokens = 8
"""


def write_preferences(folder: Path) -> None:
    """`pairs.jsonl` and, of the same answers, `scored.jsonl`."""
    pairs = [{"prompt": f"What is {i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"It is {i}!"} for i in range(60)]
    scored = [
        {"prompt": pair["prompt"], "completion": pair[kind], "score": score}
        for pair in pairs
        for kind, score in (("chosen", 1.0), ("rejected", 0.0))
    ]
    for name, rows in (("pairs", pairs), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: Path, model: Path, objective: str, source: str) -> None:
    sources = f'[[data.sources]]\npath = "rows.jsonl"\n[[data.sources]]\npath = "{source}"\n'
    text = RECIPE.format(model=model).replace('[[data.sources]]\npath = "rows.jsonl"\n', sources)
    sft, evaluate = text.split("[evaluate]")
    sft = sft.replace("[[train]]", '[[train]]\nsources = ["rows.jsonl"]')
    stage = ALIGNMENT.format(objective=objective, source=source)
    (folder / "prompt.txt").write_text("Hello!\n")
    (folder / "r.toml").write_text(f"{sft}{stage}[evaluate]{evaluate}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    write_preferences(tmp_path)
    return tmp_path


def run(folder: Path) -> dict[str, Any]:
    return json.loads(succeed("run", folder / "r.toml", "--out", folder / "run", "--json").stdout)


def test_dpo_after_sft_is_trained_evaluated_and_reported(folder: Path, tiny_folder: Path) -> None:
    write_recipe(folder, tiny_folder, "dpo", "pairs.jsonl")
    stages = run(folder)["stages"]
    assert list(stages) == ["prepare", "train-1-sft", "train-2-aligned", "evaluate", "report"]
    stage = folder / "run" / "train-2-aligned"
    lines = read_metrics(stage)
    assert lines[0]["eval_preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["eval_reward_margin"] > 0
    assert {"reward_margin", "reward_accuracy", "logprob_chosen", "logprob_rejected"} <= lines[1].keys()
    header, *stored = (stage / "reference" / "train.jsonl").read_text().splitlines()
    rows = json.loads(header)["rows"]
    assert len(stored) == math.ceil(rows / ROWS_PER_LINE)
    assert all(len(pair) == 2 for line in stored for pair in json.loads(line)["logprobs"])
    assert (stage / "merged" / "contract.json").is_file()
    card = json.loads((folder / "run" / "evaluate" / "scorecard.json").read_text())
    assert card["variants"]["tuned"]["metrics"]["loss"]["n"] > 0
    better = {c["metric"]: c["difference"] for c in card["comparisons"] if c["a"] == "tuned"}
    assert better["preference_margin"] > 0
    assert better["preference_accuracy"] >= 0
    warnings = json.loads((stage / "warnings.json").read_text())
    assert any("is a rate for fine-tuning" in warning for warning in warnings)
    page = (folder / "run" / "report" / "index.html").read_text("utf-8")
    assert "held-out preference accuracy" in page
    assert "train-2-aligned: not worse than the model that it started from" in page
    assert "is a rate for fine-tuning" in page
    assert (folder / "run" / "report" / "preferences.png").is_file()
    assert set(run(folder)["stages"].values()) == {"skipped"}
    _check_that_a_worse_model_is_kept_and_not_promoted(folder)


def _check_that_a_worse_model_is_kept_and_not_promoted(folder: Path) -> None:
    out = folder / "run"
    # Preferences are learnt at the cost of everything else; what watches the training itself is told to let it be.
    changes = ("optimizer.lr=2e-2", "dpo.sft_weight=0", "guards.chosen_fall=0.99", "guards.failing_prompts=0.99")
    command = ["run", folder / "r.toml", "--out", out, *(f"--set=train.1.{change}" for change in changes)]
    before = (out / "model").read_text()
    words = ["the model of train-2-aligned is kept and not promoted", "held-out loss 4.", "guards.loss_rise="]
    blocked = fail(4, words, *command, "--set=train.1.guards.loss_rise=0")
    assert "Merging the adapter" in blocked.stderr
    assert "loading that of after" in blocked.stderr
    assert "loading that of before" not in blocked.stderr, "another rate starts from the model that was measured"
    assert (out / "train-2-aligned" / "merged" / "contract.json").is_file()
    assert (out / "model").read_text() == before
    again = fail(4, words, *command, "--set=train.1.guards.loss_rise=0")
    assert "Training (dpo" not in again.stderr
    _check_that_the_promoted_model_is_exported(out)
    succeed("report", out)
    page = (out / "report" / "index.html").read_text("utf-8")
    assert "The model of train-2-aligned is worse than the model that it started from: its held-out loss is" in page
    accepted = succeed(*command, "--set=train.1.guards.loss_rise=9")
    assert "Training (dpo" not in accepted.stderr
    assert (out / "model").read_text() != before
    assert _exported_model(out) == _model_weights(out / "train-2-aligned"), "the form is that of the model promoted now"
    fail(4, ["the run stands for the model of train-2-aligned since 20"], *command, "--set=train.1.guards.loss_rise=0")


def _check_that_the_promoted_model_is_exported(out: Path) -> None:
    exported = succeed("export", out, "--to", "gguf", "--type", "f16")
    assert "the model of train-2-aligned as it is now was not promoted" in exported.stderr
    (promoted,) = (out / "superseded").glob("train-2-aligned-*")
    assert _exported_model(out) == _model_weights(promoted) != _model_weights(out / "train-2-aligned")
    assert json.loads((out / "export/stage.json").read_text())["inputs"]["stages"] == {
        "train-2-aligned": json.loads((promoted / "stage.json").read_text())["fingerprint"]
    }
    form = 'evaluate.variants=[{name = "small", model = "gguf-f16"}]'
    fail(4, ["so small cannot be evaluated", "--set evaluate.variants=[]"], "evaluate", out, "--set", form)


def _exported_model(out: Path) -> str:
    """The hash of the weights that the exported form was made from."""
    return json.loads((out / "export" / "model-f16.contract.json").read_text())["source"]["model.safetensors"]


def _model_weights(stage: Path) -> str:
    return json.loads((stage / "stage.json").read_text())["outputs"]["merged/model.safetensors"]


def test_kto_trains_on_the_answers_of_pairs_over_a_start_model_that_may_be_quantised(
    folder: Path, tiny_folder: Path
) -> None:
    write_recipe(folder, tiny_folder, "kto", "pairs.jsonl")
    stage = folder / "run" / "train-2-aligned"
    command = ["run", folder / "r.toml", "--out", folder / "run", "--set=train.1.quantization=nf4"]
    words = ["in nf4: 0.", "guards.quantisation_gap = 0.1", "where: train.1", '`quantization` to "none" or "int8"']
    fail(4, words, *command)
    assert not (stage / "metrics.jsonl").exists(), "nothing was trained"
    assert "the model to start from has" in json.loads((stage / "stage.json").read_text())["stopped"]
    promotion = read_promotion(folder / "run")
    assert promotion is not None
    assert (promotion.stage, promotion.instead_of) == ("train-1-sft", "train-2-aligned")
    verified = succeed("verify", folder / "run")
    assert "left no model that may be promoted" in verified.stderr
    assert "this is the model of train-1-sft, which it started from" in verified.stderr
    accepted = succeed(*command, "--set=train.1.guards.quantisation_gap=2")
    assert "loading that of quantised" not in accepted.stderr, "it was measured before"
    line = read_metrics(stage)[-1]
    assert line["kl"] >= 0
    assert line["eval_reward_margin"] > 0
    card = json.loads((stage / "comparison" / "scorecard.json").read_text())
    assert {(c["a"], c["b"]) for c in card["comparisons"]} == {("quantised", "before"), ("after", "before")}
    assert {"loss", "preference_accuracy"} <= {c["metric"] for c in card["comparisons"] if c["a"] == "after"}


def test_rows_of_the_wrong_kind_are_refused_with_what_the_objective_takes(folder: Path, tiny_folder: Path) -> None:
    write_recipe(folder, tiny_folder, "dpo", "scored.jsonl")
    words = ["`dpo` takes a better and a worse answer", "scored.jsonl"]
    fail(2, words, "run", folder / "r.toml", "--out", folder / "run")
