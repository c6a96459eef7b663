"""The recipe: one frozen, validated TOML file that says everything a run needs.

Every setting is declared once, here, and documented where it stands; `reference` makes `docs/recipe.md` of it. What cannot
be combined cannot be written, or is refused with both keys named. This module does not know how anything is done: it checks
that a recipe makes sense by itself, never that its files exist.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from corral.errors import RecipeError
from corral.forms import GgufType, OpenVinoType, Target

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(_Section):
    """The model to start from."""

    base: str
    """`asset:NAME` (ships as a package), `hub:OWNER/NAME[@REVISION]`, a folder, or a `.gguf` file. A folder may also hold
    Llama 2 or 3 as Meta publishes it (`params.json`, `consolidated.*.pth`, `tokenizer.model`), which is converted once."""
    template: str = "tokenizer"
    """Chat template: `tokenizer` (the model's own), one that ships with corral (`chatml`, `instruction`, `question`,
    `llama-2`, `llama-3`, `llama-3.1`, `smollm2`, `zephyr`), or a `.jinja` file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights are held and computed in. `auto`: bfloat16 on a GPU that has it, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto`: the first GPU, else the CPU."""


class Mapping(_Section):
    """Rows of any other columns: texts with the columns' names in braces, `"{title}\\n{body}"`. Which keys are given says what
    a row becomes: prompt and completion a conversation, prompt, chosen and rejected a preference, prompt, completion and
    score feedback; messages a conversation as it stands in the rows. A null in a row is no text; a text that comes out blank
    makes its row unusable."""

    system: str | None = None
    """A system message."""
    prompt: str | None = None
    """What the user says."""
    completion: str | None = None
    """What the assistant answers."""
    chosen: str | None = None
    """The better answer."""
    rejected: str | None = None
    """The worse answer."""
    score: str | None = None
    """The column that says how good the completion is."""
    score_range: tuple[float, float] | None = None
    """The scores of the worst and of the best completion. By default 0 to 1, or -1 and 1; rows with other scores are refused
    until it is given. It may be given alone, for rows that are feedback by their columns."""
    messages: str | None = None
    """The column that holds a list of messages, or the JSON text of one; instead of prompt and completion."""
    role: str | None = None
    """With `messages`: the key of a message that says who wrote it; by default `from`, `role`, `speaker` or `author`."""
    content: str | None = None
    """With `messages`: the key of a message's text; by default `value`, `content` or `text`."""
    roles: dict[str, Literal["system", "user", "assistant"]] | None = None
    """With `messages`: who the rows' words for authors are, beside the usual ones: `{ caller = "user", desk = "assistant" }`.
    """


class Source(_Section):
    """One source of rows."""

    path: str
    """`asset:NAME`, `hub:OWNER/NAME[@REVISION]`, `s3://BUCKET/KEY`, or a file, folder or glob of `.jsonl`, `.json`, `.csv`,
    `.tsv`, `.parquet` or `.txt` files, also with `.gz` or `.zst` after it. A relative path is relative to the recipe.
    A `.jsonl` file holds one object on each line, a `.json` file a list of them, a `.txt` file one document on each line;
    `.csv` and `.tsv` files begin with the columns' names, and all their values are text. A folder is read with the folders in
    it, in the order of names."""
    config: str | None = None
    """The configuration (subset) of a data set on the hub."""
    split: str = "train"
    """The split of a data set on the hub."""
    format: str = "auto"
    """What a row looks like: the name of a format; `auto` recognises it from the columns, and says which it took."""
    mapping: Mapping | None = None
    name: str | None = None
    """The name in the ledger; by default the path."""
    rows: Positive | None = None
    """Use at most this many rows, chosen by a seeded hash of their content, so that a smaller number is a part of a larger;
    by default all."""
    repeat: Positive = 1
    """Passes over this source's training rows for each pass over the others."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """This source's part of the training examples, in proportion to the other sources' weights: 3 and 1 are three quarters and
    one quarter. Every source has one, or none. The mixture is as large as it can be with each row standing in it `repeat`
    times: the source that is exhausted first gives all its training rows; of the others those of lowest hash are taken, so
    that a smaller part is held in a larger, and the rest is `not sampled`. Held-out rows are not weighed."""

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        if self.mapping is not None and self.format != "auto":
            raise ValueError(f"`format` = {self.format!r} and a `mapping` cannot both be given: remove one")
        return self

    @model_validator(mode="after")
    def _parts_of_the_hub(self) -> Self:
        if not self.path.startswith("hub:") and (self.config is not None or self.split != "train"):
            raise ValueError(
                f"`config` and `split` choose from a data set on the hub, and {self.path!r} is none: remove them"
            )
        return self

    @property
    def label(self) -> str:
        """The name in the ledger."""
        return self.name or self.path


class Split(_Section):
    """Which rows are held out: the same part of each source, exact to the row (largest remainders). Of each source the rows of
    lowest hash (of content and seed) are the test side, those of highest the validation side: if a side takes more of them, it
    holds those it held before, and their order does not matter. As sides are exact, rows at their borders may change sides
    when rows are added or removed, or a cap or filter changes; the others stay. Compare runs on the same data and seed. Rows
    of equal content are all on one side, even if that is then too large."""

    validation: Fraction | Positive = 0.05
    """Share (below 1) or number of rows for evaluation while training."""
    test: Fraction | Positive = 0.05
    """Share (below 1) or number of rows for `evaluate`; never seen in training."""

    @model_validator(mode="after")
    def _something_left(self) -> Self:
        if self.validation < 1 and self.test < 1 and self.validation + self.test >= 1:
            raise ValueError(f"validation + test is {self.validation + self.test:g}: nothing is left to train on")
        return self


class Data(_Section):
    """What to train on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """One `[[data.sources]]` table for each source."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Most tokens of one example."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What becomes of a longer example. `truncate` cuts its end, so that it loses its end token. The ledger counts it."""
    duplicates: Literal["exact", "near", "keep"] = "exact"
    """Which rows count as copies of one before them and are left out: `exact` the same content, `near` also almost the same
    words (MinHash of 5-word shingles), `keep` none."""
    contamination: Literal["report", "drop", "ignore"] = "report"
    """What becomes of training rows that share long passages with held-out rows."""
    max_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    """Stop before training if more than this share of the rows asked for is lost (dropped, cut, masked): 0.02 or "2%"."""
    split: Split = Split()

    @field_validator("max_loss", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                raise ValueError(f"{value!r} is no percentage") from None
        return value

    @field_validator("sources")
    @classmethod
    def _labels_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        labels = [s.label for s in sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources are called {label!r}: give one of them another `name`")
        return sources

    @field_validator("sources")
    @classmethod
    def _all_weighted_or_none(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        weighted, others = ([s.label for s in sources if (s.weight is None) is none] for none in (False, True))
        if weighted and others:
            raise ValueError(
                f"{weighted[0]!r} has a `weight` and {others[0]!r} has none: give every source one, or remove it"
            )
        return sources


class Lora(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear layers; the base stays frozen."""

    rank: Positive = 16
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
    """Learn the size and the direction of the weights apart (DoRA: Liu et al. 2024, arXiv 2402.09353)."""


class Optimizer(_Section):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) and its learning-rate schedule."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """`adamw`: torch's, fused. `adamw_8bit` keeps its moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861); the paged
    ones move them to the host's memory when the GPU's runs short. These are the extra `quant`; without a GPU nothing is
    paged."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls from `lr` to 0 after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of all steps in which the rate rises from 0; 0.03 if `warmup_steps` is not given either."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the rate rises from 0; instead of `warmup_ratio`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; larger gradients are scaled down."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"`warmup_ratio` = {self.warmup_ratio:g} and `warmup_steps` = {self.warmup_steps} cannot both be given: "
                "remove one"
            )
        return self


class Train(_Section):
    """One training stage. Stages run in order, each from the merged model of the one before."""

    objective: Literal["sft"] = "sft"
    """What to minimise. `sft`: the negative log-likelihood of the answers."""
    method: Literal["lora", "full"] = "lora"
    """What is trained: an adapter on the frozen model, or all weights of the model itself."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """In what the frozen weights under the adapter are held. `nf4`: 4 bits, their scales quantised again (QLoRA: Dettmers et
    al. 2023, arXiv 2305.14314). `int8`: 8 bits, outliers apart (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339). Both are
    the extra `quant`, on a GPU or a CPU. `none`: `model.dtype`."""
    int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """With `int8`: inputs larger than this are multiplied unquantised; 0 quantises all."""
    merge: Literal["dequantised", "best"] = "dequantised"
    """With quantised weights: what the adapter is merged into. `dequantised`: the weights it was trained on. `best`: these or
    the model's full-precision weights, whichever gives the lower loss on the validation rows."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; 1 if `steps` is not given either."""
    steps: Positive | None = None
    """Optimizer steps; instead of `epochs`."""
    batch_size: Positive = 8
    """Examples per optimizer step, over all devices. Each trained token weighs the same."""
    pack_length: Positive | None = None
    """Most tokens in one forward pass, into which examples are packed, isolated from each other. By default
    the larger of `data.max_length` and 8192 on a GPU or 512 on a CPU. It changes memory and speed, not the
    result (but for `int8`, where an outlier counts for its whole pass)."""
    group_by_length: bool = False
    """Put examples of about the same length into the same step."""
    sharding: Literal["none", "full"] = "none"
    """With several processes (`torchrun`), what each one holds. `none`: the whole model. `full`: its part of every weight,
    gradient and moment, and whole layers only while they compute (FSDP2), for models that do not fit on one device. It
    changes memory and speed, never the result."""
    gradient_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again for the gradient: less memory, about a third slower."""
    evaluate_every: Positive = 20
    """Steps between evaluations on the validation rows. The weights with the lowest held-out loss are the result."""
    evaluate_rows: Positive = 64
    """Most validation rows used for it."""
    early_stopping: Positive | None = None
    """End the stage after so many evaluations in a row without a lower held-out loss; by default never."""
    checkpoint_every: Positive = 20
    """Steps between checkpoints; an interrupted run also leaves one."""
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"`epochs` = {self.epochs:g} and `steps` = {self.steps} cannot both be given: remove one")
        return self

    @model_validator(mode="after")
    def _what_fits_together(self) -> Self:
        if self.method == "full" and self.quantization != "none":
            raise ValueError(
                f'`method` = "full" trains the weights themselves, and `quantization` = "{self.quantization}" freezes them: '
                "remove one"
            )
        if self.method == "full" and self.lora != Lora():
            raise ValueError('`method` = "full" has no adapter: remove `lora`')
        if self.sharding == "full" and self.quantization != "none":
            raise ValueError(
                f'`sharding` = "full" cuts weights into parts, and `quantization` = "{self.quantization}" packs them: '
                "remove one"
            )
        if self.sharding == "full" and self.optimizer.kind != "adamw":
            raise ValueError(
                f'`sharding` = "full" cuts moments into parts, and `optimizer.kind` = "{self.optimizer.kind}" packs them: '
                'use "adamw"'
            )
        if self.quantization == "none" and self.merge != "dequantised":
            raise ValueError(f'`merge` = "{self.merge}" chooses between quantised and full weights: set `quantization`')
        if self.quantization != "int8" and self.int8_threshold != 6.0:
            raise ValueError(f'`int8_threshold` = {self.int8_threshold:g} says nothing without `quantization` = "int8"')
        return self


class Generate(_Section):
    """How answers are drawn for evaluation."""

    max_tokens: Positive = 256
    """Most new tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that reach this probability together."""


class Evaluate(_Section):
    """Comparison of the base with the tuned model on test rows."""

    engine: Literal["auto", "transformers", "openvino"] = "auto"
    """What computes answers and log-probabilities. `auto`: openvino on a CPU where it is installed (the extra `openvino`;
    several times faster), else transformers."""
    loss_rows: Positive = 200
    """Most test rows for the held-out loss."""
    answer_rows: Positive = 50
    """Most test rows for which answers are generated and scored (ROUGE, BLEU)."""
    generate: Generate = Generate()


class Export(_Section):
    """Other forms of the merged model, each with a contract that proves it. `corral export` adds more."""

    gguf: tuple[GgufType, ...] = ()
    """Types of GGUF files, for llama.cpp and Ollama."""
    openvino: tuple[OpenVinoType, ...] = ()
    """Types of OpenVINO folders, for fast answers on a CPU."""

    @field_validator("gguf", "openvino")
    @classmethod
    def _once(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(types))


class Recipe(_Section):
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


_UNION_MEMBER = re.compile(r"(tuple|literal|list|dict)\[|constrained-|(int|float|str|bool)$")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a TOML file. Relative paths in it are made absolute, against its folder.
        overrides: `key=value` strings, e.g. `train.0.optimizer.lr=1e-4`; a value is TOML, or else a bare string.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or does not make a recipe; all faults are listed.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {str(path)!r}",
            where=str(path.resolve()),
            hint="`corral init` writes one to start from",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=str(path), hint="give a TOML file") from None
    return parse(text, where=str(path), base=path.parent, overrides=overrides)


def parse(text: str, *, where: str, base: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Validate the text of a recipe; `where` names it in errors, `base` resolves relative paths. Raises: RecipeError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=where, hint="mend the line named above") from None
    for override in overrides:
        _override(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults = _faults(error.errors(), text)
        raise RecipeError(
            "\n".join(faults), where=where, hint="`docs/recipe.md` lists every setting with its type and meaning"
        ) from None
    return recipe if base is None else _absolute(recipe, base)


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    def resolve(spec: str, is_path: bool) -> str:
        return str((base / Path(spec).expanduser()).resolve()) if is_path else spec

    def is_file(spec: str) -> bool:
        return not spec.startswith(("asset:", "hub:", "s3://")) and not Path(spec).is_absolute()

    model = recipe.model
    sources = tuple(
        s.model_copy(update={"path": resolve(s.path, is_file(s.path)), "name": s.label}) for s in recipe.data.sources
    )
    return recipe.model_copy(
        update={
            "model": model.model_copy(
                update={
                    # What is no path here may be a hub id without its prefix: the loader's error then says so.
                    "base": resolve(
                        model.base, is_file(model.base) and (base / Path(model.base).expanduser()).exists()
                    ),
                    "template": resolve(model.template, is_file(model.template) and model.template.endswith(".jinja")),
                }
            ),
            "data": recipe.data.model_copy(update={"sources": sources}),
        }
    )


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, value_text = override.partition("=")
    where = f"--set {override}"
    if not separator or not key.strip():
        raise RecipeError(f"{override!r} is not `key=value`", where=where, hint="e.g. --set train.0.steps=20")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text.strip()
    *parents, last = key.strip().split(".")
    node: Any = raw
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(
            f"{key.strip()!r} names no setting of this recipe",
            where=where,
            hint="name an entry of a list by its number, from 0: train.0.steps, data.sources.1.rows",
        ) from None


def _faults(errors: Sequence[Any], text: str) -> list[str]:
    """A sentence for each fault, without those that only follow from one within them."""
    places = [_place(error) for error in errors]
    own = [
        error
        for error, place in zip(errors, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]
    found: dict[tuple[str | int, ...], list[str]] = {}
    for error in own:
        found.setdefault(_place(error), []).append(_explain(error, text))
    # What may be of several kinds has a fault for each of them.
    return [first + "".join(f"; or {other.partition(': ')[2]}" for other in rest) for first, *rest in found.values()]


def _place(error: Any) -> tuple[str | int, ...]:
    """Where a fault is, without the names that pydantic gives to the members of a union."""
    return tuple(part for part in error["loc"] if isinstance(part, int) or not _UNION_MEMBER.match(part))


def _explain(error: Any, text: str) -> str:
    """One fault as a sentence that names the key's path, the value and, where it can be found, the line."""
    loc = _place(error)
    path = ".".join(str(part) for part in loc) or "the recipe"
    line = _line_of(loc, text)
    at = f"{path} (line {line})" if line else path
    if error["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        guess = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
        return f"{at}: unknown key; {guess}"
    if error["type"] == "missing":
        return f"{at}: missing; it has no default"
    if error["type"] == "value_error":
        return f"{at}: {error['ctx']['error']}"
    given = error["input"]
    if error["type"] == "tuple_type":
        return f"{at}: a list is needed here, in brackets: {[given]!r}".replace("'", '"')
    shown = "" if isinstance(given, dict | list | tuple) else f" (given: {given!r})"
    return f"{at}: {error['msg']}{shown}"


def _line_of(loc: tuple[str | int, ...], text: str) -> int | None:
    """The line of a key, if exactly one line in the text can be it."""
    if not loc or not isinstance(loc[-1], str):
        return None
    pattern = re.compile(rf"^\s*(\[\[?[\w.]*\b)?{re.escape(loc[-1])}\s*(=|\])")
    hits = [i for i, line in enumerate(text.splitlines(), start=1) if pattern.match(line)]
    return hits[0] if len(hits) == 1 else None


def _keys_at(loc: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if isinstance(part, str) and section is not None:
            section = section_type(section.model_fields[part].annotation) if part in section.model_fields else None
    return list(section.model_fields) if section is not None else []


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type holds, perhaps in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        if (found := section_type(arg)) is not None:
            return found
    return None
