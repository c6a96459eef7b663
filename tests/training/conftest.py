"""A tiny training stage that a test can start, stop and inspect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.model import adapters
from corral.recipe import Train
from corral.template import Template
from corral.training import trained_model
from corral.training.loop import Trainer
from corral.training.trained_model import TrainingSetup
from tests.model.tiny import fill_lora_b
from tests.training.stage import Stage
from tests.training.tiny import make_tiny_trainer


@pytest.fixture(scope="session")
def tiny_trainer(encoded_rows: list[Any], tiny_folder: Path) -> Callable[..., Trainer]:
    """Creates a trainer in a folder; see `make_tiny_trainer` for its settings."""

    def make(folder: Path, **settings: Any) -> Trainer:
        return make_tiny_trainer(folder, encoded_rows, tiny_folder, **settings)

    return make


@pytest.fixture
def make_stage(tiny_folder: Path, template: Template, tmp_path: Path) -> Callable[..., Stage]:
    """Creates a stage in `tmp_path`; if it trains an adapter, with one that changes the model much."""

    def make(config: Train, dtype: Any = "float32") -> Stage:
        setup = TrainingSetup(tiny_folder, config, "cpu", dtype)
        if config.method != "full":
            model = fill_lora_b(trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3), 0.02)
            (tmp_path / trained_model.ADAPTER_FOLDER).mkdir()
            adapters.save(model, tmp_path / trained_model.ADAPTER_FOLDER, base="tiny")
        return Stage(setup, tmp_path, template)

    return make
