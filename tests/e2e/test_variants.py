"""Variants and benchmark tasks in a run's evaluation, and comparisons of variants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral import cli

SHOTS = '{name = "shots", answer = {shots = {count = 1}}}'
TASK = '[{name = "commonsense_qa", rows = 3, max_tokens = 4}]'


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs `corral evaluate` on the copy of the finished run with some settings; returns the scorecard it prints."""

    def call(*settings: str) -> dict[str, Any]:
        arguments = [part for setting in settings for part in ("--set", setting)]
        assert cli.main(["evaluate", str(run_copy), "--json", *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def read_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_an_added_variant_and_task_leave_earlier_rows_as_they_are(
    evaluate: Evaluate, run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_copy
    before = {
        name: read_lines(run / "evaluate" / name) for name in ("losses.jsonl", "completions.jsonl", "seconds.jsonl")
    }
    card = evaluate(f"evaluate.variants=[{SHOTS}]", f"evaluate.tasks={TASK}")
    assert list(card["variants"]) == ["base", "tuned", "shots"]
    assert {(c["a"], c["b"]) for c in card["comparisons"]} == {("tuned", "base"), ("shots", "tuned")}
    assert all(read_lines(run / "evaluate" / name)[: len(rows)] == rows for name, rows in before.items())
    assert read_lines(run / "evaluate" / "losses.jsonl") == before["losses.jsonl"]
    added = [
        json.loads(line)
        for line in read_lines(run / "evaluate" / "completions.jsonl")[len(before["completions.jsonl"]) :]
    ]
    assert {row["variant"] for row in added} == {"shots"}
    for name, variant in card["variants"].items():
        assert ("loss" in variant["metrics"]) == (name != "shots")
        assert variant["metrics"]["rougeL"]["n"] == 6
        assert variant["metrics"]["commonsense_qa/accuracy"]["n"] == 3
        assert variant["metrics"]["commonsense_qa/logprob"]["n"] == 3
        assert variant["info"]["answers_per_second"] > 0
    tuned, shots = (card["variants"][name]["info"] for name in ("tuned", "shots"))
    assert shots["prompt_tokens"] > tuned["prompt_tokens"]
    assert shots["commonsense_qa/prompt_tokens"] > tuned["commonsense_qa/prompt_tokens"]
    page = (run / "report" / "index.html").read_text("utf-8")
    assert "commonsense_qa: accuracy" in page
    assert "shots" in page

    both = [f"{run}:shots", str(run)]
    assert cli.main(["compare", *both, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["baseline"] == str(run)
    assert any("answer.shots.count = 1, not 0" in caution for caution in compared["cautions"])
    expected = {c["metric"]: c["difference"] for c in card["comparisons"] if c["a"] == "shots"}
    assert {c["metric"]: c["difference"] for c in compared["comparisons"]} == expected
    assert cli.main(["compare", f"{run}:nobody", str(run)]) == 2
    assert "base, tuned, shots" in capsys.readouterr().err
    assert cli.main(["compare", f"{run}:tuned", str(run)]) == 2


def test_a_changed_variant_is_evaluated_again_and_other_settings_are_refused(
    evaluate: Evaluate, run_copy: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_copy
    card = evaluate("answer.max_tokens=3")
    assert card["variants"]["tuned"]["metrics"]["loss"]["n"] == 12
    answers = [json.loads(line) for line in read_lines(run / "evaluate" / "completions.jsonl")]
    assert len(answers) == 12
    assert all(row["tokens"] <= 3 for row in answers)
    assert read_lines(run / "evaluate" / "losses.jsonl") == read_lines(finished_run / "evaluate" / "losses.jsonl")
    assert cli.main(["compare", str(run), str(finished_run), "--json"]) == 0
    (caution,) = json.loads(capsys.readouterr().out)["cautions"]
    assert "differ in more than the model: answer.max_tokens = 3, not" in caution
    assert cli.main(["evaluate", str(run), "--set", "model.base=x"]) == 2
    assert "neither [evaluate] nor [answer]" in capsys.readouterr().err


def test_changed_rows_in_a_source_of_examples_are_noticed(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = tmp_path / "examples.jsonl"
    variant = f'{{name = "shown", answer = {{shots = {{count = 2, source = {{path = "{rows}"}}}}}}}}'

    def shown(completion: str) -> dict[str, Any]:
        rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": completion}) + "\n" for n in range(4)))
        return evaluate(f"evaluate.variants=[{variant}]")["variants"]["shown"]["info"]

    few, many = shown("so"), shown("so it is, and " * 5)
    assert many["prompt_tokens"] > few["prompt_tokens"]


def test_an_adapter_in_a_run_gets_the_examples_of_its_run(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How long does rice take?"}\n')
    variants = {"plain": [], "with examples": ["--shots", "2"]}
    for name, options in variants.items():
        arguments = ["batch", str(finished_run / "train-1-sft" / "adapter"), str(prompts)]
        assert cli.main([*arguments, "--out", str(tmp_path / name), *options]) == 0, capsys.readouterr().err
    plain, with_examples = (json.loads((tmp_path / name).read_text("utf-8"))["prompt_tokens"] for name in variants)
    assert with_examples > plain + 10


@pytest.mark.full
def test_a_variant_in_another_form_is_exported_first(evaluate: Evaluate, run_copy: Path) -> None:
    run = run_copy
    forms = '[{name = "int8", model = "openvino-int8"}, {name = "q8", model = "gguf-q8_0", engine = "transformers"}]'
    card = evaluate(f"evaluate.variants={forms}")
    assert (run / "export" / "openvino-int8" / "contract.json").is_file()
    assert (run / "export" / "model-q8_0.gguf").is_file()
    loss = {name: variant["metrics"]["loss"]["mean"] for name, variant in card["variants"].items()}
    assert loss["int8"] == pytest.approx(loss["tuned"], abs=0.1)
    assert loss["q8"] == pytest.approx(loss["tuned"], abs=0.02)
    assert loss["int8"] != loss["q8"] != loss["tuned"]
    assert cli.main(["export", str(run), "--to", "gguf", "--type", "f16"]) == 0
    assert (run / "evaluate" / "scorecard.json").is_file(), "another form leaves the evaluation as it is"
