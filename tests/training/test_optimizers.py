"""Learning rates."""

from __future__ import annotations

import pytest

from corral.recipe import Optimizer
from corral.training.optimizers import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_rate_rises_to_its_peak_then_never_rises_again_and_is_never_zero(schedule: str, warmup: float) -> None:
    config = Optimizer(lr=1e-3, schedule=schedule, warmup_ratio=warmup)  # pyright: ignore[reportArgumentType]
    rates = [learning_rate(config, step, 50) for step in range(1, 51)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_cosine_and_linear_are_halfway_down_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        config = Optimizer(lr=2.0, schedule=schedule, warmup_ratio=0)  # pyright: ignore[reportArgumentType]
        assert learning_rate(config, 1, 100) == 2.0
        assert learning_rate(config, 51, 100) == pytest.approx(1.0)
