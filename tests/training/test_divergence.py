"""When training stops because it has gone wrong: never while it is well, soon when it is not, with the rows named."""

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
from tests.training.tiny import make_examples

RANDOM = np.random.default_rng(7)


def stops_at(losses: Any) -> int | None:
    """The step (from 1) at which it stops."""
    watch = DivergenceMonitor()
    for step, loss in enumerate(losses, start=1):
        watch = watch.updated(float(loss), 1.0)
        if watch.exploded:
            return step
    return None


def noisy(level: Any, spread: float = 0.15) -> Any:
    """Losses around a level, as batches give them: never negative, with a tail towards hard ones."""
    level = np.asarray(level, dtype=float)
    return level * RANDOM.lognormal(-0.5 * spread**2, spread, level.shape)


STEPS = np.arange(3000)
WELL = {
    "fine-tuning": noisy(1.2 + 0.9 * np.exp(-STEPS / 40)),
    "from random weights": noisy(3.5 + 7.3 * np.exp(-STEPS / 100), 0.05),
    "a hump while a high rate warms up": noisy(
        np.concatenate([np.linspace(2.0, 3.8, 30), np.linspace(3.8, 1.8, 60), np.full(900, 1.7)])
    ),
    "one row a step, easy and hard ones mixed": RANDOM.gamma(0.8, 1.5, 100_000),
    "one row a step, most of them known by heart": np.where(RANDOM.random(100_000) < 0.2, 4.0, 0.02),
    "three sources with losses of their own": RANDOM.choice([0.2, 1.5, 5.0], 100_000)
    * RANDOM.lognormal(0, 0.2, 100_000),
    "learnt by heart, epoch by epoch": noisy(np.repeat([1.8, 0.9, 0.2, 0.02, 0.001], 600), 0.4),
    "spikes that pass": np.where(STEPS % 200 < 6, 9.0, noisy(np.full(3000, 1.5))),
    "a preference loss": noisy(0.1 + 0.593 * np.exp(-STEPS / 50), 0.6),
    "a squared loss that starts high": noisy(4 + 21 * np.exp(-STEPS / 30), 0.5),
    "constant": np.full(100, 2.0),
    "zero": np.zeros(100),
    "a reward, negated": -2.0 - STEPS / 500 + RANDOM.normal(0, 0.3, 3000),
}


@pytest.mark.parametrize("name", WELL)
def test_a_run_that_is_well_is_left_alone(name: str) -> None:
    assert stops_at(WELL[name]) is None


ILL = {
    "apart before it is well": (noisy(np.r_[8 * np.exp(-np.arange(60) / 20) + 1, np.full(60, 7.4)], 0.1), 60),
    "apart at once": (noisy(np.r_[np.full(3, 2.0), np.full(60, 8.0)], 0.05), 3),
    "apart after a while": (noisy(np.r_[np.full(700, 1.4), np.full(60, 7.5)]), 700),
    "slowly apart": (noisy(np.r_[np.full(300, 1.5), np.linspace(1.5, 11, 2000)]), 300),
    "apart while easy and hard rows are mixed": (np.r_[RANDOM.gamma(2, 0.6, 500), 9 + RANDOM.gamma(2, 0.6, 60)], 500),
    "a preference loss": (noisy(np.r_[np.full(100, 0.4), np.linspace(0.4, 30, 100)]), 100),
}


@pytest.mark.parametrize("name", ILL)
def test_a_run_that_has_come_apart_is_stopped(name: str) -> None:
    losses, begins = ILL[name]
    stopped = stops_at(losses)
    assert stopped is not None
    assert stopped > begins + PATIENCE - 1
    if "slowly" not in name:
        assert stopped <= begins + 3 * PATIENCE
    assert losses[stopped - 1] > 2 * np.median(losses[:begins])


def test_the_watch_is_a_value_that_survives_a_checkpoint() -> None:
    watch = DivergenceMonitor()
    for loss in ILL["apart after a while"][0][:705]:
        watch = watch.updated(float(loss), 1.0)
    fields = json.loads(json.dumps({"recent": watch.recent, "level": watch.level, "width": watch.width}))
    assert DivergenceMonitor(tuple(fields.pop("recent")), **fields) == watch
    assert watch.steps_above_bound == 5


@pytest.fixture
def batch(encoded_rows: list[Any]) -> list[Example]:
    return [replace(e, source="forum" if e.index == 2 else "wiki") for e in make_examples(encoded_rows)[:4]]


def test_only_the_rows_that_are_not_numbers_are_named(batch: list[Example]) -> None:
    def alone(example: Example) -> tuple[float, float]:
        return (math.nan, math.nan) if example.index == 2 else (1.5, 0.2)

    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.nan, math.nan, DivergenceMonitor(), batch, alone)
    assert stopped.value.what == "step 7: loss is nan and gradient norm nan"
    assert stopped.value.where == "1 of 4 rows of the batch: forum row 2 (loss nan, gradient norm nan)"
    assert "before step 7 are kept" in str(stopped.value.hint)


