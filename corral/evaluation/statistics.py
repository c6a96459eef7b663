"""Estimates with their uncertainty, and comparisons of two variants on the same rows.

A `Measure` is a table of per-row statistics with the function that turns their column sums into the score. This form covers
means, ratios and corpus metrics, so each is resampled correctly: corpus BLEU is not a mean of sentence scores, nor loss per
token a mean of row losses. Rows that share a passage are one unit: their statistics are added up first.

The interval and the p-value of a difference are two readings of one method, so that they cannot contradict each other: an
interval at level 1 − α leaves out 0 if and only if p < α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.errors import InputError
from corral.evaluation.distributions import binomial_interval, sign_test_p, t_quantile, t_tail

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

TRIALS = 10_000
LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.80

_NORMAL = NormalDist()
# Rows × trials held at once: 32 MB of float64.
_MAX_CELLS = 4_000_000


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric on n units: rows, or clusters of rows.

    Attributes:
        statistics: [n, k] each unit's addends to the k sums.
        score: [..., k] sums → [...] scores.
        kind: `rate`: the share of units whose statistic 0 is 1 rather than 0. `ratio`: sum 0 over sum 1. Both have a standard
            error in closed form. `corpus`: any score of the sums.
    """

    statistics: Floats
    score: Callable[[Floats], Floats]
    kind: Literal["rate", "ratio", "corpus"]

    @classmethod
    def ratio(cls, numerators: Floats, denominators: Floats) -> Measure:
        """Σ numerators / Σ denominators, clustered by row: loss per token from each row's nll and tokens."""
        return cls(np.stack([numerators, denominators], axis=1).astype(np.float64), _quotient, "ratio")

    @classmethod
    def mean(cls, values: Floats) -> Measure:
        """The mean of one value per row: the ratio whose denominators are 1."""
        return cls.ratio(values, np.ones(len(values)))

    @classmethod
    def rate(cls, hits: Sequence[bool]) -> Measure:
        """The share of rows that are hits."""
        return replace(cls.mean(np.array(hits, dtype=np.float64)), kind="rate")

    @classmethod
    def corpus(cls, statistics: Floats, score: Callable[[Floats], Floats]) -> Measure:
        """Any score of summed statistics, such as BLEU; its uncertainty comes from resampling."""
        return cls(statistics.astype(np.float64), score, "corpus")

    def select(self, rows: Sequence[int]) -> Measure:
        """The same metric on some of the units."""
        return replace(self, statistics=self.statistics[list(rows)])

    def clustered(self, keys: Sequence[str]) -> Measure:
        """With the rows of one key as one unit. A rate of clusters is a ratio: no longer a count of hits among n."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        if len(numbers) == len(self):
            return self
        sums = np.zeros((len(numbers), self.statistics.shape[1]))
        np.add.at(sums, [numbers[key] for key in keys], self.statistics)
        return replace(self, statistics=sums, kind="ratio" if self.kind == "rate" else self.kind)

    @property
    def value(self) -> float:
        """The score on all units."""
        return float(self.score(self.statistics.sum(axis=0)))

    def __len__(self) -> int:
        return len(self.statistics)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score, its standard error and 95 % interval over n units.

    They are None where the data do not show a spread: of one unit, or of units that are all alike. A rate has an exact
    interval also then: 0 of 50 says that the true rate is below 7 %.
    """

    mean: float
    se: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """a compared with b on the same n units.

    Attributes:
        difference: a − b.
        p: two-sided p-value of the hypothesis that the true difference is 0.
        se: standard error of the difference, or None.
    """

    difference: float
    p: float
    se: float | None
    n: int
    _interval: Callable[[float], Interval | None]
    _smallest_step: float

    def interval(self, alpha: float) -> Interval | None:
        """The 1 − alpha interval of the difference, which leaves out 0 if and only if p < alpha; None if it is unknown."""
        return self._interval(alpha)

    def detectable(self, alpha: float) -> float | None:
        """The smallest true difference that n such units show at this level with 80 % power; None if it is unknown: one unit,
        or no spread (no unit differs)."""
        if not self.se:
            return None
        return (t_quantile(alpha / 2, self.n - 1) + _NORMAL.inv_cdf(POWER)) * self.se + self._smallest_step


