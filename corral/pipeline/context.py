"""What the stages of one run share: the run, its recipe, progress, and the base model, loaded when first needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from corral.data.prepare import Prepared
from corral.interrupts import Interrupts
from corral.model.device import Placement, choose_device
from corral.model.loading import resolve_model
from corral.model.naming import ModelFiles, find_adapter_to_train
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run
from corral.training.distributed import World

if TYPE_CHECKING:
    from corral.model.adapter_files import AdapterFiles
    from corral.model.loading import ModelSource
    from corral.template import Template


@dataclass
class RunContext:
    """The shared state of a run's stages."""

    run: Run
    recipe: Recipe
    progress: Progress
    interrupts: Interrupts
    """Tells a stage that it should stop at the next good moment."""
    world: World = field(default_factory=World)
    """The processes that train together; the first of them does all other work alone."""
    profile: bool = False
    """Record where the time of some training steps goes."""

    @cached_property
    def base(self) -> ModelSource:
        """The base model, fetched or converted if necessary."""
        self.progress.start(f"Fetching {self.recipe.model.base}", None)
        try:
            return resolve_model(self.recipe.model.base, progress=self.progress.say)
        finally:
            self.progress.stop()

    @cached_property
    def adapter(self) -> AdapterFiles | None:
        """The adapter that the first training stage trains further. Raises: ModelError, as `find_adapter_to_train`."""
        spec, train = self.recipe.model.adapter, self.recipe.train
        return None if spec is None else find_adapter_to_train(spec, self.base.folder, train[0].quantization)

    @cached_property
    def template(self) -> Template:
        """The recipe's chat template, with the tokenizer of the adapter or of the base model."""
        model, adapter = self.recipe.model, self.adapter and self.adapter.folder
        return ModelFiles(self.base.folder, adapter, model.template, model.template_variables).load_template()

    @cached_property
    def placement(self) -> Placement:
        """Device and dtype of training. What is unexpected about them is reported when they are first needed."""
        placement = choose_device(self.recipe.model.device, self.recipe.model.dtype)
        for note in placement.notes:
            self.progress.say(note)
        return placement

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared rows."""
        return Prepared.open(self.run.path / "prepare")

    def stage_base(self, number: int) -> Path:
        """The folder of the model that training stage `number` (from 1) starts from."""
        return (
            self.base.folder if number == 1 else self.run.path / training_stage_name(self.recipe, number - 1) / "merged"
        )


def training_stage_name(recipe: Recipe, number: int) -> str:
    """The name and directory of training stage `number`, from 1."""
    return f"train-{number}-{recipe.train[number - 1].objective}"
