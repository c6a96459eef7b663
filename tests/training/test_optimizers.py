"""Optimizers and learning rates."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from corral.errors import MissingExtraError
from corral.recipe import Optimizer
from corral.training.optimizers import build_optimizer, learning_rate, unsupported


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


def test_warm_up_in_steps_may_outlast_the_training() -> None:
    config = Optimizer(lr=1.0, warmup_steps=50)
    rates = [learning_rate(config, step, 40) for step in range(1, 41)]
    assert rates == [step / 51 for step in range(1, 41)]


def train_matrix(kind: str, steps: int = 30) -> Any:
    """A matrix after some steps towards a target, and its optimizer."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 64))
    target = torch.randn(128, 64)
    config = Optimizer(kind=kind, lr=1e-2, weight_decay=0.1)  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer([weight], config)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    return weight.detach(), optimizer


def test_paged_32_bit_adamw_is_adamw() -> None:
    torch.testing.assert_close(train_matrix("paged_adamw_32bit")[0], train_matrix("adamw")[0], rtol=1e-5, atol=1e-6)


def test_without_a_gpu_a_paged_optimizer_is_reported() -> None:
    paged, plain = Optimizer(kind="paged_adamw_32bit"), Optimizer(kind="adamw_8bit")
    assert "nothing is paged" in (unsupported(paged, "cpu") or "")
    assert unsupported(paged, "cuda:0") is None
    assert unsupported(plain, "cpu") is None


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_keeps_its_moments_in_bytes_and_stays_near_adamw(kind: str) -> None:
    weight, optimizer = train_matrix(kind)
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    exact, start = train_matrix("adamw")[0], train_matrix("adamw", steps=0)[0]
    assert (weight - exact).norm() < 0.05 * (exact - start).norm()


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match="bitsandbytes") as refused:
        train_matrix("adamw_8bit")
    assert "corral[quant]" in str(refused.value.hint)
