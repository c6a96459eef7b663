"""A tiny training stage: random Llama, LoRA with dropout if asked for, rows that are at hand."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

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


def quantise(model: Any) -> Any:
    """The same model as it is loaded in NF4."""
    from corral.model.loading import load_model
    from corral.model.quantisation import Quantization

    with tempfile.TemporaryDirectory() as folder:
        # `save_pretrained` writes in the first of several processes only.
        model.config.save_pretrained(folder)
        weights = {name: value.clone() for name, value in model.named_parameters()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return load_model(Path(folder), quantization=Quantization("nf4"))


def make_training(
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
    examples = make_examples(encoded)
    model: Any = make_tiny_model(vocabulary).to(dtype)
    if settings.get("quantization") == "nf4":
        model = quantise(model)
    if settings.get("method") == "full":
        model.requires_grad_(True)
    else:
        model = adapters.attach(model, Lora(rank=4, alpha=8, dropout=dropout), seed=3)
    config = Train(
        **{"steps": 12, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 3}
        | settings
        | {"optimizer": Optimizer(kind=optimizer, lr=lr, warmup_ratio=0.1)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model,
        examples[held_out:],
        examples[:held_out],
        OBJECTIVES["sft"],
        config,
        pack_length=pack_length,
        seed=5,
        folder=folder,
        save_best=lambda _: None,
        world=world,
    )
