"""`[evaluate]`: which models and variants are compared, and on which rows and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import ValidationError, field_serializer, field_validator, model_validator

from corral.export_forms import EXPORT_TYPES, ExportForm
from corral.recipe.answer import Answer
from corral.recipe.data import Source
from corral.recipe.section import Name, PathText, PositiveInt, Section

BUILT_IN_VARIANTS = ("base", "tuned")
"""The variants that every run has: both models with the settings of `[answer]`."""

EngineName = Literal["transformers", "openvino", "vllm"]
TaskName = Literal["arithmetic", "commonsense_qa", "mmlu", "truthfulqa", "xsum", "boolq"]

AnswerMetric = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match", "token_f1", "bertscore"]
ANSWER_METRICS: tuple[AnswerMetric, ...] = get_args(AnswerMetric)
"""Metrics of answers to the run's own test rows."""
DEFAULT_ANSWER_METRICS: tuple[AnswerMetric, ...] = ("rouge1", "rouge2", "rougeL", "bleu")
"""Those that are measured if the recipe names none."""
PREFERENCE_METRICS = ("preference_accuracy", "preference_margin")
"""Metrics of the run's own test rows that rank answers."""
OWN_METRICS = ("loss", *PREFERENCE_METRICS, *ANSWER_METRICS)
"""Metrics of the run's own test rows."""
_CHOICE_METRICS = ("accuracy", "logprob", "logprob_byte")
TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "arithmetic": ("accuracy",),
    **dict.fromkeys(("commonsense_qa", "mmlu", "boolq"), _CHOICE_METRICS),
    "truthfulqa": ("rouge1", "rouge2", "rougeL"),
    "xsum": ("rouge1", "rouge2", "rougeL", "bleu"),
}
"""Metrics of each task."""

MODEL_FORMS = {f"{to}-{kind}": ExportForm(to, kind) for to, kinds in EXPORT_TYPES.items() for kind in kinds}
"""The exported forms of the tuned model, by the name that a variant gives them."""


class Variant(Section):
    """A variant to compare: another model, precision or engine, or other answer settings."""

    name: Name
    """Name of the variant in the scorecard."""
    model: str = "tuned"
    """`base`, `tuned`, a training stage by its name or folder, or an exported form of the tuned model, such as `openvino-int8`
    or `gguf-q8_0`. The form is exported first, also if `[export]` does not name it. A GGUF file is evaluated with its rounded
    weights."""
    engine: EngineName | None = None
    """Engine that computes it; by default `evaluate.engine`, or openvino for an OpenVINO form."""
    against: str | None = None
    """The variant to compare it with; by default `base` or `tuned`, whichever has the same model."""
    answer: Answer = Answer()
    """Settings that differ from `[answer]`; all others are taken from there."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in BUILT_IN_VARIANTS:
            raise ValueError(f"every run has a variant {name!r}: give this one another name")
        return name

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.form is not None and self.form.target == "openvino" and self.engine not in (None, "openvino"):
            raise ValueError(f'`engine` = "{self.engine}" does not read `model` = "{self.model}": remove `engine`')
        return self

    @field_serializer("answer")
    def _serialize_given_settings(self, answer: Answer) -> dict[str, Any]:
        # Only what was given: written out in full, a variant would no longer follow changes of `[answer]`.
        return answer.model_dump(mode="json", exclude_unset=True, exclude_none=True)

    @property
    def form(self) -> ExportForm | None:
        """The exported form that it evaluates, if any."""
        return MODEL_FORMS.get(self.model)

    @property
    def compared_with(self) -> str:
        """Name of the variant that it is compared with."""
        return self.against or ("base" if self.model == "base" else "tuned")

    def answer_settings(self, answer: Answer) -> Answer:
        """`[answer]` with this variant's changes. Raises ValidationError if the result is not valid."""
        return answer.with_changes(self._serialize_given_settings(self.answer))


class Task(Section):
    """A public question set, for evaluation only (`corral assets` shows the licences)."""

    name: TaskName
    """`arithmetic`: word problems whose answer is a number (ASDiv). `commonsense_qa`, `mmlu`, `boolq`: multiple choice, scored
    by the generated answer and by the log-probability of each option. `truthfulqa`: questions that invite a false answer,
    scored by ROUGE against true answers. `xsum`: one-sentence summaries, scored by ROUGE."""
    rows: PositiveInt = 200
    """Number of questions, sampled by the seed; a smaller number selects a subset of a larger one. Few-shot examples come from
    the other questions."""
    max_tokens: PositiveInt | None = None
    """Most new tokens of an answer; by default `answer.max_tokens`."""


class BertScore(Section):
    """BERTScore (Zhang et al. 2020, arXiv 1904.09675), if `evaluate.metrics` names it (the extra `rag`)."""

    model: PathText = "asset:all-minilm-l6-v2"
    """Model whose vectors are compared: a folder in transformers' format, `asset:NAME`, or a name on the hub such as
    `roberta-large`, which published figures mostly have. Figures of different models cannot be compared."""
    layer: PositiveInt | None = None
    """The layer whose vectors are compared; by default the one that bert-score recommends for the model, else the last but
    one."""


