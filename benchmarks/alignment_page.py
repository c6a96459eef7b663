"""Figures of aligned models → docs/alignment.md: tables, and sentences generated from the figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from findings_page import markdown_table, sentence

from corral.evaluation.alignment_gate import AFTER, BEFORE, read_comparison
from corral.evaluation.scorecard import Comparison, Scorecard
from corral.evaluation.statistics import holm
from corral.evaluation.tables import cost_rows
from corral.formatting import signed
from corral.recipe import Train

ACCURACY, MARGIN, LOSS = "preference_accuracy", "preference_margin", "loss"


@dataclass(frozen=True)
class Candidate:
    """One training stage: an objective at a rate.

    Args:
        steps: the lines of its `metrics.jsonl`.
        validation: preference accuracy on validation prompts before and after; None if it was stopped before.
        prompts: basic prompts that the kept weights answer well, and that the model before did; None if it was stopped.
        reference_seconds: processor seconds of log-probabilities under the reference; 0 if they were there.
        training_seconds: processor seconds of the steps and the checks between them.
        memory: the peak resident size of the process that trained, in bytes.
        stopped: what a guard or a check said, if it stopped the stage.
    """

    name: str
    objective: str
    rate: float
    steps: Sequence[Mapping[str, Any]]
    validation: tuple[float, float] | None
    prompts: tuple[int, int] | None
    reference_seconds: float
    training_seconds: float
    memory: int
    stopped: str | None

    @classmethod
    def read(cls, name: str, config: Train, stage: Path, figures: Path) -> Candidate:
        """From the folder of the stage, which may be unfinished, and what its process printed."""
        printed = json.loads(figures.read_text("utf-8"))
        lines = stage / "metrics.jsonl"
        steps = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
        card, outcome = read_comparison(stage), stage / "outcome.json"
        means = {side: variant.metrics[ACCURACY].mean for side, variant in card.variants.items()} if card else {}
        validation = (means[BEFORE], means[AFTER]) if AFTER in means else None
        guards = json.loads(outcome.read_text("utf-8"))["guards"] if outcome.exists() else None
        prompts = guards and (guards["basic_prompts_passed"], guards["basic_prompts"])
        return cls(
            name,
            config.objective,
            config.optimizer.lr,
            steps,
            validation,
            prompts,
            printed["reference_seconds"],
            printed["training_seconds"],
            printed["peak_memory_bytes"],
            printed["stopped"],
        )

    @property
    def chosen_fall(self) -> float | None:
        """The largest share by which the log-probability of chosen answers had fallen at an evaluation."""
        return max((step["chosen_fall"] for step in self.steps if step.get("chosen_fall") is not None), default=None)


@dataclass(frozen=True)
class Page:
    """Everything on the page.

    Args:
        prompts: of each side how many pairs there are about each prompt.
        candidates: of each objective, all rates that it tried.
        best: of each objective the candidate that was judged on test prompts, if any could be.
        test: its models beside the fine-tuned one, by objective.
        too_high: DPO at rates that are doubled until a guard stops it.
        wrong_reference: DPO against the raw base model.
        without_sft_term: DPO with and without its second term.
    """

    model: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    prompts: Mapping[str, Mapping[str, int]]
    steps: int
    candidates: Mapping[str, Sequence[Candidate]]
    best: Mapping[str, Candidate]
    test: Scorecard
    too_high: Sequence[Candidate]
    wrong_reference: Candidate
    without_sft_term: tuple[Candidate, Candidate]


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one with the best preference accuracy on validation prompts, of those that nothing stopped."""
    whole = [c for c in candidates if c.stopped is None and c.validation is not None]
    return max(whole, key=lambda c: c.validation[1] if c.validation else 0.0, default=None)


