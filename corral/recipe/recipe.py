"""The whole recipe: its sections, and checks across them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from corral.export_forms import ExportForm, GgufType, OpenVinoType, Target
from corral.recipe.answer import Answer
from corral.recipe.data import Data, Model
from corral.recipe.evaluate import BUILT_IN_VARIANTS, MODEL_FORMS, Evaluate
from corral.recipe.section import Name, Section, Seed
from corral.recipe.serve import Serve
from corral.recipe.train import Lora, Train


class Export(Section):
    """Other forms of the merged model, each with a contract that proves it. `corral export` can add more later."""

    gguf: tuple[GgufType, ...] = ()
    """Types of GGUF files, for llama.cpp and Ollama."""
    openvino: tuple[OpenVinoType, ...] = ()
    """Types of OpenVINO folders, for fast inference on a CPU."""

    @field_validator("gguf", "openvino")
    @classmethod
    def _remove_repeated(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(types))


class Recipe(Section):
    """A whole recipe."""

    name: Name
    """Name of the run: its directory is `runs/NAME` unless `--out` gives another."""
    seed: Seed = 0
    """Random seed of the split, the choice and order of rows, the adapter's initial weights and all sampling, where none of
    their own is given."""
    model: Model
    data: Data
    train: Annotated[tuple[Train, ...], Field(min_length=1)]
    """Training stages: one `[[train]]` table each."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where training metrics are sent, besides `metrics.jsonl` and the report (the extra `trackers`). TensorBoard's files are
    in the stage's folder (`tensorboard --logdir RUN`); the others are configured by their own environment variables."""
    answer: Answer = Answer()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _check_test_rows(self) -> Self:
        if not self.data.has_side("test") and self.evaluate.test is None:
            raise ValueError(
                "`data.split.test` is 0: without test rows the base and the tuned model cannot be compared"
            )
        return self

    @model_validator(mode="after")
    def _check_validation_rows(self) -> Self:
        for i, stage in enumerate(self.train):
            key = "early_stopping" if stage.early_stopping else 'merge = "best"' if stage.merge == "best" else None
            if key and not self.data.has_side("validation"):
                raise ValueError(f"`train.{i}.{key}` needs validation rows, and `data.split.validation` is 0")
        return self

    @model_validator(mode="after")
    def _check_pack_length(self) -> Self:
        for i, stage in enumerate(self.train):
            if stage.pack_length != "auto" and stage.pack_length < self.data.max_length:
                raise ValueError(
                    f"`train.{i}.pack_length` = {stage.pack_length} is less than `data.max_length` = "
                    f"{self.data.max_length}: an example would not fit in a pack"
                )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.model.adapter is not None and self.train:
            first = self.train[0]
            if first.method != "lora":
                raise ValueError(
                    f'`model.adapter` is trained further, and `train.0.method` is "{first.method}": remove one'
                )
            if first.lora != Lora():
                raise ValueError("`model.adapter` has a rank and layers of its own: remove `train.0.lora`")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        labels = [source.label for source in self.data.sources]
        for i, stage in enumerate(self.train):
            for name in stage.sources or ():
                if name not in labels:
                    raise ValueError(f"`train.{i}.sources` names {name!r}: the sources are {', '.join(labels)}")
            names = [each.name for each in self.train if each.name is not None]
            if stage.name in (*BUILT_IN_VARIANTS, *MODEL_FORMS) or names.count(stage.name or "") > 1:
                raise ValueError(f"`train.{i}.name` = {stage.name!r} names another model too: give another name")
            self.start_of(i + 1)
        named = {label for stage in self.train for label in (labels if stage.sources is None else stage.sources)}
        for source in self.data.sources:
            if source.side != "test" and source.label not in named:
                raise ValueError(
                    f"no training stage uses the source {source.label!r}: name it in `train.sources`, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _check_mixtures(self) -> Self:
        weights = {source.label: source.weight for source in self.data.training_sources}
        for one, other in combinations(self.mixtures, 2):
            shared = [label for label in one if label in other]
            if shared and any(weights[label] is not None for label in (*one, *other)):
                raise ValueError(
                    f"two training stages mix {shared[0]!r} with different sources, and a `weight` is a share of one "
                    "mixture: let stages with weighted sources name the same sources or entirely different ones, or remove "
                    "the weights"
                )
        return self

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        for variant in self.evaluate.variants:
            if variant.form is None and variant.model not in BUILT_IN_VARIANTS:
                self.stage_number(
                    variant.model, f"`evaluate.variants.{variant.name}.model`", (*BUILT_IN_VARIANTS, *MODEL_FORMS)
                )
        self.evaluate.check_variants(self.answer)
        return self

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names and folders of the training stages, in order."""
        return tuple(f"train-{number}-{stage.name or stage.objective}" for number, stage in enumerate(self.train, 1))

    def stage_number(self, name: str, where: str, others: Sequence[str] = (), before: int | None = None) -> int:
        """The number (from 1) of the training stage with this name or folder.

        Args:
            where: the setting that names it.
            others: what it may name besides.
            before: only stages before this number count.

        Raises: ValueError (there is no such stage, or there are several).
        """
        stages = list(zip(self.stage_names, self.train, strict=True))[: before and before - 1]
        numbers = [n for n, (folder, stage) in enumerate(stages, 1) if name in (folder, stage.name or stage.objective)]
        if len(numbers) != 1:
            known = [*others, *(folder for folder, _ in stages)]
            fault = "is the name of several stages" if numbers else "is no earlier stage" if before else "is no model"
            raise ValueError(f"{where} = {name!r} {fault}: give one of {', '.join(known)}")
        return numbers[0]

    def start_of(self, number: int) -> int:
        """The number of the stage whose model training stage `number` (from 1) starts from; 0 for the base model.

        Raises: ValueError (`from` names no earlier stage).
        """
        start = self.train[number - 1].start
        if start is None:
            return number - 1
        return 0 if start == "base" else self.stage_number(start, f"`train.{number - 1}.from`", ("base",), number)

    @property
    def mixtures(self) -> tuple[tuple[str, ...], ...]:
        """The different sets of sources that training stages train on together, by label, in the order of the sources."""
        labels = [source.label for source in self.data.training_sources]
        used = [labels if stage.sources is None else stage.sources for stage in self.train]
        return tuple(dict.fromkeys(tuple(label for label in labels if label in some) for some in used))

    @property
    def split_seed(self) -> int:
        """Seed of the split."""
        return self.seed if self.data.split.seed is None else self.data.split.seed

    @property
    def rows_seed(self) -> int:
        """Seed of the choice of rows and questions."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def answers_seed(self) -> int:
        """Seed of sampled answers and of the choice of examples."""
        return self.seed if self.answer.seed is None else self.answer.seed

    def training_seed(self, number: int) -> int:
        """Seed of training stage `number` (from 1)."""
        seed = self.train[number - 1].seed
        return self.seed if seed is None else seed

    @property
    def export_forms(self) -> list[ExportForm]:
        """The forms that `[export]` and the evaluated variants name."""
        exported = [ExportForm("gguf", type_) for type_ in self.export.gguf]
        exported += [ExportForm("openvino", type_) for type_ in self.export.openvino]
        evaluated = [variant.form for variant in self.evaluate.variants if variant.form is not None]
        return list(dict.fromkeys([*exported, *evaluated]))

    def with_exports(self, others: Export) -> Recipe:
        """This recipe with further forms to export."""
        export = Export(gguf=(*self.export.gguf, *others.gguf), openvino=(*self.export.openvino, *others.openvino))
        return self.model_copy(update={"export": export})

    def with_export(self, to: Target, kind: str) -> Recipe:
        """This recipe with one more form to export."""
        return self.with_exports(Export.model_validate({to: [kind]}))

    def to_toml(self) -> str:
        """The resolved recipe as TOML, with every setting written out; it reads back as an equal recipe."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
