"""When training must stop because it has diverged, and which rows to look at.

Training stops at once for a loss or gradient norm that is not finite, and after ten steps for a loss that has exploded
(see `DivergenceMonitor`) or a gradient that is exactly zero, as that of a model whose outputs are saturated. Everything
here is arithmetic on numbers; nothing depends on the model or the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.errors import TrainingError

if TYPE_CHECKING:
    from corral.data.example_store import Example

PATIENCE = 10
"""Steps in a row above the bound, or without a gradient, after which training stops."""
_WINDOW = 100
_MARGIN, _EARLY_MARGIN = 1.0, 2.0
_WIDTH_FACTOR = 1.5
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class DivergenceMonitor:
    """The recent losses, and the bound that the next ones should not exceed.

    The loss has exploded when each of the last ten is above

        level + |level| + max(1, 1.5 × width)

    where `level` is the lowest median of any hundred consecutive losses before them, and `width` the distance from it to
    the ninetieth percentile of the same hundred. The first hundred steps do not count, because losses fall in them. Until
    there are two hundred, the later half of those that exist stands in for the hundred, with 2 instead of 1.

    The bound is meant never to stop a healthy run: with shuffled rows the losses of a model that learns are level or fall,
    a single spike ends in fewer than ten steps, and independent losses of any distribution are above their ninetieth
    percentile ten times in a row once in 10¹⁰ steps. A diverged model does not return below twice its best loss: at best it
    predicts words by their frequency, some 7 nats a token. The idea (so many steps in a row above twice a running average)
    is from LLM Foundry's `KillLossSpike`; the best level replaces the average, which a slow divergence would raise, and the
    bound takes the noise into account.

    Immutable, and part of every checkpoint, so that a resumed run stops where an uninterrupted one does. The fields' names
    are keys of the checkpoint's `state.json`.
    """

    recent: tuple[float, ...] = ()
    """The last losses that are still needed, oldest first."""
    level: float | None = None
    """None until two hundred steps are older than the last ten."""
    width: float = 0.0
    still: int = 0
    """Steps in a row whose gradient was exactly zero."""

    def updated(self, loss: float, norm: float) -> DivergenceMonitor:
        """With the (finite) loss and gradient norm of one more step."""
        still = self.still + 1 if norm == 0 else 0
        recent = (*self.recent, loss)[-(2 * _WINDOW + PATIENCE) :]
        before = recent[:-PATIENCE]
        if len(before) < 2 * _WINDOW:
            return DivergenceMonitor(recent, still=still)
        level, width = _median_and_width(before[_WINDOW:])
        if self.level is not None and level >= self.level:
            level, width = self.level, self.width
        return DivergenceMonitor(recent, level, width, still)

    @property
    def bound(self) -> float:
        """What the next losses should not exceed; infinity while too few losses are known."""
        if self.level is not None:
            return _bound(self.level, self.width, _MARGIN)
        before = self.recent[:-PATIENCE]
        return _bound(*_median_and_width(before[len(before) // 2 :]), _EARLY_MARGIN) if before else math.inf

    @property
    def steps_above_bound(self) -> int:
        """How many of the last losses, up to PATIENCE, are above the bound in a row."""
        bound = self.bound
        last = self.recent[-PATIENCE:][::-1]
        return next((count for count, loss in enumerate(last) if loss <= bound), len(last))

    @property
    def exploded(self) -> bool:
        """Whether training should stop."""
        return self.steps_above_bound == PATIENCE


def _median_and_width(losses: Sequence[float]) -> tuple[float, float]:
    """(median, distance from it to the ninetieth percentile)."""
    ordered = sorted(losses)
    level = ordered[len(ordered) // 2]
    return level, ordered[len(ordered) * 9 // 10] - level


def _bound(level: float, width: float, margin: float) -> float:
    return level + abs(level) + max(margin, _WIDTH_FACTOR * width)


MeasureExample = Callable[["Example"], tuple[float, float]]
"""Example → (loss per unit, gradient norm), computed for it alone with the current weights."""


def check_step(
    step: int,
    loss: float,
    norm: float,
    monitor: DivergenceMonitor,
    batch: Sequence[Example],
    measure_one: MeasureExample,
) -> None:
    """Check the loss and gradient of a step before the weights are updated.

    Args:
        loss: mean over the step's units.
        norm: of the gradient, before clipping.
        monitor: updated with this loss.
        batch: the step's examples.
        measure_one: called for each of them if the check fails, to name the rows at fault.

    Raises:
        TrainingError: a number is not finite, the loss has exploded, or the gradient has vanished.
    """
    bound = None
    if not (math.isfinite(loss) and math.isfinite(norm)):
        problem = f"loss is {loss:g} and gradient norm {norm:g}"
    elif monitor.exploded:
        bound = monitor.bound
        problem = f"the loss has exploded: it is {loss:.4g}, and for {PATIENCE} steps it was above {bound:.4g}, "
        problem += "about twice what it had been"
    elif monitor.still >= PATIENCE:
        problem = f"nothing is learnt any more: for {PATIENCE} steps the gradient was exactly zero (loss {loss:.4g})"
    else:
        return
    where = _faulty_rows("the batch", batch, measure_one, bound)
    raise TrainingError(f"step {step}: {problem}", where=where, hint=_hint(f" before step {step}"))


def check_held_out(loss: float, rows: Sequence[Example], measure_one: MeasureExample) -> None:
    """Raises TrainingError if the held-out loss is not finite."""
    if not math.isfinite(loss):
        where = _faulty_rows("the held-out rows", rows, measure_one)
        raise TrainingError(f"the held-out loss is {loss:g}", where=where, hint=_hint(" before"))


def _hint(before: str) -> str:
    return (
        "lower `optimizer.lr` of this stage (the stage then starts over; its checkpoints are set aside and come back with "
        "the old settings), or look at these rows with `corral inspect` and correct or remove them. Checkpoints and weights "
        f"from{before} are kept; the same recipe would resume from them and reach the same step again"
    )


def _faulty_rows(group: str, rows: Sequence[Example], measure_one: MeasureExample, bound: float | None = None) -> str:
    """Lists the rows whose own numbers are not finite or above the bound; all rows if there are none."""
    measured = [(example, *measure_one(example)) for example in rows]
    if bound is None:
        faulty = [m for m in measured if not (math.isfinite(m[1]) and math.isfinite(m[2]))]
    else:
        faulty = sorted((m for m in measured if not m[1] <= bound), key=lambda m: -m[1])
    if not faulty:
        return f"rows of {group}, none of which is at fault by itself: {_list_rows(measured)}"
    if len(faulty) == len(rows) > 1:
        return f"all {len(rows)} rows of {group}, so the weights may be at fault: {_list_rows(faulty)}"
    return f"{len(faulty)} of {len(rows)} rows of {group}: {_list_rows(faulty)}"


def _list_rows(rows: Sequence[tuple[Example, float, float]]) -> str:
    listed = [
        f"{e.source} row {e.index} (loss {loss:.4g}"
        + ("" if math.isfinite(norm) else f", gradient norm {norm:g}")
        + ")"
        for e, loss, norm in rows[:_MAX_LISTED]
    ]
    more = f" and {len(rows) - _MAX_LISTED} more" if len(rows) > _MAX_LISTED else ""
    return ", ".join(listed) + more
