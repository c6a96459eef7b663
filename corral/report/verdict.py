"""The first sentences of the page: what the run came to, or how far it got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from corral.evaluation.scorecard import Comparison, Outcome
from corral.formatting import JOIN, count, format_p_equation, listing, number, signed, unbroken
from corral.report.run_record import SCORECARD, RunRecord, as_number, as_objects, series
from corral.report.scores import OUTCOME_WORDS, MetricScores

Tone: TypeAlias = Outcome | Literal["pending"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The headline, whether it is good news, the figures that support it, and more sentences."""

    headline: str
    tone: Tone
    figures: str = ""
    details: Sequence[str] = ()


def give_verdict(record: RunRecord, scores: Sequence[MetricScores]) -> Verdict:
    """Whether the run helped, or how far it got."""
    if record.contract.get("passed") is False:
        checks = as_objects(record.contract.get("checks"))
        failed = listing([str(check.get("name")) for check in checks if check.get("passed") is False])
        names = f" ({failed})" if failed else ""
        return Verdict(
            f"The merged model is not the model that was trained: its contract failed{names}.",
            "worse",
            details=["It was kept, not promoted. The figures of the contract are below."],
        )
    # The last one that trained: one before it that may not be promoted has held nothing up.
    if record.trainings and (stopped := record.trainings[-1].stopped):
        return Verdict(
            f"{record.trainings[-1].name} did not come to its end: {stopped}.",
            "worse",
            details=["Its last good weights were kept. The run stands for the model that it had before, if any."],
        )
    if record.trainings and (gate := record.trainings[-1].gate) and gate.faults:
        faults = listing([fault.what for fault in gate.faults])
        kept = "The run stands for it all the same" if record.trainings[-1].promoted else "It was kept, not promoted"
        return Verdict(
            f"The model of {record.trainings[-1].name} is {gate.headline}: {faults}.",
            "worse",
            details=[f"{kept}. Both models’ figures are below."],
        )
    if compared := [score for score in scores if score.comparisons]:
        return _compared(compared)
    if scores:
        first = scores[0].metric
        values = listing([f"{name} {number(value.mean, first.digits)}" for name, value in scores[0].values.items()])
        return Verdict(f"{first.label}: {values}. Nothing was compared.", "pending")
    return _not_evaluated(record)


def _compared(compared: Sequence[MetricScores]) -> Verdict:
    # The primary metric decides; of several variants, the tuned model is what a run is about.
    first = next((score for score in compared if any(c.primary for c in score.comparisons)), compared[0])
    others = [score for score in compared if score is not first]
    main = next((c for c in first.comparisons if c.a == "tuned"), first.comparisons[-1])
    digits = first.metric.digits
    name = _lower_first(first.metric.label)
    a, b = first.values.get(main.a), first.values.get(main.b)
    if main.outcome == "undecided":
        means = f" ({number(a.mean, digits)} and {number(b.mean, digits)})" if a and b else ""
        headline = f"The data cannot tell the {main.a} model’s {name} from the {main.b} model’s{means}"
    else:
        verb = "fell" if main.difference < 0 else "rose"
        means = f" from {number(b.mean, digits)} to {number(a.mean, digits)}" if a and b else ""
        headline = f"The {main.a} model’s {name} {verb}{means}"
    facts = [f"difference {signed(main.difference, digits)}"]
    if main.low is not None and main.high is not None:
        facts.append(
            f"{100 * main.level:.3g}{JOIN}% interval {signed(main.low, digits)} to {signed(main.high, digits)}"
        )
    facts.append(unbroken(format_p_equation(main.p_holm)))
    figures = f"({', '.join(facts)}) on {count(main.n)} row{'s' * (main.n != 1)}."
    return Verdict(headline, main.outcome, figures, [*_sensitivity(main, digits), *_other_metrics(others, main)])


def _sensitivity(main: Comparison, digits: int) -> list[str]:
    """What difference the data could have shown, if they showed none."""
    if main.is_identical:
        share = f"{main.differing_at_most:.0%}"
        return [f"They came out the same in every row; of such rows at most {share} differ, at the 95{JOIN}% level."]
    if main.outcome == "undecided" and main.mde:
        return [f"A true difference of {number(main.mde, digits)} would have shown with 80{JOIN}% power."]
    return []


def _other_metrics(others: Sequence[MetricScores], main: Comparison) -> list[str]:
    """One sentence on the other metrics of the same pair, adjusted for their number."""
    parts: list[str] = []
    for outcome, word in OUTCOME_WORDS.items():
        labels = [
            _lower_first(score.metric.label)
            for score in others
            for c in score.comparisons
            if (c.a, c.b, c.outcome) == (main.a, main.b, outcome)
        ]
        if labels:
            parts.append(f"{word} {'by' if outcome == 'undecided' else 'on'} {listing(labels)}")
    return [f"{'Secondary' if main.primary else 'Other'} metrics: {'; '.join(parts)}."] if parts else []


def _lower_first(label: str) -> str:
    """A label inside a sentence; an abbreviation such as ROUGE stays as it is."""
    return label[0].lower() + label[1:] if label[1:2].islower() else label


def _not_evaluated(record: RunRecord) -> Verdict:
    damaged = any(note.startswith(SCORECARD) for note in record.notes)
    if record.trainings:
        training = record.trainings[-1]
        steps, losses = series(training.metrics, "eval_loss")
        last = int(as_number(training.metrics[-1].get("step")) or 0)
        if len(losses) > 1:
            text = f"held-out loss went from {number(losses[0])} to {number(losses[-1])} at step {int(steps[-1])}"
        else:
            _, trained = series(training.metrics, "loss")
            text = (
                f"training loss went from {number(trained[0])} to {number(trained[-1])}" if trained else "no loss yet"
            )
        return Verdict(
            f"{training.name} has reached step {last}: {text}.",
            "pending",
            details=["The scorecard cannot be read." if damaged else "The model has not been evaluated yet."],
        )
    if (total := as_number(record.ledger.get("rows"))) is not None:
        return Verdict(f"{count(total)} rows are prepared; training has not begun.", "pending")
    return Verdict("This run has a recipe and nothing else yet.", "pending")
