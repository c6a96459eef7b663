from __future__ import annotations

from typing import Any

import pytest

from corral.report.answer_examples import choose_examples
from tests.report.conftest import completions


def line(variant: str, number: int, answer: str, **changes: Any) -> dict[str, Any]:
    fields = {"id": str(number), "variant": variant, "prompt": [], "reference": "one two three four", "answer": answer}
    return fields | changes


def test_best_typical_and_worst_prompts_are_shown_by_their_rouge_l_difference() -> None:
    answers = ["one two three four", "one two three", "one two", "one", "x", "x", "x", "x"]
    lines = [line("base", n, "one two") for n in range(8)] + [line("tuned", n, a) for n, a in enumerate(answers)]
    choice, shown = choose_examples(lines)
    differences = [example.scores["tuned"] - example.scores["base"] for example in shown]
    assert [example.title.split(":")[0] for example in shown] == [
        *["Best"] * 2,
        *["Typical"] * 2,
        *["Worst"] * 2,
    ]
    assert differences == pytest.approx([score - 2 / 3 for score in (1, 6 / 7, 0.4, 0, 0, 0)])
    assert choice.startswith("6 of 8 prompts, chosen by how much ROUGE-L")
    assert "changed from base to tuned" in choice


@pytest.mark.parametrize("rows", range(1, 9))
def test_no_prompt_is_shown_twice(rows: int) -> None:
    _, shown = choose_examples([c for c in completions() if int(c["id"], 16) < rows])
    prompts = [id(example.prompt) for example in shown]
    assert len(set(prompts)) == len(prompts) == min(rows, 6)


def test_scores_in_the_file_are_taken_as_they_are() -> None:
    lines = [line("base", 0, "x", scores={"rougeL": 0.25}), line("tuned", 0, "x", scores={"rougeL": 0.75})]
    _, (shown,) = choose_examples(lines)
    assert shown.scores == {"base": 0.25, "tuned": 0.75}
    assert shown.title == "Best: ROUGE-L 0.25 → 0.75 (+0.50)"


@pytest.mark.parametrize("variants", [("tuned",), ("base", "tuned")])
def test_the_first_prompts_are_shown_when_nothing_can_be_compared(variants: tuple[str, ...]) -> None:
    lines = [line(v, n, "text", reference=None) for v in variants for n in range(9)]
    choice, shown = choose_examples(lines)
    assert choice == "The first 6 of 9 prompts, in the order of the file."
    assert [list(example.answers) for example in shown] == [list(variants)] * 6


@pytest.mark.parametrize(("baseline", "order"), [("base", ["base", "few", "tuned"]), ("few", ["few", "base", "tuned"])])
def test_the_baseline_comes_first_and_the_tuned_model_last(baseline: str, order: list[str]) -> None:
    _, (shown,) = choose_examples([line(v, 0, "one") for v in ("tuned", "base", "few")], baseline)
    assert list(shown.answers) == order
