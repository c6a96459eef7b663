"""The loop's use of objectives: supervised fine-tuning equals its formula, written out, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.data.packing import pack_sequences
from corral.model.packed_forward import target_logprobs
from corral.training import optimizers
from corral.training.loop import Trainer
from tests.training.tiny import read_metrics


def train_plainly(trainer: Trainer) -> list[float]:
    """Every step as token-weighted accumulation of −Σ log π / tokens. Returns: the losses."""
    config, losses = trainer.config, []
    parameters = list(trainer.parameters.values())
    trainer.model.train()
    for step in range(1, trainer.total_steps + 1):
        sequences = [trainer.examples[i].sequences[0] for i in trainer.sampler.batch(step)]
        positions = [[i for i, t in enumerate(s.trained) if t and i] for s in sequences]
        tokens, total = sum(map(len, positions)), 0.0
        for pack in pack_sequences([len(s.ids) for s in sequences], trainer.scorer.pack_length):
            logprobs = target_logprobs(trainer.model, [sequences[i].ids for i in pack], [positions[i] for i in pack])
            loss = -torch.cat(list(logprobs)).sum()
            (loss / tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip)
        trainer.optimizer.param_groups[0]["lr"] = optimizers.learning_rate(config.optimizer, step, trainer.total_steps)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        losses.append(total / tokens)
    return losses


@pytest.mark.parametrize("settings", [{}, {"pack_length": 110}, {"method": "full"}])
def test_supervised_fine_tuning_is_its_written_out_formula_bit_for_bit(
    settings: dict[str, Any], tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ours = tiny_trainer(tmp_path / "ours", held_out=0, **settings)
    ours.run()
    plain = tiny_trainer(tmp_path / "plain", held_out=0, **settings)
    assert [line["loss"] for line in read_metrics(tmp_path / "ours")] == train_plainly(plain)
    for name, weight in plain.parameters.items():
        assert torch.equal(weight, ours.parameters[name]), name
