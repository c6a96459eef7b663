"""Whether the model of a stage that aligns may be promoted: its figures beside those of the model that it started from.

The figures are in the stage's folder: `comparison/` has both models' losses and preferences on validation rows, in the files
of an evaluation, and `outcome.json` what the guards measured. The result follows from them and from the present settings of
`[train.guards]`, so that another limit needs no training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from corral.evaluation.scorecard import Comparison, Scorecard
from corral.formatting import round_up, signed
from corral.recipe.alignment import Guards

COMPARISON_FOLDER, SCORECARD = "comparison", "scorecard.json"
BEFORE, AFTER, QUANTISED = "before", "after", "quantised"
"""The variants: the model that the stage starts from, the one that it leaves, and the first with quantised weights."""
PRIMARY, MARGIN = "preference_accuracy", "preference_margin"

Outcome: TypeAlias = Literal["better", "worse", "equal", "unknown"]
_HEADLINES: Mapping[Outcome, str] = {
    "better": "better than the model that it started from, on the validation rows, which also chose its best weights",
    "worse": "worse than the model that it started from",
    "equal": "not worse than the model that it started from by more than its guards allow, nor seen to be better",
    "unknown": "not compared with the model that it started from, as there are no validation rows for it",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a model must not be promoted.

    Attributes:
        setting: of `[train.guards]`, with a value that would accept it; None if no setting does.
    """

    what: str
    setting: str | None


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the figures say of a stage's model.

    Attributes:
        outcome: `worse` if it has a fault, and must not be promoted; `better` if it puts more pairs into the right order, with
            an interval above 0; `equal` if neither can be told, and `unknown` if nothing was measured.
        figures: what was measured before and after, in words.
    """

    outcome: Outcome
    figures: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def headline(self) -> str:
        """The outcome in words, without figures."""
        return _HEADLINES[self.outcome]

    def __str__(self) -> str:
        return "; ".join([self.headline, *self.figures])


def check_aligned_model(stage: Path, guards: Guards) -> GateResult:
    """Judge the model in the folder of a finished stage. Raises: InputError (the scorecard is damaged)."""
    card = read_comparison(stage)
    comparisons = {c.metric: c for c in card.comparisons if c.a == AFTER} if card else {}
    accuracy, loss = comparisons.get(PRIMARY), comparisons.get("loss")
    gap = quantisation_gap(card) if card else None
    guarded = _GuardFigures.read(stage)
    figures = [_describe(card, c) for c in (accuracy, loss) if card is not None and c is not None]
    figures += [f"basic prompts answered well {guarded.asked} → {guarded.passed}"] if guarded.asked else []
    faults = tuple(_faults(comparisons, gap, guarded, guards))
    outcome: Outcome = "unknown"
    if faults:
        outcome = "worse"
    elif comparisons:
        outcome = "better" if accuracy is not None and accuracy.outcome == "better" else "equal"
    return GateResult(outcome, tuple(figures), faults)


def read_comparison(stage: Path) -> Scorecard | None:
    """The scorecard of a stage's comparison; None if it has none. Raises: InputError (it is damaged)."""
    path = stage / COMPARISON_FOLDER / SCORECARD
    return Scorecard.from_json(path.read_text("utf-8"), where=str(path)) if path.is_file() else None


def quantisation_gap(card: Scorecard) -> float | None:
    """By how much quantised weights raise the loss, in nats per token; None if that was not measured."""
    return next((c.difference for c in card.comparisons if (c.a, c.metric) == (QUANTISED, "loss")), None)


@dataclass(frozen=True, slots=True)
class _GuardFigures:
    """What the guards measured of the weights that a stage kept.

    Args:
        asked: basic prompts that the start model answered well.
        passed: how many of them these weights do.
        chosen_fall: of the log-probability of chosen answers, as a share of its size.
    """

    asked: int
    passed: int
    chosen_fall: float

    @classmethod
    def read(cls, stage: Path) -> _GuardFigures:
        """From a stage's `outcome.json`; zeros for what was not measured."""
        try:
            outcome: dict[str, Any] = json.loads((stage / "outcome.json").read_text("utf-8"))
        except (OSError, ValueError):
            return cls(0, 0, 0.0)
        found: dict[str, Any] = outcome.get("guards") or {}
        return cls(*(found.get(name) or 0 for name in ("basic_prompts", "basic_prompts_passed", "chosen_fall")))


def _faults(
    comparisons: Mapping[str, Comparison], gap: float | None, guarded: _GuardFigures, guards: Guards
) -> Iterator[Fault]:
    """Args: gap: what quantised weights add to the loss, which was accepted before the stage trained."""
    accuracy, margin, loss = (comparisons.get(name) for name in (PRIMARY, MARGIN, "loss"))
    # The order is by log-probability per token. An objective on sums may raise the margin, which is of sums, at its cost.
    if accuracy is not None and (accuracy.high or 0) < 0 and (margin is None or margin.difference < 0):
        yield Fault("it puts fewer pairs into the right order, and by a smaller margin", None)
    if loss is not None and (rise := loss.difference - (gap or 0)) > guards.loss_rise:
        higher = "higher" if gap is None else "higher than that of its quantised start model"
        what = f"its held-out loss is {rise:.3f} {higher}, and guards.loss_rise = {guards.loss_rise:g}"
        yield Fault(what, f"loss_rise={round_up(rise)}")
    if (fall := guarded.chosen_fall) > guards.chosen_fall:
        limit = f"guards.chosen_fall = {guards.chosen_fall:g}"
        what = f"its log-probability of chosen answers is lower by {fall:.3g} of its size, and {limit}"
        yield Fault(what, f"chosen_fall={round_up(fall)}")
    failing = guarded.asked - guarded.passed
    if not guards.allows_failing(failing, guarded.asked):
        share = f"guards.failing_prompts = {guards.failing_prompts:g}"
        what = f"it answers {failing} of {guarded.asked} basic prompts badly, and {share}"
        accepted = round_up(failing / guarded.asked)
        yield Fault(what, f"failing_prompts={accepted}" if float(accepted) < 1 else None)


def _describe(card: Scorecard, comparison: Comparison) -> str:
    """A metric before and after, and the difference."""
    before, after = (card.variants[name].metrics[comparison.metric].mean for name in (BEFORE, AFTER))
    if comparison.metric != PRIMARY:
        return f"held-out loss {before:.3f} → {after:.3f}"
    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f", 95 % interval {signed(comparison.low)} … {signed(comparison.high)}"
    change = f"{signed(comparison.difference)}{interval}"
    return f"preference accuracy {before:.3f} → {after:.3f} ({change}; {comparison.n} prompts)"
