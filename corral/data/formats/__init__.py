"""A raw row → a record: a function for each format a recipe can name, in `FORMATS`; `choose` finds the one for a source.

A function gives a record or raises FormatError with a reason that a person understands; the reason goes into the ledger,
so it names the fault and not the row. Formats and what `choose` gives can be pickled. This package does not know where rows
come from or how they become tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from corral.data.formats.chat_messages import openai_messages, sharegpt
from corral.data.formats.column_mapping import compile_mapping, has_only_score_range, stated_scale
from corral.data.formats.fields import ContradictionError, Format, FormatError
from corral.data.formats.multiple_choice import infer_numbering, multiple_choice
from corral.data.formats.preferences import feedback, infer_feedback_scale, preference
from corral.data.formats.prompt_response import alpaca, plain_text, prompt_completion, question_answer
from corral.data.formats.public_datasets import PUBLIC_DATASETS, find_by_hub_path
from corral.data.formats.recognition import RecognisedFormat, recognise
from corral.errors import DataError
from corral.recipe import Source

__all__ = [
    "FORMATS",
    "ChosenFormat",
    "ContradictionError",
    "Format",
    "FormatError",
    "RecognisedFormat",
    "choose_format",
    "recognise",
]

FORMATS: dict[str, Format] = {
    "messages": openai_messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "question-answer": question_answer,
    "text": plain_text,
    "preference": preference,
    "feedback": feedback,
    "multiple-choice": multiple_choice,
    **{name: entry.read for name, entry in PUBLIC_DATASETS.items()},
}


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """How a source's rows are read.

    Args:
        name: the format, or `mapping`.
        to_record: a row → a record, or FormatError.
        why: a sentence for the user: the format, and how it is known.
    """

    name: str
    to_record: Format
    why: str


def choose_format(source: Source, rows: Sequence[Mapping[str, Any]]) -> ChosenFormat:
    """The format of a source: its mapping, the format it names, the data set it is, or what its rows look like.

    What a row alone does not say (the scale of scores, from where options are counted) is decided here, for all rows.

    Args:
        source: the recipe's section.
        rows: its first rows that could be read.

    Raises:
        DataError: the name, the mapping or the rows' columns make no format, or the rows do not say how they are meant.
    """
    if source.mapping is None or has_only_score_range(source.mapping):
        name, why = _named(source, rows)
        to_record, said = _settled(name, source, rows)
        return ChosenFormat(name, to_record, why + said)
    mapped, said = compile_mapping(source.mapping, rows, f"{source.label}: data.sources.mapping")
    columns = dict.fromkeys(f"`{path[0]}`" for path in mapped.paths)
    return ChosenFormat("mapping", mapped, f"format: a mapping of {', '.join(columns)} to {mapped.record_type}{said}")


def _named(source: Source, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(the name of the format, a sentence on how it is known). Raises: DataError."""
    if source.format != "auto":
        if source.format not in FORMATS:
            close = difflib.get_close_matches(source.format, FORMATS, n=1)
            guess = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"there is no format {source.format!r}",
                where=f"data.sources: {source.label}",
                hint=f"{guess}the formats are auto, {', '.join(FORMATS)}",
            )
        return source.format, f"format: {source.format}, as the recipe says"
    known = find_by_hub_path(source.path)
    if known is not None:
        return known, f"format: {known}, as this is the data set {source.path}"
    recognised = recognise(rows, where=source.label)
    return recognised.name, recognised.why


def _settled(name: str, source: Source, rows: Sequence[Mapping[str, Any]]) -> tuple[Format, str]:
    """(what reads the rows, what to say of how they are meant). Raises: DataError (the rows do not say it)."""
    read = FORMATS[name]
    stated = None if source.mapping is None else stated_scale(source.mapping)
    if stated is not None and read is not feedback:
        raise DataError(
            f"`score_range` is of feedback, and the rows are read as {name}",
            where=f"{source.label}: data.sources.mapping",
            hint="give prompt, completion and score in the mapping too",
        )
    if stated is not None:
        return partial(feedback, scale=stated), f"; scores from {stated.low:g} to {stated.high:g}, as the recipe says"
    if read is feedback:
        scale, said = infer_feedback_scale(rows, source.label)
        return partial(feedback, scale=scale), said
    if read is multiple_choice:
        counting, said = infer_numbering(rows, source.label)
        return partial(multiple_choice, numbering=counting), said
    return read, ""
