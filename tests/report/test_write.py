from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from corral.evaluation.scorecard import build_scorecard
from corral.evaluation.scoring import PairSums, Row, VariantRows
from corral.report.write import write_report
from tests.report.conftest import PARTS, MakeRun, aligned_metrics, lineage, metrics, write, write_lines

PICTURES = {"loss.png", "learning-rate.png", "throughput.png", "scorecard.png"}


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    first = {path.name: path.read_bytes() for path in write_report(run).parent.iterdir()}
    shutil.rmtree(run / "report")
    # The report stage itself is recorded only afterwards, with another time each time.
    value = lineage()
    value["stages"][-1] |= {
        "seconds": 99.0,
        "finished": "2031-01-01T00:00:00+00:00",
        "outputs": {"report/index.html": "f" * 64},
    }
    write(run / "lineage.json", value)
    assert {path.name: path.read_bytes() for path in write_report(run).parent.iterdir()} == first


LACKING = {
    "metrics": PICTURES - {"scorecard.png"},
    "scorecard": {"scorecard.png"},
    "completions": set(),
    "nothing": set(),
}


@pytest.mark.parametrize("missing", LACKING)
def test_a_page_is_written_and_a_picture_for_each_part_that_there_is(make_run: MakeRun, missing: str) -> None:
    run = make_run(*(part for part in PARTS if part != missing))
    index = write_report(run)
    assert index == run / "report" / "index.html"
    assert {path.name for path in index.parent.iterdir()} == {"index.html"} | PICTURES - LACKING[missing]


def test_a_stage_with_rewards_has_a_picture_of_them_and_its_accuracy(make_run: MakeRun) -> None:
    run = make_run()
    write_lines(run / "train-1-sft" / "metrics.jsonl", aligned_metrics())
    index = write_report(run)
    assert (index.parent / "preferences.png").is_file()
    page = index.read_text("utf-8")
    assert "mean rewards chosen from 0.010 to 0.200 and rejected from −0.050 to −1.000" in page
    assert "held-out preference accuracy 81% there" in page


@pytest.mark.parametrize("only", ["nothing", *PARTS])
def test_a_run_that_has_one_part_is_reported(make_run: MakeRun, only: str) -> None:
    page = write_report(make_run(only)).read_text("utf-8")
    sections = {
        "ledger": "data",
        "metrics": "training",
        "scorecard": "scores",
        "completions": "answers",
        "contract": "contract",
    }
    for part, section in sections.items():
        assert (f'<section id="{section}">' in page) == (part == only)
        assert (f'href="#{section}"' in page) == (part == only)


def test_a_picture_is_removed_when_its_data_is_gone(make_run: MakeRun) -> None:
    run = make_run()
    write_report(run)
    (run / "evaluate" / "scorecard.json").unlink()
    write_report(run)
    assert not (run / "report" / "scorecard.png").exists()
    assert (run / "report" / "loss.png").exists()


def test_a_damaged_file_is_named_on_the_page_and_not_taken_for_a_missing_one(make_run: MakeRun) -> None:
    run = make_run()
    (run / "prepare" / "ledger.json").write_text('{"rows": 12')
    page = write_report(run).read_text("utf-8")
    assert "prepare/ledger.json cannot be read" in page
    assert '<section id="scores">' in page
    (run / "evaluate" / "scorecard.json").write_text('{"variants": ')
    page = write_report(run).read_text("utf-8")
    assert "The scorecard cannot be read." in page
    assert "has not been evaluated" not in page


def test_files_of_an_unexpected_shape_do_not_stop_the_report(make_run: MakeRun) -> None:
    run = make_run("nothing else")
    value = {"stages": {"a": 1}, "sources": [1], "variants": [], "comparisons": 7, "checks": "x", "packages": None}
    for name in ("environment", "lineage", "prepare/ledger", "evaluate/scorecard", "train-1-sft/merged/contract"):
        write(run / f"{name}.json", value)
    write_lines(
        run / "evaluate" / "completions.jsonl", [{"id": None}, {"prompt": "text", "answer": 5, "tokens": "many"}]
    )
    write_lines(run / "train-1-sft" / "metrics.jsonl", [{"step": 1}, {"step": "two"}])
    (run / "recipe.toml").write_text('name = 5\ntrain = "none"\ndata = []\nmodel = 1\n')
    assert "<h1" in write_report(run).read_text("utf-8")


def test_several_training_stages_are_shown_each(make_run: MakeRun) -> None:
    run = make_run(stages=("train-1-sft", "train-2-dpo"))
    write_lines(run / "train-2-dpo" / "metrics.jsonl", metrics(12))
    page = write_report(run).read_text("utf-8")
    assert "<dt>train-1-sft</dt>" in page
    assert "<dt>train-2-dpo</dt><dd>from the base model, sft, LoRA of rank 16, 12 steps" in page


def test_a_relative_path_of_the_run_is_shown_as_given(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("contract")
    monkeypatch.chdir(run.parent.parent)
    page = write_report(Path("runs") / run.name).read_text("utf-8")
    assert "<pre>corral chat runs/quickstart</pre>" in page


def test_a_stage_that_aligns_is_shown_against_the_model_that_it_started_from(make_run: MakeRun) -> None:
    run = make_run("metrics", stages=("train-1-sft", "train-2-dpo"))
    write_lines(run / "train-2-dpo" / "metrics.jsonl", aligned_metrics())
    rng = random.Random(0)
    variants = {
        name: VariantRows(
            [Row(f"{n}", ranked=PairSums(2, sum(rng.random() < right for _ in "12"), right * n)) for n in range(40)]
        )
        for name, right in (("before", 0.9), ("after", 0.2))
    }
    comparison = build_scorecard(variants, baseline="before", primary="preference_accuracy")
    write(run / "train-2-dpo" / "comparison" / "scorecard.json", comparison.to_json())
    page = write_report(run).read_text("utf-8")
    assert (
        "The model of train-2-dpo is worse than the model that it started from: it puts fewer pairs into the right"
        in page
    )
    assert "It puts fewer pairs into the right order, and by a smaller margin: it is kept, and not promoted." in page
    assert '<td class="outcome worse">✗ worse' in page
