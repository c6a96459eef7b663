from __future__ import annotations

import math

import pytest

from corral.evaluation.distributions import binomial_interval, sign_test_p, t_quantile, t_tail


@pytest.mark.parametrize(
    ("freedom", "tail", "t"),
    # From printed tables of Student's t.
    [(1, 0.025, 12.7062), (4, 0.025, 2.7764), (10, 0.05, 1.8125), (30, 0.005, 2.7500), (100_000, 0.025, 1.95999)],
)
def test_students_t_is_that_of_the_tables(freedom: int, tail: float, t: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(t, abs=6e-5)
    assert t_tail(t, freedom) == pytest.approx(tail, rel=1e-3)
    assert t_tail(-t, freedom) == pytest.approx(1 - tail, rel=1e-3)


@pytest.mark.parametrize(("hits", "n"), [(0, 50), (1, 1), (3, 10), (50, 50), (400, 3000)])
def test_neither_end_of_an_exact_interval_is_rejected_by_a_sum_of_binomial_terms(hits: int, n: int) -> None:
    def at_least(k: int, p: float) -> float:
        return math.fsum(
            math.exp(
                math.lgamma(n + 1)
                - math.lgamma(i + 1)
                - math.lgamma(n - i + 1)
                + i * math.log(p)
                + (n - i) * math.log1p(-p)
            )
            for i in range(k, n + 1)
        )

    low, high = binomial_interval(hits, n, 0.05)
    assert low == 0.0 if hits == 0 else at_least(hits, low) == pytest.approx(0.025, rel=1e-6)
    assert high == 1.0 if hits == n else 1 - at_least(hits + 1, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 3), (6, 0), (1, 7), (40, 25)])
def test_the_sign_test_sums_the_tails_of_a_fair_coin(one: int, other: int) -> None:
    n = one + other
    tail = sum(math.comb(n, k) for k in range(max(one, other), n + 1)) / 2**n
    assert sign_test_p(one, other) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
