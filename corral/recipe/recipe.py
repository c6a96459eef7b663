"""The whole recipe: its sections, and what must fit between them. Knows nothing about files or how anything is done."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from corral.export_forms import GgufType, OpenVinoType, Target
from corral.recipe.answer import Answer
from corral.recipe.data import Data, Model
from corral.recipe.evaluate import Evaluate
from corral.recipe.section import Section
from corral.recipe.train import Train


class Export(Section):
    """Other forms of the merged model, each with a contract that proves it. `corral export` adds more."""

    gguf: tuple[GgufType, ...] = ()
    """Types of GGUF files, for llama.cpp and Ollama."""
    openvino: tuple[OpenVinoType, ...] = ()
    """Types of OpenVINO folders, for fast answers on a CPU."""

    @field_validator("gguf", "openvino")
    @classmethod
    def _once(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(types))


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run: its directory is `runs/NAME` unless `--out` says otherwise."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the split, the order of rows, the adapter's first weights and all sampling."""
    model: Model
    data: Data
    train: Annotated[tuple[Train, ...], Field(min_length=1)]
    """One `[[train]]` table for each training stage."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go besides `metrics.jsonl` and the report; the extra `trackers`. TensorBoard's files are in the stage's
    folder (`tensorboard --logdir RUN`); the others are set up by their own environment variables."""
    answer: Answer = Answer()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @model_validator(mode="after")
    def _rows_to_test_on(self) -> Self:
        if self.data.split.test == 0:
            raise ValueError("`data.split.test` is 0: there would be nothing to compare base and tuned model on")
        return self

    @model_validator(mode="after")
    def _rows_to_stop_by(self) -> Self:
        for i, stage in enumerate(self.train):
            key = "early_stopping" if stage.early_stopping else 'merge = "best"' if stage.merge == "best" else None
            if key and self.data.split.validation == 0:
                raise ValueError(f"`train.{i}.{key}` needs validation rows, and `data.split.validation` is 0")
        return self

    @model_validator(mode="after")
    def _packs_hold_examples(self) -> Self:
        for i, stage in enumerate(self.train):
            if stage.pack_length is not None and stage.pack_length < self.data.max_length:
                raise ValueError(
                    f"`train.{i}.pack_length` = {stage.pack_length} is less than `data.max_length` = "
                    f"{self.data.max_length}: an example would not fit in a pack"
                )
        return self

    @model_validator(mode="after")
    def _variants_can_be(self) -> Self:
        self.evaluate.check_variants(self.answer)
        return self

    def with_exports(self, others: Export) -> Recipe:
        """This recipe with the forms of another one too."""
        export = Export(gguf=(*self.export.gguf, *others.gguf), openvino=(*self.export.openvino, *others.openvino))
        return self.model_copy(update={"export": export})

    def with_export(self, to: Target, kind: str) -> Recipe:
        """This recipe with one more form to export."""
        return self.with_exports(Export.model_validate({to: [kind]}))

    def to_toml(self) -> str:
        """The resolved recipe: every setting written out, reads back as an equal recipe."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
