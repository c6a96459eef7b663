"""A corpus of documents without conversations, from training to a comparison."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.e2e.conftest import fail, succeed


def test_a_corpus_is_trained_on_and_evaluated_by_its_loss_per_token_and_per_byte(workspace: Path) -> None:
    words = ["the", "sea", "is", "wide", "and", "a", "ship", "sails", "on", "with", "bread", "and", "wine"]
    texts = random.Random(0)
    (workspace / "docs").mkdir()
    for i in range(24):
        text = " ".join(texts.choices(words, k=12 if i % 3 else 90))
        (workspace / "docs" / f"{i:02}.txt").write_text(f"Document {i}: {text}.\n")
    recipe = (workspace / "r.toml").read_text()
    (workspace / "r.toml").write_text(recipe.replace('path = "rows.jsonl"', 'path = "docs"'))
    done = succeed("run", "r.toml", "--out", "out", cwd=workspace)
    assert "bits per byte" in " ".join(done.stdout.split())
    assert "answers/s" not in done.stdout, "nothing was answered"
    run = workspace / "out"
    rows = [json.loads(line) for line in (run / "evaluate" / "losses.jsonl").read_text().splitlines()]
    facts = json.loads((run / "evaluate" / "rows.json").read_text())
    assert {row["id"] for row in rows} == facts.keys()
    documents = {fact["document"] for fact in facts.values()}
    assert len(facts) > len(documents), "a document was cut into windows"
    assert not (run / "evaluate" / "completions.jsonl").exists()
    assert "bits per byte" in (run / "report" / "index.html").read_text()
    card = json.loads(succeed("compare", run, f"{run}:base", "--json").stdout)
    assert [(c["metric"], c["primary"], c["difference"] < 0) for c in card["comparisons"]] == [
        ("loss", True, True),
        ("bits_per_byte", False, True),
    ]
    before = (run / "evaluate" / "losses.jsonl").read_bytes()
    words_of_error = ["rougeL", "no test row is a conversation"]
    fail(2, words_of_error, "evaluate", run, "--set", "evaluate.primary=rougeL")
    succeed("evaluate", run, "--set", "evaluate.primary=loss")
    assert (run / "evaluate" / "losses.jsonl").read_bytes() == before


def test_a_test_file_that_cannot_be_evaluated_on_is_known_before_training(workspace: Path) -> None:
    rows = [{"prompt": f"Which {n}?", "completion": "that", "label": False} for n in range(5)]
    (workspace / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = (workspace / "r.toml").read_text()
    mine = '[[data.sources]]\npath = "mine.jsonl"\nside = "test"\n'
    (workspace / "r.toml").write_text(recipe.replace("[[data.sources]]", f"{mine}[[data.sources]]", 1))
    done = fail(2, ["mine.jsonl", "no row of the source"], "run", "r.toml", "--out", "out", cwd=workspace)
    assert "Training" not in done.stdout + done.stderr
