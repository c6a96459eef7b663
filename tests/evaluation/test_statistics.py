from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corral.errors import InputError
from corral.evaluation.statistics import Measure, compare, estimate, holm
from corral.metrics.bleu import bleu

Floats = NDArray[np.float64]


def measure(kind: str, rows: int, seed: int, shift: float = 0.0) -> Measure:
    """A measure of each kind on random rows; a higher shift scores higher."""
    rng = np.random.default_rng(seed)
    if kind == "mean":
        return Measure.mean(rng.normal(shift, 1, rows))
    tokens = rng.integers(5, 60, rows).astype(np.float64)
    if kind == "ratio":
        return Measure.ratio(tokens * rng.gamma(4, (1 + shift) / 4, rows), tokens)
    totals = np.stack([tokens - k for k in range(4)], axis=1)
    matched = rng.binomial(totals.astype(int), np.clip(np.array([0.7, 0.5, 0.3, 0.2]) + shift, 0, 1))
    return Measure.corpus(np.column_stack([tokens, tokens, matched, totals]), bleu)


KINDS = pytest.mark.parametrize("kind", ["mean", "ratio", "corpus"])


def test_a_mean_has_the_textbook_standard_error_and_interval() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.3, 0.7])
    result = estimate(Measure.mean(values), seed=0)
    se = values.std(ddof=1) / math.sqrt(5)
    assert result.mean == pytest.approx(0.5)
    assert result.se == pytest.approx(se)
    assert (result.low, result.high) == pytest.approx((0.5 - 1.959964 * se, 0.5 + 1.959964 * se), rel=1e-6)
    assert result.n == 5


def test_a_ratio_weights_rows_by_their_denominator_and_has_the_linearised_standard_error() -> None:
    nll, tokens = np.array([10.0, 30.0, 4.0]), np.array([5.0, 10.0, 4.0])
    result = estimate(Measure.ratio(nll, tokens), seed=0)
    ratio = 44 / 19
    residuals = nll - ratio * tokens
    assert result.mean == pytest.approx(ratio)
    assert result.se == pytest.approx(math.sqrt(3 / 2 * (residuals**2).sum()) / 19)


def test_a_mean_as_a_corpus_metric_has_the_same_error_by_bootstrap() -> None:
    values = np.random.default_rng(0).normal(size=200)
    closed = estimate(Measure.mean(values), seed=0)
    as_corpus = Measure.corpus(np.stack([values, np.ones(200)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])
    resampled = estimate(as_corpus, seed=0)
    assert resampled.mean == closed.mean
    assert resampled.se == pytest.approx(closed.se, rel=0.03)
    assert resampled.low == pytest.approx(closed.low, abs=0.01)


@pytest.mark.parametrize("compared", [False, True], ids=["a value", "a difference"])
@KINDS
def test_intervals_cover_the_truth_about_as_often_as_they_say(kind: str, compared: bool) -> None:
    shift = 0.1 if compared else 0.0
    truth = measure(kind, 400_000, seed=1, shift=shift).value
    truth -= measure(kind, 400_000, seed=2).value if compared else 0.0
    rounds = 300 if compared else 400
    hits = 0
    for seed in range(rounds):
        a, b = measure(kind, 60, seed=1000 + seed, shift=shift), measure(kind, 60, seed=9000 + seed)
        result = compare(a, b, seed=seed, trials=500) if compared else estimate(a, seed=seed, trials=500)
        assert result.low is not None
        assert result.high is not None
        hits += result.low <= truth <= result.high
    assert (0.89 if compared else 0.90) <= hits / rounds <= 0.98


@KINDS
def test_p_is_uniform_when_there_is_no_difference(kind: str) -> None:
    rounds = 300
    results = [
        compare(measure(kind, 40, seed=1000 + s), measure(kind, 40, seed=9000 + s), seed=s, trials=500).p
        for s in range(rounds)
    ]
    # Kolmogorov–Smirnov: 1.63/√n is exceeded once in a hundred.
    distance = np.abs(np.sort(results) - (np.arange(rounds) + 0.5) / rounds).max()
    assert distance < 1.63 / math.sqrt(rounds)


@pytest.mark.parametrize(("kind", "metrics"), [("mean", 1), ("ratio", 1), ("mean", 5)])
def test_the_minimum_detectable_effect_is_found_four_times_in_five(kind: str, metrics: int) -> None:
    rounds = 250
    seen = 0
    for seed in range(rounds):
        a, b = measure(kind, 80, seed=1000 + seed), measure(kind, 80, seed=9000 + seed)
        mde = compare(a, b, seed=seed, trials=2, metric_count=metrics).mde
        assert mde is not None
        shifted = Measure.ratio(a.statistics[:, 0] + mde * a.statistics[:, 1], a.statistics[:, 1])
        # The smallest p of several that are looked at together counts below 5 % divided by their number.
        seen += compare(shifted, b, seed=seed, trials=400 * metrics).p < 0.05 / metrics
    assert 0.72 <= seen / rounds <= 0.88


def test_p_of_few_rows_is_the_share_of_all_sign_flips_that_reach_the_difference() -> None:
    a, b = np.array([3.0, 1.0, 4.0, 1.0, 5.0]), np.array([2.0, 1.5, 1.0, 0.5, 3.0])
    flips = np.array(list(itertools.product([1, -1], repeat=5)))
    exact = (np.abs(flips @ (a - b)) >= abs((a - b).sum()) - 1e-12).mean()
    assert compare(Measure.mean(a), Measure.mean(b), seed=0).p == pytest.approx(exact, abs=0.02)


def test_pairing_sees_a_small_difference_between_rows_that_vary_much() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 100)
    better = base + 0.1 + rng.normal(0, 0.2, 100)
    result = compare(Measure.mean(better), Measure.mean(base), seed=0)
    assert result.p < 0.001
    assert result.low is not None
    assert result.low > 0
    assert result.se == pytest.approx((better - base).std(ddof=1) / 10)


