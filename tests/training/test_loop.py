"""The training loop: steps, metrics, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from corral.training.loop import Trainer
from tests.training.tiny import read_metrics


def copy_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def test_training_lowers_the_loss_and_logs_every_step(tiny_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    outcome = tiny_trainer(tmp_path, steps=20).run()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(21))
    assert lines[0]["loss"] is None
    assert [line["step"] for line in lines if line["eval_loss"] is not None] == [0, 4, 8, 12, 16, 20]
    assert lines[-1]["loss"] < 0.8 * lines[1]["loss"]
    assert outcome.best_loss == min(line["eval_loss"] for line in lines if line["eval_loss"] is not None)
    assert outcome.best_loss < lines[0]["eval_loss"]
    assert lines[-1]["tokens"] == outcome.tokens > 0
    assert all(line["peak_memory_bytes"] > 0 for line in lines)


def test_one_pack_of_eight_equals_eight_packs_of_one(tiny_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    packed = tiny_trainer(tmp_path / "a", batch_size=8, steps=3, pack_length=4096)
    single = tiny_trainer(tmp_path / "b", batch_size=8, steps=3, pack_length=1)
    packed.run()
    single.run()
    for name, expected in copy_weights(packed).items():
        torch.testing.assert_close(copy_weights(single)[name], expected, rtol=1e-3, atol=1e-4)


def test_an_epoch_that_does_not_divide_ends_with_a_smaller_batch(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, steps=None, epochs=1, batch_size=8)
    trainer.run()
    per_row = [sum(len(s.ids) for s in e.sequences) for e in trainer.examples]
    assert trainer.total_steps == 3
    assert read_metrics(tmp_path)[-1]["tokens"] == sum(per_row)


def test_without_held_out_rows_nothing_is_evaluated(tiny_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    outcome = tiny_trainer(tmp_path, held_out=0).run()
    assert outcome.best_loss is None
    assert outcome.steps == 12
