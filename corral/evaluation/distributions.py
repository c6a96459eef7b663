"""The distributions that exact tests and small samples need: binomial and Student's t, from the incomplete beta function."""

from __future__ import annotations

import math
from collections.abc import Callable

_MAX_TERMS = 10_000
_TINY = 1e-300


def binomial_interval(successes: int, n: int, alpha: float) -> tuple[float, float]:
    """The exact 1 − alpha interval of a rate (Clopper & Pearson, 1934): what neither one-sided test at alpha/2 rejects.

    0 of 0 give (0, 1).
    """
    low, high = 0.0, 1.0
    if successes > 0:
        low = _bisect(lambda p: _incomplete_beta(successes, n - successes + 1, p) >= alpha / 2, 0.0, 1.0)
    if successes < n:
        high = _bisect(lambda p: _incomplete_beta(successes + 1, n - successes, p) >= 1 - alpha / 2, 0.0, 1.0)
    return low, high


def sign_test_p(one: int, other: int) -> float:
    """The exact two-sided p of so many wins on either side, if each is as likely (McNemar's test on discordant pairs)."""
    if one == other:
        return 1.0
    return min(1.0, 2 * _incomplete_beta(max(one, other), min(one, other) + 1, 0.5))


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t."""
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return tail if t >= 0 else 1 - tail


def t_quantile(tail: float, freedom: int) -> float:
    """The t with P(T > t) = tail, for a tail of at most ½."""
    high = 2.0
    while t_tail(high, freedom) > tail:
        high *= 2
    return _bisect(lambda t: t_tail(t, freedom) <= tail, 0.0, high)


def _bisect(is_reached: Callable[[float], bool], low: float, high: float) -> float:
    """Where a monotone condition begins to hold."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_reached(middle) else (middle, high)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(_MAX_TERMS):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or _TINY)
        c = 1 + term / c or _TINY
        fraction *= c * d
        if abs(1 - c * d) < 1e-13:
            break
    return math.exp(log_front) * (fraction - 1) / a