def estimate(measure: Measure, *, seed: int, trials: int = TRIALS) -> Estimate:
    """The score with its uncertainty.

    Rates: the exact interval (Clopper & Pearson). Means and ratios: linearised standard error, clustered by unit (for a mean
    that is √(s²/n)), and Student's interval (Miller, arXiv 2411.00640). Corpus scores: standard deviation and percentile
    interval of `trials` bootstrap resamples.

    Raises:
        InputError: there are no rows.
    """
    n, value = _row_count(measure), measure.value
    se, interval = None, None
    if measure.kind == "corpus" and n > 1:
        bootstrap = _Bootstrap(
            np.concatenate([measure.score(w @ measure.statistics) for w in _resamples(n, seed, trials)]), n
        )
        se, interval = bootstrap.se, bootstrap.interval(ALPHA)
    elif n > 1:
        se = _standard_error(_influence(measure))
        half = t_quantile(ALPHA / 2, n - 1) * se
        interval = value - half, value + half
    if not _is_spread(se, value):
        se = interval = None
    if measure.kind == "rate":
        interval = binomial_interval(round(measure.statistics[:, 0].sum()), n, ALPHA)
    low, high = interval or (None, None)
    return Estimate(value, se, low, high, n)


def compare(a: Measure, b: Measure, *, seed: int, trials: int = TRIALS) -> PairedDifference:
    """Compare two variants on one metric; their units are the same, in the same order.

    Rates: McNemar's exact test, and the interval that inverts it (`_rate_interval`). All else: `trials` paired bootstrap
    resamples (Koehn, 2004); percentiles, widened for few units as Student's t widens the normal interval (Hesterberg, 2015),
    and the p-value that inverts them. The standard error is the linearised one, or the bootstrap's for a corpus score.

    Raises:
        InputError: there are no rows, or not the same number on both sides.
    """
    n = _row_count(a)
    if len(b) != n:
        raise InputError(f"{n} rows cannot be paired with {len(b)}", hint="compare two variants on the same rows")
    difference = a.value - b.value
    scale = max(abs(a.value), abs(b.value))
    linear_se = None if n == 1 or a.kind == "corpus" else _standard_error(_influence(a) - _influence(b))
    if a.kind == "rate" == b.kind:
        won = int(np.count_nonzero(a.statistics[:, 0] > b.statistics[:, 0]))
        lost = int(np.count_nonzero(a.statistics[:, 0] < b.statistics[:, 0]))
        p = sign_test_p(won, lost)
        return PairedDifference(difference, p, linear_se, n, lambda alpha: _rate_interval(won, lost, n, alpha), 1 / n)
    if n == 1:
        return PairedDifference(difference, 1.0, None, 1, lambda alpha: None, 0.0)
    draws = [a.score(w @ a.statistics) - b.score(w @ b.statistics) for w in _resamples(n, seed, trials)]
    bootstrap = _Bootstrap(np.concatenate(draws), n, tie=1e-9 * scale)
    se = bootstrap.se if linear_se is None else linear_se
    if not _is_spread(se, scale):
        # All rows differ by the same amount: the spread is rounding only, and says nothing about other rows.
        return PairedDifference(difference, bootstrap.p if difference else 1.0, 0.0, n, lambda alpha: None, 0.0)
    return PairedDifference(difference, bootstrap.p, se, n, bootstrap.interval, 0.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple comparisons (Holm, 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm's procedure tests each p, in the order given: p is below it if and only if its adjusted p is
    below alpha. After the first p that is not, the procedure stops, and the rest stay at that level."""
    levels = [0.0] * len(p_values)
    level = 0.0
    stopped = False
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not stopped:
            level = alpha / (len(p_values) - rank)
            stopped = p_values[index] >= level
        levels[index] = level
    return levels


class _Bootstrap:
    """Scores of resamples of n units, sorted; those within `tie` of 0 count as 0."""

    def __init__(self, scores: Floats, n: int, tie: float = 0.0) -> None:
        self._scores = np.sort(np.where(np.abs(scores) <= tie, 0.0, scores))
        self._n = n
        self._widen = math.sqrt(n / (n - 1))
        self.se = float(scores.std(ddof=1))

    def interval(self, alpha: float) -> Interval | None:
        """None where there are too few units or resamples for this level."""
        tail = _NORMAL.cdf(-self._widen * t_quantile(alpha / 2, self._n - 1))
        # The most resamples that may lie on the other side of 0 if p is below alpha.
        most = math.ceil(tail * (len(self._scores) + 1)) - 2
        if most < 0:
            return None
        return float(self._scores[most]), float(self._scores[-1 - most])

    @property
    def p(self) -> float:
        """Twice the share of resamples at or beyond 0, through the same widening as the interval."""
        beyond = min(np.count_nonzero(self._scores <= 0), np.count_nonzero(self._scores >= 0))
        tail = min(0.5, (int(beyond) + 1) / (len(self._scores) + 1))
        return 2 * t_tail(-_NORMAL.inv_cdf(tail) / self._widen, self._n - 1)


def _rate_interval(won: int, lost: int, n: int, alpha: float) -> Interval:
    """The interval of (won − lost) / n.

    The difference is the share d of units that differ times 2θ − 1, where θ is the share won of these. Each has an exact
    interval; MOVER (Donner & Zou, 2012) puts the two together, in such a way that the result leaves out 0 exactly if θ's
    leaves out ½, which is McNemar's test. Where no unit differs, it says how many may.
    """
    differing = won + lost
    share, (share_low, share_high) = differing / n, binomial_interval(differing, n, alpha)
    lean = (won - lost) / differing if differing else 0.0
    lean_low, lean_high = (2 * theta - 1 for theta in binomial_interval(won, differing, alpha))
    below = math.hypot(share * (lean - lean_low), lean_low * ((share_high if lean_low < 0 else share_low) - share))
    above = math.hypot(share * (lean_high - lean), lean_high * ((share_high if lean_high > 0 else share_low) - share))
    return max(-1.0, share * lean - below), min(1.0, share * lean + above)


def _row_count(measure: Measure) -> int:
    if not len(measure):
        raise InputError("there are no rows to estimate from", hint="evaluate on at least one row")
    return len(measure)


def _is_spread(se: float | None, scale: float) -> bool:
    """Whether a standard error is more than rounding."""
    return se is not None and se > 1e-9 * abs(scale)


def _quotient(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def _influence(measure: Measure) -> Floats:
    """[n] each unit's first-order effect on the ratio; the mean is 0."""
    numerators, denominators = measure.statistics.T
    return (numerators - measure.value * denominators) / denominators.mean()


def _standard_error(influence: Floats) -> float:
    return float(influence.std(ddof=1)) / math.sqrt(len(influence))


def _resamples(n: int, seed: int, trials: int) -> Iterator[Floats]:
    """Chunks [m, n], `trials` in all: how often each of n units was drawn in n draws with replacement."""
    rng = np.random.default_rng(seed)
    for m in _chunks(n, trials):
        drawn = rng.integers(n, size=(m, n)) + n * np.arange(m)[:, None]
        yield np.bincount(drawn.ravel(), minlength=m * n).reshape(m, n).astype(np.float64)


def _chunks(n: int, trials: int) -> Iterator[int]:
    size = max(1, _MAX_CELLS // n)
    for start in range(0, trials, size):
        yield min(size, trials - start)
