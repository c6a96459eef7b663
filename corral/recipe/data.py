"""`[model]` and `[data]`: which model, and which rows it learns from. Knows nothing about how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from corral.recipe.section import Fraction, PositiveInt, Section


class Model(Section):
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


class Mapping(Section):
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


class Source(Section):
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
    rows: PositiveInt | None = None
    """Use at most this many rows, chosen by a seeded hash of their content, so that a smaller number is a part of a larger;
    by default all."""
    repeat: PositiveInt = 1
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


class Split(Section):
    """Which rows are held out: the same part of each source, exact to the row (largest remainders). Of each source the rows of
    lowest hash (of content and seed) are the test side, those of highest the validation side: if a side takes more of them, it
    holds those it held before, and their order does not matter. As sides are exact, rows at their borders may change sides
    when rows are added or removed, or a cap or filter changes; the others stay. Compare runs on the same data and seed. Rows
    of equal content are all on one side, even if that is then too large."""

    validation: Fraction | PositiveInt = 0.05
    """Share (below 1) or number of rows for evaluation while training."""
    test: Fraction | PositiveInt = 0.05
    """Share (below 1) or number of rows for `evaluate`; never seen in training."""

    @model_validator(mode="after")
    def _something_left(self) -> Self:
        if self.validation < 1 and self.test < 1 and self.validation + self.test >= 1:
            raise ValueError(f"validation + test is {self.validation + self.test:g}: nothing is left to train on")
        return self


class Data(Section):
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
