"""The face of a stage, and what the stages of one run share: the run, its recipe, progress, and the base model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from corral.data.prepare import Prepared
from corral.errors import CorralError, ModelError, RunError
from corral.interrupts import Interrupts
from corral.model.device import Placement, choose_device
from corral.model.folder import model_identity
from corral.model.loading import load_template, resolve_model
from corral.model.naming import ModelFiles, find_adapter_to_train
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run
from corral.run.promotion import MERGED_FOLDER, read_promotion
from corral.run.stage_record import StageFolder, find_made, is_finished, read_record
from corral.storage import sha256_file
from corral.training.distributed import World

if TYPE_CHECKING:
    from corral.model.adapter_files import AdapterFiles
    from corral.model.loading import ModelSource
    from corral.template import Template


class Stage(Protocol):
    """A stage of a recipe's pipeline. The pipeline asks each for these, in the order of the stages."""

    @property
    def name(self) -> str:
        """Its name, and that of its folder in the run."""
        ...

    @property
    def disposable(self) -> tuple[str, ...]:
        """Beginnings of the names of its files that a finished stage can do without."""
        ...

    def needs(self) -> int:
        """Check what must be there before anything long begins. Returns: bytes that the stage will write, about.

        Raises: CorralError (something is missing, or the stage cannot do what the recipe asks).
        """
        ...

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Everything that its content depends on, as JSON values and `Settings`.

        Args:
            fingerprints: of the stages before it. Those that it depends on are the input `stages`.
        """
        ...

    def run(self, folder: StageFolder) -> None:
        """Do its work in its folder, or what is missing of it. Raises: CorralError, KeyboardInterrupt."""
        ...


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
    _hashes: dict[str, str] = field(default_factory=dict[str, str])
    _unreadable: dict[str, Exception] = field(default_factory=dict[str, Exception])

    @cached_property
    def base(self) -> ModelSource:
        """The base model, fetched or converted if necessary."""
        self.progress.start(f"Fetching {self.recipe.model.base}", None)
        try:
            return resolve_model(self.recipe.model.base, progress=self.progress.say)
        finally:
            self.progress.stop()

    @cached_property
    def base_identity(self) -> str:
        """Hash of the base model: as the run recorded it, if the recipe names the same one (a folder by its last part, as it
        may lie elsewhere) and there is no folder here to look at; a finished run needs no base model."""
        spec, recorded = self.recipe.model.base, self.recorded_model
        if recorded and not Path(spec).exists() and _is_same_place(spec, recorded["spec"]):
            return recorded["identity"]
        return self.base.identity

    @property
    def recorded_model(self) -> Mapping[str, str]:
        """`spec`, `identity` and `template` of the base model as the lineage of the run has them; empty if it has none yet."""
        return self._lineage.get("model", {})

    @cached_property
    def _lineage(self) -> Mapping[str, Any]:
        try:
            lineage: Any = json.loads((self.run.path / "lineage.json").read_text("utf-8"))
        except (OSError, ValueError):
            lineage = None
        return cast("dict[str, Any]", lineage) if isinstance(lineage, dict) else {}

    @cached_property
    def adapter(self) -> AdapterFiles | None:
        """The adapter that the first training stage trains further. Raises: ModelError, as `find_adapter_to_train`."""
        spec, train = self.recipe.model.adapter, self.recipe.train
        return None if spec is None else find_adapter_to_train(spec, self.base.folder, train[0].quantization)

    @cached_property
    def template(self) -> Template:
        """The recipe's chat template, with the tokenizer of the adapter or of the base model; where the base model cannot be
        had, as a finished run saved it with its own model."""
        try:
            base = self.base.folder
        except CorralError as error:
            try:
                template = load_template(self.run.model, system=self.recipe.data.system_prompt)
            except CorralError:
                raise error from None
            self.progress.say(f"the base model is not here: the template is that of the run's model ({error.what})")
            return template
        return ModelFiles(base, self.adapter and self.adapter.folder, self.recipe).load_template()

    @cached_property
    def placement(self) -> Placement:
        """Device and dtype of training. What is unexpected about them is reported when they are first needed."""
        placement = choose_device(self.recipe.model.device, self.recipe.model.dtype)
        for note in placement.notes:
            self.progress.say(note)
        return placement

    @cached_property
    def placement_here(self) -> Placement:
        """The same for what is computed after training, perhaps on another machine: the recipe's device if there is one, else
        the best one here."""
        try:
            return self.placement
        except CorralError as error:
            self.progress.say(f"{error.what}: after training, the best device here is used")
            return choose_device("auto")

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared rows."""
        return Prepared.open(self.run.path / "prepare")

    @property
    def config_folder(self) -> Path:
        """A folder with the `config.json` that all models of the run share: of the run's model if it has one of this base."""
        with contextlib.suppress(RunError):
            if self.recorded_model.get("identity") == self.base_identity:
                return self.run.model
        return self.base.folder

    def hash_or_recorded(self, stage: Stage, name: str, place: str, read: Callable[[], str]) -> str:
        """A hash of what a stage reads; if that is not here, the one that the finished stage has as its input `name`.

        Args:
            name: of the input; `rows.0` is the first of a list.
            place: where it is read from. If the run was made from another place than one of the same name, it is not recorded.
        """
        key = f"{stage.name}.{name}"
        earlier, self.read_from[key] = self.read_from.get(key, place), place
        if key not in self._hashes:
            try:
                self._hashes[key] = read()
            except (CorralError, OSError) as error:
                recorded = self._recorded_input(stage, name)
                if recorded is None or not _is_same_place(place, earlier):
                    raise
                self._unreadable.setdefault(stage.name, error)
                reason = error.what if isinstance(error, CorralError) else error
                self.progress.say(f"{place} cannot be read here ({reason}): what was made from it stays as it is")
                self._hashes[key] = recorded
        return self._hashes[key]

    def _recorded_input(self, stage: Stage, name: str) -> str | None:
        folder = self.run.path / stage.name
        recorded: Any = (read_record(folder) or {}).get("inputs") if is_finished(folder) else None
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in name.split("."):
                recorded = recorded[int(key) if key.isdecimal() else key]
            return str(recorded)
        return None

    @cached_property
    def read_from(self) -> dict[str, str]:
        """Where each input was read from, by stage and name, as the lineage has it and as it is now."""
        return dict(self._lineage.get("read_from", {}))

    def template_source(self, stage: Stage) -> list[Any]:
        """What the chat template is made from, besides the base model's tokenizer: an input of `stage`."""
        model = self.recipe.model
        source = model.template
        if source.endswith(".jinja"):
            source = self.hash_or_recorded(stage, "template.0", source, lambda: sha256_file(Path(model.template)))
        return [source, model.template_variables, self.recipe.data.system_prompt]

    def adapter_identity(self, stage: Stage) -> str | None:
        """Hash of the adapter that the first training stage trains further: an input of `stage`."""
        spec = self.recipe.model.adapter

        def read() -> str:
            assert self.adapter is not None
            return model_identity(self.adapter.folder)

        return None if spec is None else self.hash_or_recorded(stage, "adapter", spec, read)

    def check_readable(self, stage: Stage) -> None:
        """Raises the error of `hash_or_recorded` if something that the stage reads is not here."""
        if stage.name in self._unreadable:
            raise self._unreadable[stage.name]

    def model_of_stage(self, number: int) -> Path:
        """The folder of the model that training stage `number` leaves; 0: the base model.

        Raises: ModelError (the base model is another one than this run began with).
        """
        if number == 0:
            if self.base.identity != self.base_identity:
                raise ModelError(
                    "the base model is another one than this run began with",
                    where=self.recipe.model.base,
                    hint="name the revision of a hub's model (hub:OWNER/NAME@REVISION), or make a new run with --out",
                )
            return self.base.folder
        return self.run.path / self.recipe.stage_names[number - 1] / MERGED_FOLDER

    def promoted_stage(self, fingerprints: Mapping[str, str]) -> dict[str, str]:
        """The fingerprint, by name, of the training stage whose model the run stands for; while the last stage is not
        finished, of that stage, which will be promoted.

        Args:
            fingerprints: of the stages as they are to be.
        """
        last, run = self.recipe.stage_names[-1], self.run.path
        promotion = read_promotion(run) if find_made(run, last, fingerprints[last]) == run / last else None
        return {last: fingerprints[last]} if promotion is None else {promotion.stage: promotion.fingerprint}

    @property
    def rows_are_known(self) -> bool:
        """Whether the prepared rows have been opened: they are those of this recipe then."""
        return "prepared" in self.__dict__


def _is_same_place(one: str, other: str) -> bool:
    """Whether two places can be the same: equal addresses, or paths that end alike, as files may lie elsewhere on another
    machine."""
    is_path = not one.startswith(("asset:", "hub:", "s3://"))
    return one == other or (is_path and Path(one).name == Path(other).name)
