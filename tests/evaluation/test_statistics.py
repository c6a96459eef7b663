from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from corral.errors import InputError
from corral.evaluation.statistics import ALPHA, Measure, compare, estimate, holm, holm_levels
from corral.metrics.bleu import bleu

Floats = NDArray[np.float64]


def measure(kind: str, rows: int, seed: int, shift: float = 0.0) -> Measure:
    """A measure of each kind on random rows; a higher shift scores higher."""
    rng = np.random.default_rng(seed)
    if kind == "rate":
        return Measure.rate((rng.random(rows) < 0.4 + shift).tolist())
    if kind == "mean":
        return Measure.mean(rng.normal(shift, 1, rows))
    tokens: Floats = rng.integers(5, 60, rows).astype(np.float64)
    if kind == "ratio":
        return Measure.ratio(tokens * rng.gamma(4, (1 + shift) / 4, rows), tokens)
    totals = np.stack([tokens - k for k in range(4)], axis=1)
    matched = rng.binomial(totals.astype(int), np.clip(np.array([0.7, 0.5, 0.3, 0.2]) + shift, 0, 1))
    return Measure.corpus(np.column_stack([tokens, tokens, matched, totals]).astype(np.float64), bleu)


KINDS = pytest.mark.parametrize("kind", ["rate", "mean", "ratio", "corpus"])
RESAMPLED = pytest.mark.parametrize("kind", ["mean", "ratio", "corpus"])


def test_a_mean_has_the_textbook_standard_error_and_interval() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.3, 0.7])
    result = estimate(Measure.mean(values), seed=0)
    se = values.std(ddof=1) / math.sqrt(5)
    assert result.mean == pytest.approx(0.5)
    assert result.se == pytest.approx(se)
    assert (result.low, result.high) == pytest.approx((0.5 - 2.776445 * se, 0.5 + 2.776445 * se), rel=1e-6)
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
        if compared:
            low, high = compare(a, b, seed=seed, trials=500).interval(ALPHA) or (math.nan, math.nan)
        else:
            result = estimate(a, seed=seed, trials=500)
            low, high = result.low or 0.0, result.high or 0.0
        hits += low <= truth <= high
    # Exact intervals of rates cover at least as often as they say. Three standard errors either way.
    assert 0.912 <= hits / rounds <= (0.995 if kind == "rate" else 0.985)


@RESAMPLED
def test_p_is_uniform_when_there_is_no_difference(kind: str) -> None:
    rounds = 300
    results = [
        compare(measure(kind, 40, seed=1000 + s), measure(kind, 40, seed=9000 + s), seed=s, trials=500).p
        for s in range(rounds)
    ]
    # Kolmogorov–Smirnov: 1.63/√n is exceeded once in a hundred.
    distance = np.abs(np.sort(results) - (np.arange(rounds) + 0.5) / rounds).max()
    assert distance < 1.63 / math.sqrt(rounds)


@pytest.mark.parametrize(("kind", "metrics"), [("rate", 1), ("mean", 1), ("ratio", 1), ("mean", 5)])
def test_the_minimum_detectable_effect_is_found_four_times_in_five(kind: str, metrics: int) -> None:
    rounds, alpha = 250, ALPHA / metrics
    effects: list[float] = []
    for seed in range(rounds):
        a, b = measure(kind, 80, seed=1000 + seed), measure(kind, 80, seed=9000 + seed)
        effects.append(compare(a, b, seed=seed, trials=2).detectable(alpha) or 0.0)
    seen = 0
    for seed, effect in enumerate(effects):
        a, b = measure(kind, 80, seed=1000 + seed), measure(kind, 80, seed=9000 + seed)
        if kind == "rate":
            a = measure(kind, 80, seed=1000 + seed, shift=effect)
        else:
            a = Measure.ratio(a.statistics[:, 0] + effect * a.statistics[:, 1], a.statistics[:, 1])
        # The smallest p of several that are looked at together counts below 5 % divided by their number.
        seen += compare(a, b, seed=seed, trials=400 * metrics).p < alpha
    assert 0.72 <= seen / rounds <= 0.88


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["rate", "mean", "ratio", "corpus"]),
    rows=st.integers(2, 60),
    shift=st.sampled_from([0.0, 0.1, 0.2, 0.4]),
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.05, 0.025, 0.01]),
)
def test_an_interval_leaves_out_zero_exactly_if_p_is_below_its_level(
    kind: str, rows: int, shift: float, seed: int, alpha: float
) -> None:
    result = compare(measure(kind, rows, seed, shift), measure(kind, rows, seed + 1), seed=seed, trials=2000)
    interval = result.interval(alpha)
    if interval is None:
        assert result.p >= alpha or not result.se
    else:
        assert interval[0] <= result.difference + 1e-12
        assert interval[1] >= result.difference - 1e-12
        assert (result.p < alpha) == (interval[0] > 0 or interval[1] < 0)


