"""`[evaluate]`: which models are compared, asked how, and on what. Knows nothing about how anything is measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from corral.export_forms import EXPORT_TYPES, ExportForm
from corral.recipe.answer import Answer
from corral.recipe.section import PositiveInt, Section

BUILT_IN_VARIANTS = ("base", "tuned")
"""The variants that every run has: both models, asked as `[answer]` says."""

EngineName = Literal["transformers", "openvino", "vllm"]
TaskName = Literal["arithmetic", "commonsense_qa", "mmlu", "truthfulqa", "xsum", "boolq"]

_FORMS = {f"{to}-{kind}": ExportForm(to, kind) for to, kinds in EXPORT_TYPES.items() for kind in kinds}


class Variant(Section):
    """Another way to be compared: another model, precision or engine, or asked in another way."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the scorecard calls it."""
    model: str = "tuned"
    """`base`, `tuned`, or a form of the tuned model: `openvino-int8`, `gguf-q8_0` and the like. A form is exported before, if
    `[export]` does not name it anyway. A GGUF file is computed with its weights as they are rounded."""
    engine: EngineName | None = None
    """What computes it; by default `evaluate.engine`, and openvino for its own forms."""
    against: str | None = None
    """The variant that it is compared with; by default `base` or `tuned`, whichever is of the same model."""
    answer: Answer = Answer()
    """What is not as in `[answer]`; only the settings that are given here differ."""

    @field_validator("name")
    @classmethod
    def _not_plain(cls, name: str) -> str:
        if name in BUILT_IN_VARIANTS:
            raise ValueError(f"every run has a variant {name!r}: give this one another name")
        return name

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: str) -> str:
        if model not in BUILT_IN_VARIANTS and model not in _FORMS:
            raise ValueError(f"there is no model {model!r}: known are {', '.join((*BUILT_IN_VARIANTS, *_FORMS))}")
        return model

    @model_validator(mode="after")
    def _computed_by_its_engine(self) -> Self:
        if self.form is not None and self.form.target == "openvino" and self.engine not in (None, "openvino"):
            raise ValueError(f'`engine` = "{self.engine}" does not read `model` = "{self.model}": remove `engine`')
        return self

    @field_serializer("answer")
    def _serialize_given_settings(self, answer: Answer) -> dict[str, Any]:
        # Written out in full, a variant would no longer follow `[answer]`.
        return answer.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    @property
    def form(self) -> ExportForm | None:
        """The exported form that it computes, if it is one."""
        return _FORMS.get(self.model)

    @property
    def compared_with(self) -> str:
        """The name of the variant that it is compared with."""
        return self.against or ("base" if self.model == "base" else "tuned")

    def answer_settings(self, answer: Answer) -> Answer:
        """`[answer]` with what this variant changes. Raises: ValidationError (they do not go together)."""
        return answer.with_changes(self._serialize_given_settings(self.answer))


class Task(Section):
    """Questions of a public set, for evaluation only (`corral assets` shows their licences)."""

    name: TaskName
    """`arithmetic`: word problems with one number as their answer (ASDiv). `commonsense_qa`, `mmlu`, `boolq`: questions with
    options, scored by what is answered and by the log-probability of each option. `truthfulqa`: questions that invite a false
    answer, scored by ROUGE against the true ones. `xsum`: summaries in a sentence, scored by ROUGE."""
    rows: PositiveInt = 200
    """Questions asked, drawn by the seed, so that a smaller number is a part of a larger; examples come from the others."""
    max_tokens: PositiveInt | None = None
    """Most new tokens of an answer; by default as in `answer`."""


class Evaluate(Section):
    """Comparison of the base with the tuned model, and of their variants, on test rows and on public questions."""

    engine: Literal["auto"] | EngineName = "auto"
    """What computes answers and log-probabilities. `auto`: openvino on a CPU where it is installed (the extra `openvino`;
    several times faster), vllm on a GPU where it is installed, else transformers."""
    loss_rows: PositiveInt = 200
    """Most test rows for the held-out loss."""
    answer_rows: PositiveInt = 50
    """Most test rows for which answers are generated and scored (ROUGE, BLEU)."""
    variants: tuple[Variant, ...] = ()
    """One `[[evaluate.variants]]` table for each, besides base and tuned."""
    tasks: tuple[Task, ...] = ()
    """One `[[evaluate.tasks]]` table for each."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        for kind, names in (("variants", [v.name for v in self.variants]), ("tasks", [t.name for t in self.tasks])):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {kind} are called {name!r}: remove one, or name it otherwise")
        known = (*BUILT_IN_VARIANTS, *(v.name for v in self.variants))
        for variant in self.variants:
            if variant.compared_with not in known or variant.compared_with == variant.name:
                raise ValueError(
                    f"variant {variant.name!r} is `against` {variant.compared_with!r}: "
                    f"give one of {', '.join(name for name in known if name != variant.name)}"
                )
        return self

    def check_variants(self, answer: Answer) -> None:
        """Raises ValueError where a variant's changes do not go with `[answer]`."""
        for i, variant in enumerate(self.variants):
            try:
                variant.answer_settings(answer)
            except ValidationError as error:
                fault = error.errors()[0]
                what = fault.get("ctx", {}).get("error", fault["msg"])
                raise ValueError(f"`evaluate.variants.{i}.answer` with `[answer]`: {what}") from None