def write_page(page: Page) -> str:
    """The page, as Markdown."""
    sides = "; ".join(
        f"{side} {sum(pairs.values())} pairs about {len(pairs)} prompts" for side, pairs in page.prompts.items()
    )
    shared = sum(count > 1 for count in Counter(prompt for pairs in page.prompts.values() for prompt in pairs).values())
    machine = (
        f"{page.machine['cpu']}, {page.machine['cores']} cores, {page.machine['os']}, Python {page.machine['python']}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in page.versions.items())
    lines = [
        "# Alignment, measured",
        "",
        "Generated by `python benchmarks/alignment.py`; do not edit. Every sentence below is made from the figures of one "
        "run.",
        "",
        f"The model is {page.model}, fine-tuned on harmless answers and then aligned by each objective with the same pairs, "
        f"for {page.steps} steps, as in [recipes/quickstart-align.toml](../recipes/quickstart-align.toml). "
        f"{sides.capitalize()}; prompts on two sides: {shared}. Each objective tried the rates below; the one that put most "
        "validation pairs into the right order was judged on the test prompts, once. "
        f"Seconds are those of a processor core. Machine: {machine}. {versions}.",
        "",
        "Preference accuracy is the share of pairs whose better answer has the higher log-probability per token; the margin "
        "is in nats, over whole answers. Differences are paired with the fine-tuned model, and their intervals (95 %, each by "
        "itself) clustered by prompt; the p of preference accuracy is adjusted for the number of objectives (Holm). A "
        "basic prompt is one that the fine-tuned model answered well. One small model, one seed: these are no laws.",
        "",
        "## Every objective, on test prompts",
        "",
        *markdown_table(_TEST_HEADER, [_test_row(page, name) for name in page.test.variants]),
        "",
        *(f"- {line}" for line in _verdicts(page)),
        "",
        "## Rates, on validation prompts",
        "",
        *markdown_table(_RATE_HEADER, [_rate_row(c) for tried in page.candidates.values() for c in tried]),
        "",
        "## Mistakes that broke a model elsewhere",
        "",
        *_mistakes(page),
    ]
    return "\n".join(lines) + "\n"


_TEST_HEADER = (
    *("model", "rate", "preference accuracy ↑", "difference (interval)", "margin, difference", "held-out loss ↓"),
    *("basic prompts", "tokens per answer", "reference, s", "training, s", "memory, GB"),
)


def _test_row(page: Page, name: str) -> tuple[str, ...]:
    card, best = page.test, page.best.get(name)
    metrics, lengths = card.variants[name].metrics, {row[1]: row[4] for row in cost_rows(card.variants)[1:]}
    comparisons = {c.metric: c for c in card.comparisons if c.a == name}
    accuracy, margin = comparisons.get(ACCURACY), comparisons.get(MARGIN)
    return (
        name,
        f"{best.rate:g}" if best else "",
        f"{metrics[ACCURACY].mean:.3f}",
        "" if accuracy is None else _difference(accuracy, 3),
        "" if margin is None else _difference(margin, 1),
        f"{metrics[LOSS].mean:.3f}",
        f"{best.prompts[0]} of {best.prompts[1]}" if best and best.prompts else "",
        lengths.get(name, ""),
        f"{page.candidates[name][0].reference_seconds:.0f}" if best else "",
        f"{best.training_seconds:.0f}" if best else "",
        f"{best.memory / 1e9:.1f}" if best else "",
    )


def _difference(comparison: Comparison, digits: int) -> str:
    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f" ({signed(comparison.low, digits)} … {signed(comparison.high, digits)})"
    return f"{signed(comparison.difference, digits)}{interval}"


def _verdicts(page: Page) -> list[str]:
    compared = [c for c in page.test.comparisons if c.metric == ACCURACY and c.a in page.best]
    adjusted = holm([c.p for c in compared])
    return [
        *(sentence(c.model_copy(update={"p_holm": p})) for c, p in zip(compared, adjusted, strict=True)),
        *(f"**{name}** was stopped at every rate." for name in page.candidates if name not in page.best),
    ]


_RATE_HEADER = ("objective", "rate", "preference accuracy", "chosen fell by", "basic prompts", "seconds", "stopped by")


def _rate_row(candidate: Candidate) -> tuple[str, ...]:
    accuracy = candidate.validation and f"{candidate.validation[0]:.3f} → {candidate.validation[1]:.3f}"
    return (
        candidate.objective,
        f"{candidate.rate:g}",
        accuracy or "",
        "" if candidate.chosen_fall is None else f"{max(0.0, candidate.chosen_fall):.1%}",
        f"{candidate.prompts[0]} of {candidate.prompts[1]}" if candidate.prompts else "",
        f"{candidate.training_seconds:.0f}",
        _cell(candidate.stopped),
    )


def _mistakes(page: Page) -> list[str]:
    with_term, without = page.without_sft_term
    last = page.too_high[-1]
    went_on = ", ".join(f"{c.rate:g}" for c in page.too_high if c.stopped is None)
    falls = [
        "not measured" if c.chosen_fall is None else f"{max(0.0, c.chosen_fall):.1%}" for c in (with_term, without)
    ]
    return [
        f"**A learning rate that is too high.** DPO's rate was doubled from {page.too_high[0].rate:g}."
        + (f" At {went_on} nothing stopped it." if went_on else "")
        + (f" At {last.rate:g} it was stopped: {last.stopped}" if last.stopped else " No guard stopped it."),
        "",
        "**The wrong reference.** The log-probabilities of the raw base model were put in place of those of the fine-tuned "
        f"one, by hand, as no setting does it. {_refusal(page.wrong_reference)}",
        "",
        f"**Without the likelihood of chosen answers.** At the rate {without.rate:g} their log-probability on validation rows "
        f"had fallen by {falls[1]} at most without the second term (`sft_weight = 0`), and by {falls[0]} with it."
        + (f" Without it the stage was stopped: {without.stopped}" if without.stopped else ""),
    ]


def _refusal(candidate: Candidate) -> str:
    return f"It was refused: {candidate.stopped}" if candidate.stopped else "It was **not** refused."


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")
