"""`corral run` with a stage that is stopped before it breaks its model: a tiny one, taught to answer a few prompts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import fail, succeed
from tests.training.guarded import PROMPTS, WORDS
from tests.training.tiny import read_metrics

RECIPE = """
name = "guarded"
[model]
base = "{model}"
[data]
max_length = 128
[[data.sources]]
path = "pairs.jsonl"
[data.split]
validation = 0.25
test = 0.25
[[train]]
objective = "dpo"
steps = 4
batch_size = 4
evaluate_every = 2
[train.lora]
rank = 4
[train.optimizer]
lr = 0.2
[train.guards]
prompts = "{prompts}"
max_tokens = 16
[evaluate]
engine = "transformers"
loss_rows = 4
answer_rows = 1
"""


def write_workspace(folder: Path, model: Path) -> None:
    pairs = [
        {"prompt": prompt, "chosen": f"{word}!", "rejected": f"{other}?"}
        for prompt, word in zip(PROMPTS, WORDS, strict=True)
        for other in ("No", "Why", "When")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "r.toml").write_text(RECIPE.format(model=model, prompts=folder / "prompts.txt"))


def test_a_stage_that_breaks_its_model_stops_and_the_run_keeps_the_model_that_it_has(
    taught_folder: Path, tmp_path: Path
) -> None:
    write_workspace(tmp_path, taught_folder)
    out = tmp_path / "run"
    command = ["run", tmp_path / "r.toml", "--out", out]
    stage = out / "train-1-dpo"
    words = ["stopped after step", "as training breaks the model", "of 12 basic prompts are answered badly"]
    words += ["where: ", "--set train.0.optimizer.lr=0.05"]
    first = fail(4, words, *command)
    assert "answers 12 of 12 basic prompts well" in first.stderr
    lines = read_metrics(stage)
    assert (stage / "adapter" / "adapter_model.safetensors").is_file()
    assert not (stage / "merged").exists()
    assert not (out / "model").exists()
    fail(4, words, *command)
    assert read_metrics(stage) == lines, "it takes no other step"
    succeed(*command, "--set=train.0.optimizer.lr=1e-5")
    model = (out / "model").read_text()
    fail(4, words, *command)
    assert (out / "model").read_text() == model


def test_basic_prompts_without_room_for_an_answer_are_refused_before_anything_runs(
    taught_folder: Path, tmp_path: Path
) -> None:
    write_workspace(tmp_path, taught_folder)
    words = ["and 505 of an answer do not fit into the model's context of 512", "train.0.guards.prompts"]
    fail(2, words, "run", tmp_path / "r.toml", "--out", tmp_path / "run", "--set=train.0.guards.max_tokens=505")
    assert not (tmp_path / "run" / "prepare").exists()
