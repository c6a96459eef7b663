"""A tiny model that is taught to answer a few prompts, and a training of it on pairs under guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from corral.messages import Conversation
from corral.model.loading import load_template
from corral.recipe.alignment import Guards as Limits
from corral.template import Template
from corral.training.distributed import World
from corral.training.guards import StageGuards
from corral.training.loop import Trainer
from tests.training.tiny import load_trainable, make_trainer, tiny_config

WORDS = ("four", "bake", "milk", "fox", "dog", "salt", "lazy", "quick", "sugar", "eggs", "flour", "brown")
PROMPTS = [f"Say {word}." for word in WORDS]


def conversations(template: Template) -> list[Any]:
    """The prompts with the answers that the model is taught."""
    return [
        template.encode(Conversation.from_turns(("user", prompt), ("assistant", f"{word}!")))
        for prompt, word in zip(PROMPTS, WORDS, strict=True)
    ]


def teach(base: Path, template: Template, folder: Path) -> None:
    """Fine-tune a model on `PROMPTS`, and write it to `folder/model`."""
    config = tiny_config({"method": "full", "steps": 40, "batch_size": 12}, {"lr": 3e-3}, {})
    rows, model = conversations(template), load_trainable(base, config)
    make_trainer(model, rows, config, folder / "training", held_out=0).run()
    model.save_pretrained(str(folder / "model"))
    template.save(folder / "model")


def make_guarded_trainer(
    base: Path,
    folder: Path,
    *,
    lr: float = 5e-4,
    held_out: int = 4,
    with_guards: bool = True,
    prompts: Sequence[str] = PROMPTS,
    say: Callable[[str], None] = lambda _: None,
    limits: dict[str, Any] | None = None,
    world: World | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of the taught model, with its best weights in `folder/kept.pt`. The chosen answers are those that it was
    taught.

    Args:
        prompts: basic prompts of the guards.
        say: called with what the user should know.
        limits: of the guards.
        settings: of the stage.
    """
    world = world or World()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts), "utf-8")
    section = Limits(prompts=str(file), max_tokens=16, **(limits or {}))
    config = tiny_config({"objective": "dpo", "steps": 8, **settings, "guards": section}, {"lr": lr}, {})
    template = load_template(base)
    guards = StageGuards(config, 2, template, context=512, tolerance=1e-4, folder=folder, world=world, say=say)

    def save_best() -> None:
        weights = trainer.weights()
        if world.is_main:
            torch.save(weights, folder / "kept.pt")

    trainer = make_trainer(
        load_trainable(base, config),
        conversations(template),
        config,
        folder,
        held_out=held_out,
        save_best=save_best,
        world=world,
        guards=guards if with_guards else None,
    )
    return trainer
