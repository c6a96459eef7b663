"""When training must stop because it has gone wrong, and which rows to look at.

Three faults are known. A loss or gradient norm that is not a finite number stops at once. A loss that has exploded stops
after ten steps: see `Watch`; so does a gradient that is exactly zero, as that of a model whose outputs are saturated.
Everything here is plain arithmetic on numbers that it is given. It does not know the model, nor how a row's loss is computed,
nor what a loss means: nothing here depends on the objective.
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
"""Steps in a row above the bound, or without a gradient, until training stops."""
_WINDOW = 100
_MARGIN, _EARLY_MARGIN = 1.0, 2.0
_WIDTHS = 1.5
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Watch:
    """What the losses so far say about the next ones.

    The loss has exploded when each of the last ten is above

        level + |level| + max(1, 1.5 × width)

    where `level` is the lowest median of any hundred losses in a row before them, and `width` how far the ninetieth
    percentile of these hundred is above it. The first hundred steps do not count, as losses fall in them; until there are two
    hundred, the later half of those there are stands for the hundred, with 2 in the place of 1.

    It is made to stay silent while a run is well: in the order of a seeded shuffle the losses of a run that learns are level
    or fall, a single spike is over in fewer than ten steps, and losses that do not depend on each other, however they are
    distributed, are ten in a row above their ninetieth percentile once in 10¹⁰ steps. A model that has come apart does not
    return below twice its best loss: it puts out words by their frequency at best, some 7 nats a token. The idea (so many
    steps in a row above twice a running average) is that of LLM Foundry's `KillLossSpike`; the best level stands for the
    average, as a slow divergence cannot take it along, and the bound knows the noise.

    A value, not a process: it is kept in checkpoints, so that a resumed run stops where an uninterrupted one does.
    """

    recent: tuple[float, ...] = ()
    """The last losses, the newest last; as many as are needed."""
    level: float | None = None
    """None until two hundred steps are older than the last ten."""
    width: float = 0.0
    still: int = 0
    """Steps in a row whose gradient was exactly zero."""

    def after(self, loss: float, norm: float) -> Watch:
        """With the (finite) loss and gradient norm of one more step."""
        still = self.still + 1 if norm == 0 else 0
        recent = (*self.recent, loss)[-(2 * _WINDOW + PATIENCE) :]
        before = recent[:-PATIENCE]
        if len(before) < 2 * _WINDOW:
            return Watch(recent, still=still)
        level, width = _shape(before[_WINDOW:])
        lower = self.level is None or level < self.level
        return Watch(recent, level, width, still) if lower else Watch(recent, self.level, self.width, still)

    @property
    def bound(self) -> float:
        """What the next losses should not stay above; infinity while too few are known."""
        if self.level is not None:
            return _bound(self.level, self.width, _MARGIN)
        before = self.recent[:-PATIENCE]
        return _bound(*_shape(before[len(before) // 2 :]), _EARLY_MARGIN) if before else math.inf

    @property
    def above(self) -> int:
        """How many of the last losses are above the bound, in a row. Checkpoints of these steps are in doubt."""
        bound = self.bound
        count = 0
        for loss in reversed(self.recent[-PATIENCE:]):
            if loss <= bound:
                break
            count += 1
        return count

    @property
    def exploded(self) -> bool:
        """Whether training should stop."""
        return self.above == PATIENCE


def _shape(losses: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(losses)
    level = ordered[len(ordered) // 2]
    return level, ordered[len(ordered) * 9 // 10] - level


def _bound(level: float, width: float, margin: float) -> float:
    return level + abs(level) + max(margin, _WIDTHS * width)


Alone = Callable[["Example"], tuple[float, float]]
"""An example → its loss per unit and its gradient norm, computed by itself with the weights as they are."""


def check(step: int, loss: float, norm: float, watch: Watch, batch: Sequence[Example], alone: Alone) -> None:
    """Whether training may go on after the losses and gradients of a step, and before its weights are changed.

    Args:
        loss: mean over the step's units.
        norm: of the gradient, before clipping.
        watch: with this loss.
        batch: the step's examples.
        alone: asked for each of them if there is a fault.

    Raises:
        TrainingError: a number is not finite, or the loss has exploded; the rows at fault are named.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: loss is {loss:g} and gradient norm {norm:g}",
            where=_rows("the batch", batch, alone),
            hint=_hint(step),
        )
    if watch.exploded:
        raise TrainingError(
            f"step {step}: the loss has exploded: it is {loss:.4g}, and for {PATIENCE} steps it was above {watch.bound:.4g}, "
            f"about twice what it had been",
            where=_rows("the batch", batch, alone, watch.bound),
            hint=_hint(step),
        )

    if watch.still >= PATIENCE:
        raise TrainingError(
            f"step {step}: nothing is learnt any more: for {PATIENCE} steps the gradient was exactly zero (loss {loss:.4g})",
            where=_rows("the batch", batch, alone),
            hint=_hint(step),
        )


def check_held_out(loss: float, rows: Sequence[Example], alone: Alone) -> None:
    """Raises TrainingError if the held-out loss is not a finite number."""
    if not math.isfinite(loss):
        where = _rows("the held-out rows", rows, alone)
        raise TrainingError(f"the held-out loss is {loss:g}", where=where, hint=_hint(None))


def _hint(step: int | None) -> str:
    before = " before" if step is None else f" before step {step}"
    return (
        "lower `optimizer.lr` of this stage (it then starts anew, and what it has so far is set aside, to come back with the "
        "old settings), or look at these rows with `corral inspect`, and mend them or leave them out. What checkpoints and "
        f"weights there are from{before} are kept; the same recipe would go on from them and come to the same step again"
    )


def _rows(of: str, rows: Sequence[Example], alone: Alone, bound: float | None = None) -> str:
    """Those at fault, not finite or above the bound; all of them if none is by itself."""
    measured = [(example, *alone(example)) for example in rows]
    if bound is None:
        bad = [m for m in measured if not (math.isfinite(m[1]) and math.isfinite(m[2]))]
    else:
        bad = sorted((m for m in measured if not m[1] <= bound), key=lambda m: -m[1])
    if not bad:
        return f"rows of {of}, each of which is well by itself: {_list(measured)}"
    if len(bad) == len(rows) > 1:
        return f"all {len(rows)} rows of {of}, so the fault may lie in the weights: {_list(bad)}"
    return f"{len(bad)} of {len(rows)} rows of {of}: {_list(bad)}"


def _list(rows: Sequence[tuple[Example, float, float]]) -> str:
    named = [
        f"{e.source} row {e.index} (loss {loss:.4g}"
        + ("" if math.isfinite(norm) else f", gradient norm {norm:g}")
        + ")"
        for e, loss, norm in rows[:_NAMED]
    ]
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(named) + more
