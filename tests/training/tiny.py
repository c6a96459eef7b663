"""A tiny training stage: a random Llama, its adapter or all its weights, and rows that are given."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from corral.data.prepare import Example
from corral.messages import Conversation
from corral.model import adapters
from corral.recipe import Lora, Optimizer, Train
from corral.training.distributed import World
from corral.training.loop import Trainer
from corral.training.objectives import OBJECTIVES
from tests.conftest import make_tiny_model


def make_examples(encoded: list[Any]) -> list[Example]:
    return [
        Example(key=f"{i:064x}", source="made", index=i, sequences=(e,), record=Conversation(()))
        for i, e in enumerate(encoded)
    ]


def make_trainer(
    model: Any,
    encoded: list[Any],
    config: Train,
    folder: Path,
    *,
    held_out: int = 4,
    pack_length: int = 512,
    seed: int = 5,
    save_best: Callable[[int], None] = lambda _: None,
    world: World | None = None,
) -> Trainer:
    """A trainer on the rows, of which the first ones are held out."""
    examples = make_examples(encoded)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        examples[held_out:],
        examples[:held_out],
        OBJECTIVES[config.objective],
        config,
        pack_length=pack_length,
        seed=seed,
        folder=folder,
        save_best=save_best,
        world=world,
    )


def load_in_nf4(model: Any) -> Any:
    """The same model, saved and loaded in NF4."""
    from corral.model.loading import load_model
    from corral.model.quantisation import Quantization

    with tempfile.TemporaryDirectory() as folder:
        # `save_pretrained` writes only in the first of several processes.
        model.config.save_pretrained(folder)
        weights = {name: value.clone() for name, value in model.named_parameters()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return load_model(Path(folder), quantization=Quantization("nf4"))


def make_tiny_trainer(
    folder: Path,
    encoded: list[Any],
    vocabulary: int,
    *,
    pack_length: int = 512,
    held_out: int = 4,
    dropout: float = 0.0,
    lr: float = 5e-3,
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
    dtype: torch.dtype = torch.float32,
    world: World | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of the tiny model; other settings are those of a recipe's stage."""
    model: Any = make_tiny_model(vocabulary).to(dtype)
    if settings.get("quantization") == "nf4":
        model = load_in_nf4(model)
    if settings.get("method") == "full":
        model.requires_grad_(True)
    else:
        model = adapters.attach(model, Lora(rank=4, alpha=8, dropout=dropout), seed=3)
    config = Train(
        **{"steps": 12, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 3}
        | settings
        | {"optimizer": Optimizer(kind=optimizer, lr=lr, warmup_ratio=0.1)}
    )
    return make_trainer(model, encoded, config, folder, held_out=held_out, pack_length=pack_length, world=world)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_checkpoint(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def run_until(trainer: Trainer, step: int) -> None:
    """Train, and stop on request after a step."""
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        trainer.run(on_step=lambda metrics: steps.append(metrics.step), should_stop=lambda: steps[-1] >= step)