@KINDS
def test_a_variant_against_itself_differs_by_nothing(kind: str) -> None:
    one = measure(kind, 30, seed=1)
    result = compare(one, one, seed=0)
    assert (result.difference, result.low, result.high, result.p) == (0.0, 0.0, 0.0, 1.0)
    assert result.se == 0.0
    assert result.mde is None, "rows that do not differ say nothing of what would have shown"


def test_rows_that_all_differ_by_the_same_amount_give_no_detectable_difference() -> None:
    one = np.random.default_rng(0).normal(1, 1, 50)
    assert compare(Measure.mean(one + 0.1), Measure.mean(one), seed=0).mde is None


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["mean", "ratio", "corpus"]),
    rows=st.integers(2, 40),
    seeds=st.tuples(*[st.integers(0, 99)] * 3),
)
def test_swapping_the_variants_only_changes_the_signs(kind: str, rows: int, seeds: tuple[int, int, int]) -> None:
    a, b = measure(kind, rows, seeds[0]), measure(kind, rows, seeds[1] + 100)
    there, back = compare(a, b, seed=seeds[2], trials=300), compare(b, a, seed=seeds[2], trials=300)
    assert back.difference == -there.difference
    assert (back.low, back.high) == pytest.approx((-(there.high or 0), -(there.low or 0)), abs=1e-9)
    assert back.p == there.p
    assert back.se == pytest.approx(there.se)


@KINDS
def test_the_same_seed_gives_the_same_figures_and_another_does_not(kind: str) -> None:
    a, b = measure(kind, 25, seed=1), measure(kind, 25, seed=2)
    assert compare(a, b, seed=5) == compare(a, b, seed=5)
    assert compare(a, b, seed=5).low != compare(a, b, seed=6).low


@KINDS
def test_one_row_has_a_value_and_no_uncertainty(kind: str) -> None:
    a, b = measure(kind, 1, seed=1), measure(kind, 1, seed=2)
    single = estimate(a, seed=0)
    assert (single.mean, single.se, single.low, single.high, single.n) == (a.value, None, None, None, 1)
    pair = compare(a, b, seed=0)
    assert pair.difference == a.value - b.value
    assert (pair.low, pair.high, pair.se, pair.mde, pair.p) == (None, None, None, None, 1.0)


@KINDS
def test_no_rows_are_refused(kind: str) -> None:
    none = measure(kind, 0, seed=1)
    with pytest.raises(InputError, match="no rows"):
        estimate(none, seed=0)
    with pytest.raises(InputError, match="no rows"):
        compare(none, none, seed=0)


def test_different_numbers_of_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 rows cannot be paired with 2"):
        compare(Measure.mean(np.ones(3)), Measure.mean(np.ones(2)), seed=0)


def test_resampling_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = measure("ratio", 50, seed=1), measure("ratio", 50, seed=2)
    whole = compare(a, b, seed=0, trials=1000)
    monkeypatch.setattr("corral.evaluation.statistics._MAX_CELLS", 50 * 7)
    pieces = compare(a, b, seed=0, trials=1000)
    assert pieces.p == whole.p
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_nor_exceeds_bonferroni(values: list[float]) -> None:
    for raw, adjusted in zip(values, holm(values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(values)) + 1e-12