class Evaluate(Section):
    """Comparison of the base model, the tuned model and their variants, on test rows and public question sets."""

    engine: Literal["auto"] | EngineName = "auto"
    """Engine that computes answers and log-probabilities. `auto`: openvino on a CPU if it is installed (the extra `openvino`;
    several times faster), vllm on a GPU if it is installed, else transformers."""
    test: Source | None = None
    """Rows to evaluate on in place of the test rows of `[data]`, as they are; `corral evaluate RUN --test FILE` sets its
    `path`."""
    loss_rows: PositiveInt = 200
    """Most test rows for the held-out loss; each window of a document is one. As many preferences or answers with scores are
    measured besides."""
    answer_rows: PositiveInt = 50
    """Most test rows for which answers are generated and scored."""
    metrics: tuple[AnswerMetric, ...] = DEFAULT_ANSWER_METRICS
    """How answers to test rows are scored. `chrf`: n-grams of characters, in any script. `exact_match` and `token_f1`: SQuAD's
    scores of short answers. `bertscore`: similarity of contextual vectors, see `[evaluate.bertscore]`."""
    bertscore: BertScore = BertScore()
    primary: str = "loss"
    """The metric that decides whether one variant is better than another: `loss`, `preference_accuracy`, `preference_margin`,
    one of `metrics`, or `TASK/METRIC` of a task below, such as `arithmetic/accuracy`. Name it before you see the scores. The
    others are secondary: their p-values and intervals are adjusted for their number."""
    variants: tuple[Variant, ...] = ()
    """Variants besides base and tuned: one `[[evaluate.variants]]` table each."""
    tasks: tuple[Task, ...] = ()
    """Public question sets: one `[[evaluate.tasks]]` table each."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for kind, names in (("variants", [v.name for v in self.variants]), ("tasks", [t.name for t in self.tasks])):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"two {kind} are called {name!r}: remove one, or give it another name")
        known = (*BUILT_IN_VARIANTS, *(v.name for v in self.variants))
        for variant in self.variants:
            if variant.compared_with not in known or variant.compared_with == variant.name:
                raise ValueError(
                    f"variant {variant.name!r} is `against` {variant.compared_with!r}: "
                    f"give one of {', '.join(name for name in known if name != variant.name)}"
                )
        return self

    @field_validator("metrics")
    @classmethod
    def _remove_repeated(cls, metrics: tuple[AnswerMetric, ...]) -> tuple[AnswerMetric, ...]:
        return tuple(dict.fromkeys(metrics))

    @field_validator("test")
    @classmethod
    def _check_test(cls, test: Source | None) -> Source | None:
        for name in ("side", "repeat", "weight"):
            if test is not None and getattr(test, name) != Source.model_fields[name].default:
                raise ValueError(
                    f"`{name}` is for a source of `[data]`, and these rows are evaluated on as they are: remove it"
                )
        return test

    @model_validator(mode="after")
    def _check_primary(self) -> Self:
        own = ("loss", *PREFERENCE_METRICS, *self.metrics)
        known = [*own, *(f"{task.name}/{metric}" for task in self.tasks for metric in TASK_METRICS[task.name])]
        if self.primary not in known:
            task = self.primary.partition("/")[0]
            advice = (
                f"add the task {task!r}, or "
                if task in TASK_METRICS and task not in (t.name for t in self.tasks)
                else f"add {task!r} to `metrics`, or "
                if self.primary in ANSWER_METRICS
                else ""
            )
            raise ValueError(f"`primary` = {self.primary!r} is not measured: {advice}give one of {', '.join(known)}")
        return self

    def check_variants(self, answer: Answer) -> None:
        """Raises ValueError if a variant's changes are not valid together with `[answer]`, or if it selects its answers by the
        primary metric."""
        methods: dict[str, str] = dict.fromkeys(BUILT_IN_VARIANTS, answer.consensus.method)
        for i, variant in enumerate(self.variants):
            try:
                methods[variant.name] = variant.answer_settings(answer).consensus.method
            except ValidationError as error:
                first = error.errors()[0]
                reason = first.get("ctx", {}).get("error", first["msg"])
                raise ValueError(f"`evaluate.variants.{i}.answer` with `[answer]`: {reason}") from None
        if not self.primary.rpartition("/")[2].startswith("rouge"):
            return
        for variant in self.variants:
            sides = [methods[name].startswith("rouge-l") for name in (variant.name, variant.compared_with)]
            if sides[0] != sides[1]:
                chosen = variant.name if sides[0] else variant.compared_with
                raise ValueError(
                    f"variant {chosen!r} chooses its answers by ROUGE-L, and would be judged by `evaluate.primary` = "
                    f"{self.primary!r}: name another primary metric, or choose by another `consensus.method`"
                )
