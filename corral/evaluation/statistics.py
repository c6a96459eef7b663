"""Estimates with their uncertainty, and comparisons of two variants on the same rows.

A `Measure` is a table of per-row statistics with the function that turns their column sums into the score. This form covers
means, ratios and corpus metrics, so each is resampled correctly: corpus BLEU is not a mean of sentence scores, nor loss per
token a mean of row losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.errors import InputError

Floats: TypeAlias = NDArray[np.float64]

TRIALS = 10_000
LEVEL = 0.95
POWER = 0.80

_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)
# Rows × trials held at once: 32 MB of float64.
_MAX_CELLS = 4_000_000


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric on n rows.

    Attributes:
        statistics: [n, k] each row's addends to the k sums.
        score: [..., k] sums → [...] scores.
        linear: the score is sum 0 over sum 1, so that the standard error has a closed form.
    """

    statistics: Floats
    score: Callable[[Floats], Floats]
    linear: bool

    @classmethod
    def ratio(cls, numerators: Floats, denominators: Floats) -> Measure:
        """Σ numerators / Σ denominators, clustered by row: loss per token from each row's nll and tokens."""
        return cls(np.stack([numerators, denominators], axis=1).astype(np.float64), _quotient, linear=True)

    @classmethod
    def mean(cls, values: Floats) -> Measure:
        """The mean of one value per row: the ratio whose denominators are 1."""
        return cls.ratio(values, np.ones(len(values)))

    @classmethod
    def corpus(cls, statistics: Floats, score: Callable[[Floats], Floats]) -> Measure:
        """Any score of summed statistics, such as BLEU; its uncertainty comes from resampling."""
        return cls(statistics.astype(np.float64), score, linear=False)

    @property
    def value(self) -> float:
        """The score on all rows."""
        return float(self.score(self.statistics.sum(axis=0)))

    def __len__(self) -> int:
        return len(self.statistics)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score, its standard error and 95 % interval (None if there is one row only), over n rows."""

    mean: float
    se: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """a compared with b on the same n rows.

    Attributes:
        difference: a − b.
        low, high: 95 % interval of the difference; None if there is one row only.
        p: two-sided p-value of the hypothesis that a and b are interchangeable row by row.
        se: standard error of the difference, or None.
        mde: smallest true difference that n such rows show with 80 % power at the 5 % level, which is divided among the
            metrics that are compared together; None if unknown: one row, or no spread (no row differs).
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    se: float | None
    mde: float | None
    n: int


def estimate(measure: Measure, *, seed: int, trials: int = TRIALS) -> Estimate:
    """The score with its uncertainty.

    Means and ratios: linearised standard error, clustered by row (for a mean that is √(s²/n)), and the normal interval
    (Miller, arXiv 2411.00640). Corpus scores: standard deviation and percentile interval of `trials` bootstrap
    resamples.

    Raises:
        InputError: there are no rows.
    """
    n = _row_count(measure)
    value = measure.value
    if n == 1:
        return Estimate(value, None, None, None, 1)
    if measure.linear:
        se = _standard_error(_influence(measure))
        return Estimate(value, se, value - _Z * se, value + _Z * se, n)
    scores = np.concatenate([measure.score(w @ measure.statistics) for w in _resamples(n, seed, trials)])
    low, high = _percentile_interval(scores)
    return Estimate(value, float(scores.std(ddof=1)), low, high, n)


def compare(a: Measure, b: Measure, *, seed: int, trials: int = TRIALS, metric_count: int = 1) -> PairedDifference:
    """Compare two variants on one metric; their rows are the same, in the same order.

    The interval is the percentile interval of `trials` paired bootstrap resamples (Koehn, 2004). p comes from `trials`
    rounds of approximate randomisation (Noreen, 1989): each swaps a and b in each row with probability 1/2, and
    p = (c + 1) / (trials + 1), where c counts the rounds whose difference is at least as large as the observed one. The
    standard error is the linearised one of the paired difference, or the bootstrap's for a corpus score.

    Args:
        metric_count: number of metrics that are compared together and adjusted by `holm`. The smallest p must be below 5 %
            divided by this number, so `mde` is for that level (Bonferroni's).

    Raises:
        InputError: there are no rows, or not the same number on both sides.
    """
    n = _row_count(a)
    if len(b) != n:
        raise InputError(f"{n} rows cannot be paired with {len(b)}", hint="compare two variants on the same rows")
    difference = a.value - b.value
    p = _randomisation_p(a, b, seed, trials)
    if n == 1:
        return PairedDifference(difference, None, None, p, None, None, 1)
    differences = np.concatenate(
        [a.score(w @ a.statistics) - b.score(w @ b.statistics) for w in _resamples(n, seed, trials)]
    )
    low, high = _percentile_interval(differences)
    se = _standard_error(_influence(a) - _influence(b)) if a.linear and b.linear else float(differences.std(ddof=1))
    # If all rows differ by the same amount, the spread is rounding only, and says nothing about smaller differences.
    has_spread = se > 1e-9 * max(abs(a.value), abs(b.value))
    mde = (NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * metric_count)) + _Z_POWER) * se if has_spread else None
    return PairedDifference(difference, low, high, p, se, mde, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple comparisons (Holm, 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted


def _row_count(measure: Measure) -> int:
    if not len(measure):
        raise InputError("there are no rows to estimate from", hint="evaluate on at least one row")
    return len(measure)


def _quotient(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def _influence(measure: Measure) -> Floats:
    """[n] each row's first-order effect on the ratio; the mean is 0."""
    numerators, denominators = measure.statistics.T
    return (numerators - measure.value * denominators) / denominators.mean()


def _standard_error(influence: Floats) -> float:
    return float(influence.std(ddof=1)) / math.sqrt(len(influence))


def _percentile_interval(scores: Floats) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resamples(n: int, seed: int, trials: int) -> Iterator[Floats]:
    """Chunks [m, n], `trials` in all: how often each of n rows was drawn in n draws with replacement."""
    rng = np.random.default_rng(seed)
    for m in _chunks(n, trials):
        drawn = rng.integers(n, size=(m, n)) + n * np.arange(m)[:, None]
        yield np.bincount(drawn.ravel(), minlength=m * n).reshape(m, n).astype(np.float64)


def _randomisation_p(a: Measure, b: Measure, seed: int, trials: int) -> float:
    rng = np.random.default_rng(seed)
    sums_a, sums_b = a.statistics.sum(axis=0), b.statistics.sum(axis=0)
    observed = abs(a.value - b.value)
    # Differences that are equal except for rounding count as ties.
    threshold = observed - 1e-9 * max(abs(a.value), abs(b.value))
    as_large = 0
    for m in _chunks(len(a), trials):
        swapped = rng.integers(2, size=(m, len(a))).astype(np.float64) @ (b.statistics - a.statistics)
        as_large += int(np.count_nonzero(np.abs(a.score(sums_a + swapped) - b.score(sums_b - swapped)) >= threshold))
    return (as_large + 1) / (trials + 1)


def _chunks(n: int, trials: int) -> Iterator[int]:
    size = max(1, _MAX_CELLS // n)
    for start in range(0, trials, size):
        yield min(size, trials - start)
