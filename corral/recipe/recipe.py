"""The whole recipe: its sections, and checks across them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from corral.export_forms import GgufType, OpenVinoType, Target
from corral.recipe.answer import Answer
from corral.recipe.data import Data, Model
from corral.recipe.evaluate import Evaluate
from corral.recipe.section import Section
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

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: its directory is `runs/NAME` unless `--out` gives another."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the split, the order of rows, the adapter's initial weights and all sampling."""
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

    @model_validator(mode="after")
    def _check_test_rows(self) -> Self:
        if self.data.split.test == 0:
            raise ValueError(
                "`data.split.test` is 0: without test rows the base and the tuned model cannot be compared"
            )
        return self

    @model_validator(mode="after")
    def _check_validation_rows(self) -> Self:
        for i, stage in enumerate(self.train):
            key = "early_stopping" if stage.early_stopping else 'merge = "best"' if stage.merge == "best" else None
            if key and self.data.split.validation == 0:
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
    def _check_variants(self) -> Self:
        self.evaluate.check_variants(self.answer)
        return self

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
