"""`[[train]]`: the settings of a training stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from corral.recipe.alignment import Dpo, Guards, Ipo, Kto, Orpo, Simpo, Ulma
from corral.recipe.section import Fraction, Name, PositiveInt, Section, Seed

_SECTIONS = ("dpo", "ipo", "kto", "orpo", "simpo", "ulma")
"""Objectives that align a model with preferences; each has a section of its name."""
_ALIGNMENT_LR, _ALIGNMENT_WARMUP = 5e-6, 0.1


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear layers of a frozen base model."""

    rank: PositiveInt = 16
    """Rank r of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    """Names of the linear layers that get an adapter; `"all-linear"`: every one but the output layer."""
    rslora: bool = False
    """Scale by alpha / √rank (Kalajdzievski 2023, arXiv 2312.03732), so that high ranks learn as fast as low ones."""
    dora: bool = False
    """Learn magnitude and direction of the weights separately (DoRA: Liu et al. 2024, arXiv 2402.09353)."""


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) and its learning-rate schedule."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """`adamw`: torch's fused AdamW. `adamw_8bit`: moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861). The paged kinds
    move moments to main memory when GPU memory runs short; without a GPU nothing is paged. All but `adamw` need the extra
    `quant`."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate. With any `objective` but `sft` the default is 5e-6: a rate of fine-tuning's size breaks a model."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate's fall from `lr` to 0 after warm-up; `constant` does not fall."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of all steps in which the learning rate rises from 0; 0.03 if `warmup_steps` is not given either, or 0.1
    with any `objective` but `sft`."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps in which the learning rate rises from 0; instead of `warmup_ratio`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""

    @model_validator(mode="after")
    def _check_one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"`warmup_ratio` = {self.warmup_ratio:g} and `warmup_steps` = {self.warmup_steps} cannot both be given: "
                "remove one"
            )
        return self