def test_the_p_of_a_rate_is_that_of_the_exact_test_of_discordant_rows() -> None:
    a, b = Measure.rate([True] * 8 + [False] * 12), Measure.rate([True] * 2 + [False] * 17 + [True])
    # Six rows for a, one for b.
    assert compare(a, b, seed=0).p == pytest.approx(2 * (1 + 7) / 2**7)


@pytest.mark.parametrize("rows", [10, 40])
@pytest.mark.parametrize(("won", "lost"), [(0.0, 0.3), (0.02, 0.05), (0.2, 0.2), (0.5, 0.3), (0.7, 0.3)])
def test_the_interval_of_two_rates_covers_at_least_as_often_as_it_says(rows: int, won: float, lost: float) -> None:
    covered = 0.0
    for a in range(rows + 1):
        for b in range(rows + 1 - a):
            chance = (
                math.comb(rows, a)
                * math.comb(rows - a, b)
                * won**a
                * lost**b
                * max(0.0, 1 - won - lost) ** (rows - a - b)
            )
            if chance > 1e-9:
                sides = [True] * a + [False] * (rows - a), [False] * a + [True] * b + [False] * (rows - a - b)
                low, high = compare(*map(Measure.rate, sides), seed=0).interval(ALPHA) or (0.0, 0.0)
                covered += chance * (low - 1e-9 <= won - lost <= high + 1e-9)
    assert covered >= 0.95


def test_no_hit_in_fifty_rows_leaves_room_for_a_rate_of_seven_percent() -> None:
    none = Measure.rate([False] * 50)
    result = estimate(none, seed=0)
    assert (result.mean, result.se, result.low) == (0.0, None, 0.0)
    assert result.high == pytest.approx(1 - 0.025 ** (1 / 50))
    pair = compare(none, none, seed=0)
    assert (pair.p, pair.detectable(ALPHA)) == (1.0, None)
    assert pair.interval(ALPHA) == pytest.approx((-0.0711, 0.0711), abs=1e-4)


@RESAMPLED
def test_rows_that_are_all_alike_have_no_interval_rather_than_one_without_width(kind: str) -> None:
    one = measure(kind, 1, seed=1)
    alike = one.select([0] * 30)
    result = estimate(alike, seed=0, trials=200)
    assert (result.se, result.low, result.high) == (None, None, None)
    assert compare(alike, alike, seed=0, trials=200).interval(ALPHA) is None


def test_few_rows_are_not_significant_because_all_resamples_agree() -> None:
    better = Measure.mean(np.array([0.3, 0.2, 0.4])), Measure.mean(np.array([0.1, 0.1, 0.1]))
    result = compare(*better, seed=0)
    assert result.p > 0.05
    assert result.interval(ALPHA) is None


def test_p_agrees_with_sign_flips_where_both_are_valid() -> None:
    rng = np.random.default_rng(3)
    for shift in (0.1, 0.2, 0.3):
        differences = rng.normal(shift, 1, 80)
        flipped = (rng.integers(2, size=(20_000, 80)) * 2 - 1) @ differences
        exchangeable = (np.abs(flipped) >= abs(differences.sum())).mean()
        assert compare(Measure.mean(differences), Measure.mean(np.zeros(80)), seed=0).p == pytest.approx(
            exchangeable, rel=0.25, abs=0.01
        )


def test_rows_of_one_cluster_are_one_unit() -> None:
    rng = np.random.default_rng(0)
    passages = rng.normal(0, 1, 20)
    values, keys = np.repeat(passages, 5), [f"p{i // 5}" for i in range(100)]
    clustered = estimate(Measure.mean(values).clustered(keys), seed=0)
    assert (clustered.mean, clustered.n) == (pytest.approx(passages.mean()), 20)
    assert clustered.se == pytest.approx(passages.std(ddof=1) / math.sqrt(20))
    assert (clustered.se or 0) > 2 * (estimate(Measure.mean(values), seed=0).se or 0)
    hits = Measure.rate((values > 0).tolist())
    assert hits.clustered(keys).kind == "ratio"
    assert hits.clustered([str(i) for i in range(100)]) is hits
    pair = compare(hits.clustered(keys), Measure.rate([False] * 100).clustered(keys), seed=0, trials=500)
    assert (pair.n, pair.difference) == (20, pytest.approx((values > 0).mean()))


