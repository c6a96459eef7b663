"""A tiny training stage: a random Llama, its adapter or all its weights, and rows that are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corral.data.example_store import Example, SequenceFigures
from corral.messages import Conversation, Feedback, Preference, Record
from corral.model import adapters
from corral.model.full_finetuning import train_all_weights
from corral.model.loading import DType, load_model
from corral.model.quantisation import Quantization
from corral.recipe import Lora, Optimizer, Train
from corral.template import Encoded
from corral.training.distributed import World
from corral.training.guards import StageGuards
from corral.training.loop import Trainer
from corral.training.mismatched_rows import MismatchedRows
from corral.training.objective_table import TAKES, build_objective
from corral.training.single_answers import SingleAnswers


def make_examples(encoded: list[Any], objective: str = "sft") -> list[Example]:
    """The rows as examples for an objective: in a pair the rejected answer is that of another row, and of answers with a
    score every third is bad."""
    examples: list[Example] = []
    for i, row in enumerate(encoded):
        prompt, sequences = Conversation(()), (row,)
        record: Record = prompt
        if Feedback in TAKES[objective]:
            record = Feedback(prompt, "", 0.2 if i % 3 == 1 else 0.9)
        elif Preference in TAKES[objective]:
            other = encoded[i - 5]
            start, end = other.trained.index(True), row.trained.index(True)
            rejected = Encoded(row.ids[:end] + other.ids[start:], row.trained[:end] + other.trained[start:])
            sequences, record = (row, rejected), Preference(prompt, "", "")
        examples.append(Example(key=f"{i:064x}", source="made", index=i, sequences=sequences, record=record))
    return examples


def figures_of(examples: Sequence[Example]) -> SequenceFigures:
    """The figures of the sequences of examples, none of which is a repeat of another."""
    places = [(i, k, sequence) for i, example in enumerate(examples) for k, sequence in enumerate(example.sequences)]
    numbers = [(i, k, i, len(s.ids), s.trained.index(True), sum(s.trained[1:])) for i, k, s in places]
    keys = [
        np.frombuffer(b"".join(hashlib.sha256(repr(part).encode()).digest() for part in parts), np.uint8).reshape(
            -1, 32
        )
        for parts in ([s.ids for *_, s in places], [s.ids[: s.trained.index(True)] for *_, s in places])
    ]
    return SequenceFigures(*np.array(numbers, np.int64).reshape(-1, 6).T, *keys)


def arrange(examples: Sequence[Example], objective: str) -> Sequence[Example]:
    """The examples with the sequences that an objective reads."""
    if objective != "kto" or not examples:
        return examples
    return MismatchedRows(SingleAnswers(examples, figures_of(examples)))


def make_trainer(
    model: Any,
    encoded: list[Any],
    config: Train,
    folder: Path,
    *,
    held_out: int = 4,
    pack_length: int = 512,
    seed: int = 5,
    save_best: Callable[[], None] = lambda: None,
    world: World | None = None,
    guards: StageGuards | None = None,
) -> Trainer:
    """A trainer on the rows, of which the first ones are held out."""
    examples = make_examples(encoded, config.objective)
    train, validation = (arrange(part, config.objective) for part in (examples[held_out:], examples[:held_out]))
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        train,
        validation,
        build_objective(config),
        config,
        pack_length=pack_length,
        seed=seed,
        folder=folder,
        save_best=save_best,
        world=world,
        guards=guards,
    )


def tiny_config(train: Mapping[str, Any], optimizer: Mapping[str, Any], lora: Mapping[str, Any]) -> Train:
    """A short stage with these settings of the stage, its optimizer and its adapter, as in a recipe."""
    settings: dict[str, Any] = {"batch_size": 4, "evaluate_every": 4, "checkpoint_every": 3}
    if "epochs" not in train:
        settings["steps"] = 12
    if train.get("method") != "full":
        settings["lora"] = Lora(**{"rank": 4, "alpha": 8, **lora})
    return Train(**settings | {**train, "optimizer": Optimizer(**{"lr": 5e-3, "warmup_ratio": 0.1, **optimizer})})


def load_trainable(base: Path, config: Train, dtype: DType = "float32") -> Any:
    """The model of a folder with its weights as the stage holds them, and with what it trains."""
    quantization = None
    if config.quantization != "none":
        quantization = Quantization(config.quantization, config.int8_threshold)
    model = load_model(base, dtype=dtype, quantization=quantization)
    if config.method == "full":
        return train_all_weights(model, torch.float32)
    return adapters.attach(model, config.lora, seed=3)


def make_tiny_trainer(
    folder: Path,
    encoded: list[Any],
    base: Path,
    *,
    pack_length: int = 512,
    held_out: int = 4,
    dropout: float = 0.0,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    dtype: DType = "float32",
    world: World | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of the tiny model; other settings are those of a recipe's stage."""
    config = tiny_config(settings, {"kind": optimizer, "lr": lr}, {"dropout": dropout})
    model = load_trainable(base, config, dtype)
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
