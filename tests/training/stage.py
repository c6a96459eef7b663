"""A training stage whose model is merged or saved, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corral.data.example_store import Example
from corral.export import contract
from corral.messages import Conversation
from corral.model import adapters
from corral.model.loading import load_model
from corral.recipe import Lora, Train
from corral.template import Encoded, Template
from corral.training import trained_model
from corral.training.loop import Trainer
from corral.training.merge_check import check_merged_model
from corral.training.trained_model import TrainingSetup, ValidationSet
from tests.training.tiny import make_trainer

LORA = Lora(rank=4, alpha=8)
CONFIGS = {
    "plain": Train(lora=LORA),
    "nf4": Train(lora=LORA, quantization="nf4"),
    "int8": Train(lora=LORA, quantization="int8"),
}


@dataclass(frozen=True)
class Stage:
    """A stage's setup, its folder, and what is needed to save and check the model that it leaves."""

    setup: TrainingSetup
    folder: Path
    template: Template

    @property
    def merged(self) -> Path:
        return self.folder / trained_model.MERGED_FOLDER

    def merge(self, validation: ValidationSet) -> list[str]:
        output: list[str] = []
        trained_model.save_merged_model(
            self.setup, self.folder, self.template, validation, licences=(), report=output.append
        )
        return output

    def load_adapter(self) -> Any:
        """The base in full precision with the stage's adapter."""
        return adapters.load(load_model(self.setup.folder), self.folder / trained_model.ADAPTER_FOLDER)

    def check(self, validation: ValidationSet, model: Path | None = None) -> dict[str, contract.Check]:
        """Check the merged model, or another."""
        probes = contract.make_probes(self.template)
        model = model or self.merged
        _, results = check_merged_model(self.setup, self.folder, model, probes, validation)
        return {check.name: check for check in results}

    def trainer(self, encoded: list[Any], folder: Path | None = None, seed: int = 0) -> Trainer:
        model = trained_model.make_trainable(trained_model.load_base(self.setup), self.setup, seed=3)
        return make_trainer(model, encoded, self.setup.config, folder or self.folder, pack_length=128, seed=seed)

    def save_full_model(self, trainer: Trainer) -> None:
        probes = contract.make_probes(self.template)
        scores = trainer.score([p.ids for p in probes], [p.start for p in probes])
        trained_model.save_full_model(
            trainer.model, trainer.weights(), scores, self.setup, self.folder, self.template, ()
        )


def answered_by(model: Any, encoded: list[Any]) -> list[Example]:
    """Rows whose answers are the model's own, so that no other model has a lower loss on them."""
    rows: list[Example] = []
    for i, row in enumerate(encoded[:6]):
        ids = list(row.ids[:20])
        with torch.no_grad():
            for _ in range(24):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answer = Encoded(tuple(ids), tuple([False] * 20 + [True] * 24))
        rows.append(Example(key=f"{i:064x}", source="made", index=i, sequences=(answer,), record=Conversation(())))
    return rows
