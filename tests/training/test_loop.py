"""The loop: what a step is, what is logged, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import TrainingError


def weights(training: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in training.parameters.items()}


def test_training_lowers_the_loss_and_logs_every_step(training: Callable[..., Any], tmp_path: Path) -> None:
    outcome = training(tmp_path, steps=20).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(21))
    assert lines[0]["loss"] is None
    assert [line["step"] for line in lines if line["eval_loss"] is not None] == [0, 4, 8, 12, 16, 20]
    assert lines[-1]["loss"] < 0.8 * lines[1]["loss"]
    assert outcome.best_loss == min(line["eval_loss"] for line in lines if line["eval_loss"] is not None)
    assert outcome.best_loss < lines[0]["eval_loss"]
    assert lines[-1]["tokens"] == outcome.tokens > 0
    assert all(line["peak_memory_bytes"] > 0 for line in lines)


def test_one_pack_of_eight_equals_eight_packs_of_one(training: Callable[..., Any], tmp_path: Path) -> None:
    whole = training(tmp_path / "a", batch_size=8, steps=3, pack_length=4096)
    single = training(tmp_path / "b", batch_size=8, steps=3, pack_length=1)
    whole.run()
    single.run()
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(single)[name], expected, rtol=1e-3, atol=1e-4)


def test_an_epoch_that_does_not_divide_ends_with_a_smaller_batch(training: Callable[..., Any], tmp_path: Path) -> None:
    made = training(tmp_path, steps=None, epochs=1, batch_size=8)
    made.run()
    per_row = [sum(len(s.ids) for s in e.sequences) for e in made.examples]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert made.total_steps == 3
    assert last["tokens"] == sum(per_row)


def test_a_loss_that_is_not_a_number_stops_and_names_the_rows(training: Callable[..., Any], tmp_path: Path) -> None:
    made = training(tmp_path, held_out=0)
    with torch.no_grad():
        next(iter(made.parameters.values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="made row"):
        made.run()


def test_without_held_out_rows_nothing_is_evaluated(training: Callable[..., Any], tmp_path: Path) -> None:
    outcome = training(tmp_path, held_out=0).run()
    assert outcome.best_loss is None
    assert outcome.steps == 12