def test_pairing_sees_a_small_difference_between_rows_that_vary_much() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 100)
    better = base + 0.1 + rng.normal(0, 0.2, 100)
    result = compare(Measure.mean(better), Measure.mean(base), seed=0)
    assert result.p < 0.001
    assert (result.interval(ALPHA) or (0, 0))[0] > 0
    assert result.se == pytest.approx((better - base).std(ddof=1) / 10)


@KINDS
def test_a_variant_against_itself_differs_by_nothing(kind: str) -> None:
    one = measure(kind, 30, seed=1)
    result = compare(one, one, seed=0)
    assert (result.difference, result.p, result.se) == (0.0, 1.0, 0.0)
    assert result.detectable(ALPHA) is None, "rows that do not differ say nothing of what would have shown"


def test_rows_that_all_differ_by_the_same_amount_give_no_detectable_difference() -> None:
    one = np.random.default_rng(0).normal(1, 1, 50)
    result = compare(Measure.mean(one + 0.1), Measure.mean(one), seed=0)
    assert (result.detectable(ALPHA), result.interval(ALPHA)) == (None, None)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["rate", "mean", "ratio", "corpus"]),
    rows=st.integers(4, 40),
    seeds=st.tuples(*[st.integers(0, 99)] * 3),
)
def test_swapping_the_variants_only_changes_the_signs(kind: str, rows: int, seeds: tuple[int, int, int]) -> None:
    a, b = measure(kind, rows, seeds[0]), measure(kind, rows, seeds[1] + 100)
    there, back = compare(a, b, seed=seeds[2], trials=300), compare(b, a, seed=seeds[2], trials=300)
    assert back.difference == -there.difference
    low, high = there.interval(0.2) or (0, 0)
    assert back.interval(0.2) == pytest.approx((-high, -low), abs=1e-9) or back.interval(0.2) is None
    assert back.p == there.p
    assert back.se == pytest.approx(there.se)


@RESAMPLED
def test_the_same_seed_gives_the_same_figures_and_another_does_not(kind: str) -> None:
    a, b = measure(kind, 25, seed=1), measure(kind, 25, seed=2)
    intervals = [compare(a, b, seed=seed).interval(ALPHA) for seed in (5, 5, 6)]
    assert intervals[0] == intervals[1] != intervals[2]


@RESAMPLED
def test_one_row_has_a_value_and_no_uncertainty(kind: str) -> None:
    a, b = measure(kind, 1, seed=1), measure(kind, 1, seed=2)
    single = estimate(a, seed=0)
    assert (single.mean, single.se, single.low, single.high, single.n) == (a.value, None, None, None, 1)
    pair = compare(a, b, seed=0)
    assert pair.difference == a.value - b.value
    assert (pair.interval(ALPHA), pair.se, pair.detectable(ALPHA), pair.p) == (None, None, None, 1.0)


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
    assert pieces.interval(ALPHA) == pytest.approx(whole.interval(ALPHA), rel=1e-12)


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_nor_exceeds_bonferroni(values: list[float]) -> None:
    for raw, adjusted in zip(values, holm(values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(values)) + 1e-12


@given(st.lists(st.floats(0, 1), max_size=8))
def test_a_p_is_below_its_level_exactly_if_the_adjusted_p_is_below_five_percent(values: list[float]) -> None:
    for raw, adjusted, level in zip(values, holm(values), holm_levels(values, 0.05), strict=True):
        assert (raw < level) == (adjusted < 0.05)


def test_after_the_first_p_that_fails_all_others_are_tested_at_its_level() -> None:
    assert holm_levels([0.001, 0.03, 0.02], 0.05) == pytest.approx([0.05 / 3, 0.05, 0.025])
    # At its own step, 0.04 would pass; Holm stopped before.
    assert holm_levels([0.03, 0.001, 0.04], 0.05) == pytest.approx([0.025, 0.05 / 3, 0.025])
