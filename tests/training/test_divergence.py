"""Training stops when it diverges, and only then, and names the rows at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corral.data.example_store import Example
from corral.errors import TrainingError
from corral.training.divergence import PATIENCE, DivergenceMonitor, check_held_out, check_step
from corral.training.loop import Trainer
from tests.training.tiny import make_examples

RANDOM = np.random.default_rng(7)


def stopping_step(losses: Any) -> int | None:
    """The step (from 1) at which training stops."""
    monitor = DivergenceMonitor()
    for step, loss in enumerate(losses, start=1):
        monitor = monitor.updated(float(loss), 1.0)
        if monitor.exploded:
            return step
    return None


def noisy(level: Any, spread: float = 0.15) -> Any:
    """Losses around a level, as batches give them: never negative, with a tail towards hard ones."""
    level = np.asarray(level, dtype=float)
    return level * RANDOM.lognormal(-0.5 * spread**2, spread, level.shape)


STEPS = np.arange(3000)
HEALTHY = {
    "fine-tuning": noisy(1.2 + 0.9 * np.exp(-STEPS / 40)),
    "from random weights": noisy(3.5 + 7.3 * np.exp(-STEPS / 100), 0.05),
    "a hump while a high rate warms up": noisy(
        np.concatenate([np.linspace(2.0, 3.8, 30), np.linspace(3.8, 1.8, 60), np.full(900, 1.7)])
    ),
    "one row a step, easy and hard ones mixed": RANDOM.gamma(0.8, 1.5, 100_000),
    "one row a step, most of them memorised": np.where(RANDOM.random(100_000) < 0.2, 4.0, 0.02),
    "three sources with different losses": RANDOM.choice([0.2, 1.5, 5.0], 100_000) * RANDOM.lognormal(0, 0.2, 100_000),
    "memorised, epoch by epoch": noisy(np.repeat([1.8, 0.9, 0.2, 0.02, 0.001], 600), 0.4),
    "spikes that pass": np.where(STEPS % 200 < 6, 9.0, noisy(np.full(3000, 1.5))),
    "a preference loss": noisy(0.1 + 0.593 * np.exp(-STEPS / 50), 0.6),
    "a squared loss that starts high": noisy(4 + 21 * np.exp(-STEPS / 30), 0.5),
    "constant": np.full(100, 2.0),
    "zero": np.zeros(100),
    "a reward, negated": -2.0 - STEPS / 500 + RANDOM.normal(0, 0.3, 3000),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_not_stopped(name: str) -> None:
    assert stopping_step(HEALTHY[name]) is None


DIVERGING = {
    "before it has learnt": (noisy(np.r_[8 * np.exp(-np.arange(60) / 20) + 1, np.full(60, 7.4)], 0.1), 60),
    "at once": (noisy(np.r_[np.full(3, 2.0), np.full(60, 8.0)], 0.05), 3),
    "after a while": (noisy(np.r_[np.full(700, 1.4), np.full(60, 7.5)]), 700),
    "slowly": (noisy(np.r_[np.full(300, 1.5), np.linspace(1.5, 11, 2000)]), 300),
    "while easy and hard rows are mixed": (np.r_[RANDOM.gamma(2, 0.6, 500), 9 + RANDOM.gamma(2, 0.6, 60)], 500),
    "a preference loss": (noisy(np.r_[np.full(100, 0.4), np.linspace(0.4, 30, 100)]), 100),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_run_is_stopped(name: str) -> None:
    losses, onset = DIVERGING[name]
    stopped = stopping_step(losses)
    assert stopped is not None
    assert stopped > onset + PATIENCE - 1
    if name != "slowly":
        assert stopped <= onset + 3 * PATIENCE
    assert losses[stopped - 1] > 2 * np.median(losses[:onset])


def test_the_monitor_survives_serialisation() -> None:
    monitor = DivergenceMonitor()
    for loss in DIVERGING["after a while"][0][:705]:
        monitor = monitor.updated(float(loss), 1.0)
    fields = json.loads(json.dumps({"recent": monitor.recent, "level": monitor.level, "width": monitor.width}))
    assert DivergenceMonitor(tuple(fields.pop("recent")), **fields) == monitor
    assert monitor.steps_above_bound == 5


@pytest.fixture
def batch(encoded_rows: list[Any]) -> list[Example]:
    return [replace(e, source="forum" if e.index == 2 else "wiki") for e in make_examples(encoded_rows)[:4]]


def test_only_the_rows_that_are_not_finite_are_named(batch: list[Example]) -> None:
    def measure_one(example: Example) -> tuple[float, float]:
        return (math.nan, math.nan) if example.index == 2 else (1.5, 0.2)

    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.nan, math.nan, DivergenceMonitor(), batch, measure_one)
    assert stopped.value.what == "step 7: loss is nan and gradient norm nan"
    assert stopped.value.where == "1 of 4 rows of the batch: forum row 2 (loss nan, gradient norm nan)"
    assert "before step 7 are kept" in str(stopped.value.hint)


def test_a_row_whose_gradient_alone_is_infinite_is_named(batch: list[Example]) -> None:
    with pytest.raises(TrainingError) as stopped:
        check_step(7, 1.5, math.inf, DivergenceMonitor(), batch, lambda e: (1.5, math.inf if e.index == 1 else 0.1))
    assert stopped.value.where == "1 of 4 rows of the batch: wiki row 1 (loss 1.5, gradient norm inf)"


def test_when_every_row_or_none_is_at_fault_the_error_says_so(batch: list[Example]) -> None:
    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.inf, 1.0, DivergenceMonitor(), batch, lambda _: (math.inf, 1.0))
    assert str(stopped.value.where).startswith("all 4 rows of the batch, so the weights may be at fault: wiki row 0")
    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.inf, 1.0, DivergenceMonitor(), batch, lambda _: (1.0, 1.0))
    assert str(stopped.value.where).startswith(
        "rows of the batch, none of which is at fault by itself: wiki row 0 (loss 1)"
    )


def test_for_an_exploded_loss_the_worst_rows_are_listed_first_and_not_all(encoded_rows: list[Any]) -> None:
    monitor = DivergenceMonitor()
    for loss in [1.0] * 300 + [9.0] * PATIENCE:
        monitor = monitor.updated(loss, 1.0)
    rows = make_examples(encoded_rows)[:20]
    with pytest.raises(TrainingError) as stopped:
        check_step(310, 9.0, 1.0, monitor, rows, lambda e: (float(e.index), 1.0))
    assert "exploded: it is 9, and for 10 steps it was above 3" in stopped.value.what
    where = str(stopped.value.where)
    assert where.startswith("16 of 20 rows of the batch: made row 19 (loss 19), made row 18 (loss 18)")
    assert where.endswith("and 8 more")


def test_a_finite_step_within_bounds_passes(batch: list[Example]) -> None:
    def never(_: Example) -> tuple[float, float]:
        raise AssertionError("rows are measured only when the check fails")

    check_step(1, 5.0, 100.0, DivergenceMonitor().updated(5.0, 100.0), batch, never)
    check_held_out(3.0, batch, never)


def test_a_held_out_loss_that_is_not_finite_names_its_rows(batch: list[Example]) -> None:
    with pytest.raises(TrainingError, match="held-out loss is inf") as stopped:
        check_held_out(math.inf, batch, lambda e: (math.inf if e.index == 2 else 1.0, 0.0))
    assert stopped.value.where == "1 of 4 rows of the held-out rows: forum row 2 (loss inf)"


# On a real model.


def test_the_row_that_breaks_the_loss_is_found_in_its_batch(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, held_out=0, batch_size=8)
    bad = trainer.sampler.batch(2)[3]
    token = trainer.examples[bad].sequences[0].ids[5]
    unique = max(set(range(400)) - {i for e in trainer.examples for i in e.sequences[0].ids})
    sequence = trainer.examples[bad].sequences[0]
    ids = (*sequence.ids[:5], unique, *sequence.ids[6:])
    trainer.examples[bad] = replace(trainer.examples[bad], sequences=(replace(sequence, ids=ids),))
    assert token != unique
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[unique] = math.nan
    with pytest.raises(TrainingError, match="step 2: loss is nan") as stopped:
        trainer.run()
    index = trainer.examples[bad].index
    assert str(stopped.value.where).startswith(f"1 of 8 rows of the batch: made row {index} (loss nan")


def test_a_diverging_model_is_stopped_and_earlier_checkpoints_are_kept(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, steps=80, lr=3e-2, checkpoint_every=1, held_out=0)

    def disturb(line: Any) -> None:
        if line.step >= 50:
            with torch.no_grad():
                for parameter in trainer.parameters.values():
                    parameter.uniform_(-20, 20)

    with pytest.raises(TrainingError, match="step 60: the loss has exploded") as stopped:
        trainer.run(on_step=disturb)
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [*range(49, 60)], "at least two from before the divergence"
    assert "4 rows of the batch" in str(stopped.value.where)
    with pytest.raises(TrainingError, match="step 60: the loss has exploded"):
        tiny_trainer(tmp_path, steps=80, lr=3e-2, checkpoint_every=1, held_out=0).run()


@pytest.mark.parametrize("lr", [5e-3, 30.0])
def test_real_runs_at_low_and_high_rates_are_not_stopped(
    lr: float, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    assert tiny_trainer(tmp_path, steps=60, lr=lr, batch_size=1).run().steps == 60


def test_a_vanished_gradient_stops_training(batch: list[Example]) -> None:
    monitor = DivergenceMonitor()
    for _ in range(PATIENCE - 1):
        monitor = monitor.updated(5.99, 0.0)
        check_step(1, 5.99, 0.0, monitor, batch, lambda _: (5.99, 0.0))
    check_step(1, 5.99, 0.1, monitor.updated(5.99, 0.1), batch, lambda _: (5.99, 0.1))
    with pytest.raises(TrainingError, match="nothing is learnt any more"):
        check_step(1, 5.99, 0.0, monitor.updated(5.99, 0.0), batch, lambda _: (5.99, 0.0))
