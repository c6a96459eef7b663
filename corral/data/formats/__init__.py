"""A raw row → a record: a function for each format a recipe can name, in `FORMATS`; `choose` finds the one for a source.

A function gives a record or raises FormatError with a reason that a person understands; the reason goes into the ledger,
so it names the fault and not the row. Formats and what `choose` gives can be pickled. This package does not know where rows
come from or how they become tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corral.data.formats.choices import multiple_choice
from corral.data.formats.fields import Format, FormatError
from corral.data.formats.judged import feedback, preference
from corral.data.formats.mapping import compile_mapping
from corral.data.formats.named import NAMED, on_hub
from corral.data.formats.plain import alpaca, plain_text, prompt_completion, question_answer
from corral.data.formats.recognise import Recognised, recognise
from corral.data.formats.turns import messages, sharegpt
from corral.errors import DataError
from corral.recipe import Source

__all__ = ["FORMATS", "Chosen", "Format", "FormatError", "Recognised", "choose", "recognise"]

FORMATS: dict[str, Format] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "question-answer": question_answer,
    "text": plain_text,
    "preference": preference,
    "feedback": feedback,
    "multiple-choice": multiple_choice,
    **{name: entry.read for name, entry in NAMED.items()},
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """How a source's rows are read.

    Args:
        name: the format, or `mapping`.
        to_record: a row → a record, or FormatError.
        why: a sentence for the user: the format, and how it is known.
    """

    name: str
    to_record: Format
    why: str


def choose(source: Source, rows: Sequence[Mapping[str, Any]]) -> Chosen:
    """The format of a source: its mapping, the format it names, the data set it is, or what its rows look like.

    Args:
        source: the recipe's section.
        rows: its first rows that could be read.

    Raises:
        DataError: the name, the mapping or the rows' columns make no format.
    """
    if source.mapping is not None:
        mapped = compile_mapping(source.mapping, rows, f"{source.label}: data.sources.mapping")
        columns = dict.fromkeys(f"`{path[0]}`" for pattern in mapped.patterns for path in pattern.paths)
        return Chosen("mapping", mapped, f"format: a mapping of {', '.join(columns)} to {mapped.makes}")
    if source.format != "auto":
        if source.format not in FORMATS:
            close = difflib.get_close_matches(source.format, FORMATS, n=1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"there is no format {source.format!r}",
                where=f"data.sources: {source.label}",
                hint=f"{guess}the formats are auto, {', '.join(FORMATS)}",
            )
        return Chosen(source.format, FORMATS[source.format], f"format: {source.format}, as the recipe says")
    known = on_hub(source.path)
    if known is not None:
        return Chosen(known, FORMATS[known], f"format: {known}, as this is the data set {source.path}")
    recognised = recognise(rows, where=source.label)
    return Chosen(recognised.name, FORMATS[recognised.name], recognised.why)