def test_a_row_whose_gradient_alone_is_infinite_is_named(batch: list[Example]) -> None:
    with pytest.raises(TrainingError) as stopped:
        check_step(7, 1.5, math.inf, DivergenceMonitor(), batch, lambda e: (1.5, math.inf if e.index == 1 else 0.1))
    assert stopped.value.where == "1 of 4 rows of the batch: wiki row 1 (loss 1.5, gradient norm inf)"


def test_where_every_row_is_at_fault_or_none_by_itself_that_is_said(batch: list[Example]) -> None:
    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.inf, 1.0, DivergenceMonitor(), batch, lambda _: (math.inf, 1.0))
    assert str(stopped.value.where).startswith("all 4 rows of the batch, so the weights may be at fault: wiki row 0")
    with pytest.raises(TrainingError) as stopped:
        check_step(7, math.inf, 1.0, DivergenceMonitor(), batch, lambda _: (1.0, 1.0))
    assert str(stopped.value.where).startswith(
        "rows of the batch, none of which is at fault by itself: wiki row 0 (loss 1)"
    )


def test_of_an_exploded_loss_the_worst_rows_come_first_and_not_all_are_listed(encoded_rows: list[Any]) -> None:
    watch = DivergenceMonitor()
    for loss in [1.0] * 300 + [9.0] * PATIENCE:
        watch = watch.updated(loss, 1.0)
    rows = make_examples(encoded_rows)[:20]
    with pytest.raises(TrainingError) as stopped:
        check_step(310, 9.0, 1.0, watch, rows, lambda e: (float(e.index), 1.0))
    assert "exploded: it is 9, and for 10 steps it was above 3" in stopped.value.what
    where = str(stopped.value.where)
    assert where.startswith("16 of 20 rows of the batch: made row 19 (loss 19), made row 18 (loss 18)")
    assert where.endswith("and 8 more")


def test_a_finite_step_that_is_within_bounds_goes_on(batch: list[Example]) -> None:
    def never(_: Example) -> tuple[float, float]:
        raise AssertionError("rows are computed again only when there is a fault")

    check_step(1, 5.0, 100.0, DivergenceMonitor().updated(5.0, 100.0), batch, never)
    check_held_out(3.0, batch, never)


def test_a_held_out_loss_that_is_no_number_names_its_rows(batch: list[Example]) -> None:
    with pytest.raises(TrainingError, match="held-out loss is inf") as stopped:
        check_held_out(math.inf, batch, lambda e: (math.inf if e.index == 2 else 1.0, 0.0))
    assert stopped.value.where == "1 of 4 rows of the held-out rows: forum row 2 (loss inf)"


# On a real model.


def test_the_row_that_breaks_the_loss_is_found_in_its_batch(training: Callable[..., Any], tmp_path: Path) -> None:
    made = training(tmp_path, held_out=0, batch_size=8)
    bad = made.sampler.batch(2)[3]
    token = made.examples[bad].sequences[0].ids[5]
    unique = max(set(range(400)) - {i for e in made.examples for i in e.sequences[0].ids})
    sequence = made.examples[bad].sequences[0]
    ids = (*sequence.ids[:5], unique, *sequence.ids[6:])
    made.examples[bad] = replace(made.examples[bad], sequences=(replace(sequence, ids=ids),))
    assert token != unique
    with torch.no_grad():
        made.model.get_input_embeddings().weight[unique] = math.nan
    with pytest.raises(TrainingError, match="step 2: loss is nan") as stopped:
        made.run()
    index = made.examples[bad].index
    assert str(stopped.value.where).startswith(f"1 of 8 rows of the batch: made row {index} (loss nan")


def test_a_model_that_comes_apart_is_stopped_with_checkpoints_from_before_it(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    made = training(tmp_path, steps=80, lr=3e-2, checkpoint_every=1, held_out=0)

    def disturb(line: Any) -> None:
        if line.step >= 50:
            with torch.no_grad():
                for parameter in made.parameters.values():
                    parameter.uniform_(-20, 20)

    with pytest.raises(TrainingError, match="step 60: the loss has exploded") as stopped:
        made.run(on_step=disturb)
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [*range(49, 60)], "two from before the fault, at least"
    assert "4 rows of the batch" in str(stopped.value.where)
    with pytest.raises(TrainingError, match="step 60: the loss has exploded"):
        training(tmp_path, steps=80, lr=3e-2, checkpoint_every=1, held_out=0).run()


@pytest.mark.parametrize("lr", [5e-3, 30.0])
def test_real_runs_at_low_and_high_rates_are_left_alone(
    lr: float, training: Callable[..., Any], tmp_path: Path
) -> None:
    assert training(tmp_path, steps=60, lr=lr, batch_size=1).run().steps == 60


def test_a_model_whose_gradient_is_gone_is_not_trained_to_the_end(batch: list[Example]) -> None:
    watch = DivergenceMonitor()
    for _ in range(PATIENCE - 1):
        watch = watch.updated(5.99, 0.0)
        check_step(1, 5.99, 0.0, watch, batch, lambda _: (5.99, 0.0))
    check_step(1, 5.99, 0.1, watch.updated(5.99, 0.1), batch, lambda _: (5.99, 0.1))
    with pytest.raises(TrainingError, match="nothing is learnt any more"):
        check_step(1, 5.99, 0.0, watch.updated(5.99, 0.0), batch, lambda _: (5.99, 0.0))