class Train(Section):
    """A training stage. Stages run in order; each starts from the merged model of the one before, unless `from` names another.
    The model of the last stage becomes the run's."""

    name: Name | None = None
    """Name of the stage; by default its objective. Its folder is `train-N-NAME`, where N counts the stages from 1."""
    start: Annotated[Name | None, Field(alias="from")] = None
    """The model to start from: `base`, or an earlier stage by its name or folder. By default the stage before; of the first,
    the base model. So one run can hold models that were trained side by side."""
    sources: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the sources whose rows it trains and is evaluated on, those with `side = "validation"` too. By default all
    rows of the kind that its objective takes (`sft`: conversations and texts; `kto`, `ulma`: answers with a score, and both
    answers of each pair; the others: pairs of a better and a worse answer)."""
    seed: Seed | None = None
    """Seed of the adapter's initial weights, dropout and the order of rows; by default the recipe's."""
    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "ulma"] = "sft"
    """The loss to minimise. `sft` (supervised fine-tuning): negative log-likelihood of the answers. The others align a model
    with preferences, usually after a stage of `sft`; each has a section of its name for its settings."""
    method: Literal["lora", "full"] = "lora"
    """What is trained: `lora`: an adapter on the frozen model; `full`: all weights of the model."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Precision of the frozen weights under the adapter. `nf4`: 4 bits with quantised scales (QLoRA: Dettmers et al. 2023,
    arXiv 2305.14314). `int8`: 8 bits, with outliers computed separately (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339).
    Both need the extra `quant`, and work on a GPU or a CPU. `none`: as `model.dtype`."""
    int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """With `int8`: inputs larger than this are not quantised; 0 quantises all."""
    merge: Literal["dequantised", "best"] = "dequantised"
    """With quantised weights: the weights that the adapter is merged into. `dequantised`: those it was trained on. `best`:
    these or the model's full-precision weights, whichever give the lower loss on the validation rows."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; 1 if `steps` is not given either."""
    steps: PositiveInt | None = None
    """Number of optimizer steps; instead of `epochs`."""
    batch_size: PositiveInt = 8
    """Examples per optimizer step, over all devices. Every trained token has the same weight; with an objective of pairs or
    single answers every pair or answer has."""
    pack_length: PositiveInt | Literal["auto"] = "auto"
    """Most tokens in one forward pass; examples are packed into it, isolated from each other. `auto`: at least the longest
    example, and on a GPU up to 8192 as its memory allows, on a CPU 512. It changes memory and speed, not the result (except
    with `int8`, where an outlier affects its whole pass), and so never makes a stage train again."""
    group_by_length: bool = False
    """Put examples of similar length into the same step."""
    sharding: Literal["none", "full"] = "none"
    """With several processes (`torchrun`): what each process holds. `none`: the whole model. `full`: its part of every weight,
    gradient and moment, and whole layers only while they compute (FSDP2); for models that do not fit on one device. It
    changes memory and speed, never the result."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Keep only each layer's input and compute the rest again for the gradient: less memory, about a third slower. `auto`: if
    the device's memory does not suffice without. It changes memory and speed, not the result."""
    evaluate_every: PositiveInt = 20
    """Steps between evaluations on the validation rows. The weights with the lowest held-out loss become the result; the loss
    is the objective's, all its terms together."""
    evaluate_rows: PositiveInt = 64
    """Most validation rows per evaluation."""
    early_stopping: PositiveInt | None = None
    """End the stage after this many evaluations in a row without a lower held-out loss; by default never."""
    checkpoint_every: PositiveInt = 20
    """Steps between checkpoints; an interrupted run writes one more."""
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    dpo: Dpo | None = None
    ipo: Ipo | None = None
    kto: Kto | None = None
    orpo: Orpo | None = None
    simpo: Simpo | None = None
    ulma: Ulma | None = None
    guards: Guards | None = None
    """With any `objective` but `sft`."""

    @property
    def threshold(self) -> float:
        """The lowest score of a good answer, of an objective of single answers; else 1, as a chosen answer has."""
        section = self.kto or self.ulma
        return section.threshold if section else 1.0

    @model_validator(mode="before")
    @classmethod
    def _fill_for_objective(cls, value: Any) -> Any:
        """The section of the objective, and the defaults of the optimizer that depend on it."""
        if not isinstance(value, Mapping):
            return value
        given = dict(cast("Mapping[str, Any]", value))
        objective = given.get("objective", "sft")
        for name in _SECTIONS:
            if name != objective and objective in ("sft", *_SECTIONS) and given.get(name) is not None:
                raise ValueError(f'`{name}` is for `objective` = "{name}", and that is "{objective}": remove one')
        if objective == "sft" and given.get("guards") is not None:
            raise ValueError('`guards` are for stages that align a model, and `objective` = "sft" does not: remove one')
        if objective in _SECTIONS:
            given.setdefault(objective, {})
            given.setdefault("guards", {})
            optimizer = given.get("optimizer", {})
            if isinstance(optimizer, Optimizer):
                optimizer = optimizer.model_dump(exclude_unset=True)
            if isinstance(optimizer, dict):
                defaults: dict[str, Any] = {"lr": _ALIGNMENT_LR}
                if "warmup_steps" not in optimizer:
                    defaults["warmup_ratio"] = _ALIGNMENT_WARMUP
                given["optimizer"] = {**defaults, **optimizer}
        return given

    @model_validator(mode="after")
    def _check_one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"`epochs` = {self.epochs:g} and `steps` = {self.steps} cannot both be given: remove one")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.method == "full" and self.quantization != "none":
            raise ValueError(
                f'`method` = "full" trains the weights themselves, and `quantization` = "{self.quantization}" freezes them: '
                "remove one"
            )
        if self.method == "full" and self.lora != Lora():
            raise ValueError('`method` = "full" has no adapter: remove `lora`')
        if self.sharding == "full" and self.quantization != "none":
            raise ValueError(
                f'`sharding` = "full" splits weights, and `quantization` = "{self.quantization}" packs them: remove one'
            )
        if self.sharding == "full" and self.optimizer.kind != "adamw":
            raise ValueError(
                f'`sharding` = "full" splits moments, and `optimizer.kind` = "{self.optimizer.kind}" packs them: '
                'use "adamw"'
            )
        if self.objective != "sft" and self.merge == "best":
            raise ValueError(
                f'`merge` = "best" chooses by the likelihood of the validation rows, and `objective` = "{self.objective}" '
                "makes some of them unlikely: remove it"
            )
        if self.quantization == "none" and self.merge != "dequantised":
            raise ValueError(f'`merge` = "{self.merge}" chooses between quantised and full weights: set `quantization`')
        if self.quantization != "int8" and self.int8_threshold != 6.0:
            raise ValueError(
                f'`int8_threshold` = {self.int8_threshold:g} has no effect without `quantization` = "int8"'
            )
        return self
