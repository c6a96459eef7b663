"""`[model]` and `[data]`: the model to start from, and the rows it learns from."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from corral.recipe.section import Fraction, PathText, PositiveInt, Section, Seed
from corral.template.rendering import RESERVED_VARIABLES


class Model(Section):
    """The model to start from."""

    base: PathText
    """`asset:NAME` (a model in a Python package), `hub:OWNER/NAME[@REVISION]`, a folder, or a `.gguf` file. A folder may also
    hold Llama 2 or 3 as Meta publishes it (`params.json`, `consolidated.*.pth`, `tokenizer.model`); it is converted once."""
    adapter: PathText | None = None
    """A LoRA adapter of `base` (a folder that PEFT or corral wrote) that the first `[[train]]` trains further, in place of a
    fresh one. It is not merged into `base`, which stays frozen; its rank, its layers and its kind stay as they are, so that
    stage has no `[train.lora]`. Its own tokenizer and template, if its folder holds them, come before those of `base`. The
    optimizer starts anew. In evaluation, `base` is the model without it."""
    template: PathText = "tokenizer"
    """Chat template: `tokenizer` (the model's own), `tokenizer:NAME` (one of several that it has), one that ships with corral
    (`alpaca`, `chatml`, `hermes`, `instruction`, `llama-2`, `llama-3`, `llama-3.1`, `llama-4`, `question`, `smollm2`, `tulu`,
    `vicuna`, `zephyr`), or a `.jinja` file."""
    template_variables: dict[str, bool | int | float | str] | None = None
    """Values of further variables that the template reads, such as `{ enable_thinking = false }`, in training, evaluation and
    serving. The template that is saved with the model has them as defaults."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and computation. `auto`: bfloat16 on a GPU that computes in it, float16 on an
    older GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. `auto`: the first GPU, else the CPU."""

    @field_validator("template_variables")
    @classmethod
    def _check_variable_names(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        reserved = sorted(RESERVED_VARIABLES & (variables or {}).keys())
        if reserved:
            raise ValueError(f"{reserved[0]!r} is given to every template by corral itself: remove it")
        return variables


class Mapping(Section):
    """How to read rows with other columns. A value is a text with column names in braces: `"{title}\\n{body}"`. The keys given
    decide what a row becomes: `prompt` and `completion` make a conversation; `prompt`, `chosen` and `rejected` a preference;
    `prompt`, `completion` and `score` feedback; `messages` a conversation from a list of messages. A null counts as empty
    text; a row is not used if one of its texts is blank, or all that a text takes from the row is."""

    system: str | None = None
    """A system message."""
    prompt: str | None = None
    """The user's message."""
    completion: str | None = None
    """The assistant's answer."""
    chosen: str | None = None
    """The better answer."""
    rejected: str | None = None
    """The worse answer."""
    score: str | None = None
    """Name of the column with the completion's score."""
    score_range: tuple[float, float] | None = None
    """Lowest and highest possible score. By default scores are 0 to 1, or -1 and 1; other scores are refused unless this is
    given. It may be the only key, for rows that are recognised as feedback."""
    messages: str | None = None
    """Name of the column with a list of messages, or with its JSON text; instead of `prompt` and `completion`."""
    role: str | None = None
    """With `messages`: the key for a message's author; by default `from`, `role`, `speaker` or `author`."""
    content: str | None = None
    """With `messages`: the key for a message's text; by default `value`, `content` or `text`."""
    roles: dict[str, Literal["system", "user", "assistant"]] | None = None
    """With `messages`: the roles of authors with unusual names: `{ caller = "user", desk = "assistant" }`."""


class Source(Section):
    """One source of rows."""

    READ_BY: ClassVar = ("config", "split", "data_dir", "data_files", "encoding", "delimiter")
    """Settings that decide, with the path, which raw rows are read."""

    path: PathText
    """`asset:NAME`, `hub:OWNER/NAME[@REVISION]`, `s3://BUCKET/KEY`, or a file, folder or glob of `.jsonl`, `.json`, `.csv`,
    `.tsv`, `.parquet`, `.arrow` or `.txt` files, which may be compressed (`.gz`, `.zst`). A relative path is relative to the
    recipe. A `.jsonl` file has one object per line, a `.json` file a list of objects, a `.txt` file one document. `.csv` and
    `.tsv` files start with a line of column names, and all their values are text. A folder is read with its subfolders, in
    alphabetical order; of a data set that was cloned from a hub or saved by `datasets`, the train split."""
    config: str | None = None
    """Configuration (subset) of a data set on the hub."""
    split: str = "train"
    """Split of a data set on the hub."""
    data_dir: str | None = None
    """Folder within a data set on the hub, whose files alone are read."""
    data_files: str | tuple[str, ...] | None = None
    """Files of a data set on the hub, by name or glob, that alone are read, as its train split."""
    encoding: str | None = None
    """Encoding of text files, by the name of Python's codec: `cp1252`, `shift_jis` … By default UTF-8. The byte order mark of
    a file, of UTF-8, UTF-16 or UTF-32, comes before both."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character between the cells of `.csv` and `.tsv` files. By default the only one of comma, semicolon, tab and bar that
    stands in the header."""
    format: str = "auto"
    """Name of the rows' format; `auto` recognises it from the columns and reports which one it is."""
    mapping: Mapping | None = None
    name: str | None = None
    """Name of the source in the ledger and in `train.sources`; by default its path."""
    side: Literal["train", "validation", "test"] | None = None
    """The side that all rows of this source are on, as they are: a test file of your own. Copies within it stay; rows of other
    sources that equal one of its held-out rows, or are about the prompt of one, are left out. By default rows are split by
    `[data.split]`."""
    rows: PositiveInt | None = None
    """Use at most this many rows; by default all. They are chosen by a seeded hash of their content, so a smaller number
    selects a subset of a larger one."""
    repeat: PositiveInt = 1
    """How often this source's training rows are used in each epoch."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """This source's share of the training examples, relative to other sources' weights: 3 and 1 mean three quarters and one
    quarter. Give every source a weight, or none. The mixture is as large as possible: the source that runs out first gives
    all its training rows, `repeat` times each; of the others the rows with the lowest hash are taken, so a smaller share is a
    subset of a larger one, and the rest is `not sampled`. Held-out rows are not weighted."""

    @model_validator(mode="after")
    def _check_one_format(self) -> Self:
        if self.mapping is not None and self.format != "auto":
            raise ValueError(f"`format` = {self.format!r} and a `mapping` cannot both be given: remove one")
        return self

    @model_validator(mode="after")
    def _check_training_settings(self) -> Self:
        for name, given in (("repeat", self.repeat != 1), ("weight", self.weight is not None)):
            if given and self.is_held_out:
                raise ValueError(
                    f'`{name}` is for rows to train on, and `side` = "{self.side}" holds them out: remove one'
                )
        return self

    @model_validator(mode="after")
    def _check_hub_settings(self) -> Self:
        if self.path.startswith("hub:"):
            return self
        if self.config is not None or self.split != "train":
            raise ValueError(
                f"`config` and `split` choose from a data set on the hub, which {self.path!r} is not: remove them"
            )
        if self.data_dir is not None or self.data_files is not None:
            raise ValueError(
                f"`data_dir` and `data_files` choose from a data set on the hub, which {self.path!r} is not: name the "
                "subfolder or a glob in `path` instead"
            )
        return self

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        try:
            b"ab".decode(encoding or "utf-8", "backslashreplace")
        except (LookupError, UnicodeError):
            raise ValueError(
                f"Python decodes no files in {encoding!r}; write it as in `cp1252` or `utf-16-le`"
            ) from None
        return encoding

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and delimiter in '"\r\n':
            raise ValueError("a quote or a line's end cannot stand between cells")
        return delimiter

    @property
    def label(self) -> str:
        """The source's name in the ledger."""
        return self.name or self.path

    @property
    def is_held_out(self) -> bool:
        """Whether its `side` keeps it out of training."""
        return self.side in ("validation", "test")


class Split(Section):
    """Which rows are held out: the same share of each source, exact to the row (largest remainders). Rows are ordered by hash
    (of content and seed): the lowest are the test side, the highest the validation side. A larger side therefore contains the
    smaller one, and the order of rows in files does not matter. If rows are added or removed, or a limit or filter changes,
    rows at the borders may change sides: compare runs on the same data and seed. Rows of equal content are always on the same
    side, even if that makes it too large."""

    validation: Fraction | PositiveInt | None = None
    """Share (below 1) or number of rows for evaluation during training; by default 0.05, or 0 if a source has
    `side = "validation"`."""
    test: Fraction | PositiveInt | None = None
    """Share (below 1) or number of rows for `[evaluate]`, never used in training; by default 0.05, or 0 if a source has
    `side = "test"`."""
    seed: Seed | None = None
    """Seed of the split; by default the recipe's."""

    @model_validator(mode="after")
    def _check_rows_left(self) -> Self:
        validation, test = self.validation or 0, self.test or 0
        if validation < 1 and test < 1 and validation + test >= 1:
            raise ValueError(f"validation + test is {validation + test:g}: nothing is left to train on")
        return self


class Data(Section):
    """The rows to train on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """One `[[data.sources]]` table for each source."""
    max_length: Annotated[int, Field(ge=16)] = 1024
    """Most tokens of one example."""
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What to do with longer rows. `split` cuts a conversation at the ends of answers into several examples, each with the
    system message; an exchange that is too long by itself is left out, and so are single questions with their answers and
    preferences. `truncate` keeps the beginning, to the end of an answer if one fits, else with the answer cut off. `drop`
    leaves the row out. Documents become windows in any case. The ledger counts them."""
    turns: Literal["mend", "strict"] = "mend"
    """What to do with conversations whose turns are out of order. `mend` leaves out answers before the first question and
    questions after the last answer, and joins consecutive turns of one side with a blank line; the ledger counts such rows as
    `trimmed`. `strict` leaves such conversations out."""
    train_on: Literal["answers", "last_answer"] = "answers"
    """Which answers of a conversation are trained: all, or the last one only. An answer that its row marks as not to be
    trained (`weight` 0, `train` or `loss` false) never is."""
    duplicates: Literal["exact", "near", "keep"] = "exact"
    """Which duplicate rows are left out: `exact`: rows of equal content; `near`: also rows with almost the same words (MinHash
    of 5-word shingles); `keep`: none."""
    contamination: Literal["report", "drop", "ignore"] = "report"
    """What to do with training rows that share long passages with held-out rows."""
    max_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    """Stop before training if more than this share of the requested rows is lost (dropped, cut, masked): 0.02 or "2%"."""
    system: str | None = None
    """System message of conversations that have none: in training, evaluation, chat, batch and the server, and in the template
    that is saved with the model and its exported forms."""
    system_override: str | None = None
    """The same, and it also replaces the system messages of all rows; instead of `system`."""
    seed: Seed | None = None
    """Seed of the choice of rows and questions (`rows`, `weight`, `evaluate.tasks`); by default the recipe's."""
    split: Split = Split()

    @field_validator("system", "system_override")
    @classmethod
    def _check_text(cls, system: str | None) -> str | None:
        if system is not None and not system.strip():
            raise ValueError("the system message is blank: write one, or remove the setting")
        return system

    @model_validator(mode="after")
    def _check_one_system(self) -> Self:
        if self.system is not None and self.system_override is not None:
            raise ValueError("`system` and `system_override` cannot both be given: remove one")
        return self

    @model_validator(mode="after")
    def _check_sides(self) -> Self:
        if not self.training_sources:
            raise ValueError("every source is held out by its `side`: nothing is left to train on")
        return self

    @property
    def training_sources(self) -> tuple[Source, ...]:
        """The sources that are not held out."""
        return tuple(source for source in self.sources if not source.is_held_out)

    @property
    def system_prompt(self) -> str | None:
        """The system message of conversations that have none."""
        return self.system or self.system_override

    def held_out(self, side: Literal["validation", "test"]) -> float:
        """Share (below 1) or number of the rows of sources without a side that are put on this one."""
        given = self.split.validation if side == "validation" else self.split.test
        default = 0.0 if any(source.side == side for source in self.sources) else 0.05
        return default if given is None else given

    def has_side(self, side: Literal["validation", "test"]) -> bool:
        """Whether any row is to be on this side."""
        return self.held_out(side) > 0 or any(source.side == side for source in self.sources)

    @field_validator("max_loss", mode="before")
    @classmethod
    def _parse_percentage(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                raise ValueError(f"{value!r} is not a percentage") from None
        return value

    @field_validator("sources")
    @classmethod
    def _check_labels_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        labels = [s.label for s in sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources are called {label!r}: give one of them another `name`")
        return sources

    @field_validator("sources")
    @classmethod
    def _check_weights(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        mixed = [s for s in sources if not s.is_held_out]
        weighted, unweighted = ([s.label for s in mixed if (s.weight is None) is none] for none in (False, True))
        if weighted and unweighted:
            raise ValueError(
                f"{weighted[0]!r} has a `weight` and {unweighted[0]!r} has none: give every source one, or remove it"
            )
        return sources
