"""Turns raw rows into records: `FORMATS` has a function for each format, `choose_format` finds the one for a source.

A function returns a record or raises FormatError with a reason for the ledger. Formats and ChosenFormat can be pickled.
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
from corral.data.formats.preferences import (
    chosen_answer,
    feedback,
    infer_feedback_scale,
    preference,
)
from corral.data.formats.prompt_response import (
    COMPLETION_COLUMNS,
    PROMPT_COLUMNS,
    alpaca,
    plain_text,
    prompt_completion,
    question_answer,
)
from corral.data.formats.public_datasets import PUBLIC_DATASETS, find_by_hub_path
from corral.data.formats.recognition import RecognisedFormat, recognise, respell_columns
from corral.data.formats.scores import CONVERSATION_SCORE_COLUMNS, SCORE_COLUMNS, is_judgement
from corral.errors import DataError
from corral.messages import Record
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

_GENERIC_FORMATS: dict[str, Format] = {
    "messages": openai_messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "question-answer": question_answer,
    "text": plain_text,
    "preference": preference,
    "chosen-answer": chosen_answer,
    "feedback": feedback,
    "multiple-choice": multiple_choice,
}
FORMATS: dict[str, Format] = _GENERIC_FORMATS | {name: entry.read for name, entry in PUBLIC_DATASETS.items()}


@dataclass(frozen=True, slots=True)
class ChosenFormat:
    """How a source's rows are read.

    Args:
        name: the format, or `mapping`.
        to_record: turns a row into a record, or raises FormatError.
        why: a sentence for the user: the format, and how it was chosen.
    """

    name: str
    to_record: Format
    why: str


def choose_format(source: Source, rows: Sequence[Mapping[str, Any]]) -> ChosenFormat:
    """Choose the format of a source by its mapping, its `format`, its data set or the columns of its rows.

    What one row alone does not show (the scale of scores, whether options count from 0 or 1) is inferred for the source.

    Args:
        source: the recipe's section.
        rows: its first readable rows.

    Raises DataError if the name or the mapping is invalid, the rows match no format, or their scale or numbering is
    ambiguous.
    """
    if source.mapping is None or has_only_score_range(source.mapping):
        return _choose_by_columns(source, rows)
    mapping, note = compile_mapping(source.mapping, rows, f"{source.label}: data.sources.mapping")
    columns = dict.fromkeys(f"`{path[0]}`" for path in mapping.paths)
    return ChosenFormat("mapping", mapping, f"format: a mapping of {', '.join(columns)} to {mapping.record_type}{note}")


def _choose_by_columns(source: Source, rows: Sequence[Mapping[str, Any]]) -> ChosenFormat:
    """The format of rows without a mapping of columns. Raises DataError."""
    known = respell_columns(rows)
    try:
        name, why = _name_format(source, rows)
    except DataError as error:
        try:
            name, why = _name_format(source, [_respell(row, known) for row in rows])
        except DataError:
            raise error from None  # it names the columns as they are written
    else:
        if name not in _GENERIC_FORMATS:
            known = {}
        elif known:  # a column in another spelling may be a part of the rows too
            name, why = _name_format(source, [_respell(row, known) for row in rows])
    rows = [_respell(row, known) for row in rows]
    to_record, note = _bind_reader(name, source, rows)
    if known:
        note += f"; read without regard to capitals and spaces: {', '.join(f'`{column}`' for column in known)}"
    unread = _distinct_alternatives(name, rows) if name in _ONE_ANSWER_FORMATS else ()
    judgements = _judgement_columns(name) if source.format == "auto" else ()
    if known or unread or judgements:
        to_record = partial(_read_row, read=to_record, known=known, unread=unread, judgements=judgements)
    return ChosenFormat(name, to_record, why + note)


def _respell(row: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    return {known.get(name, name): value for name, value in row.items()}


_ONE_ANSWER_FORMATS = ("alpaca", "prompt-completion", "question-answer", "feedback")
"""Formats that read the first of several columns as the prompt, and the first of others as the answer."""


def _distinct_alternatives(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Columns that could hold a prompt or an answer but stand beside another one that does: they hold something else, such as
    the answer of another model, and must not take its place where it is null."""
    preferred = {"question-answer": ("answer",), "alpaca": ("output",)}.get(name, ())
    unread: list[str] = []
    for names in (PROMPT_COLUMNS, dict.fromkeys((*preferred, *COMPLETION_COLUMNS))):
        present = [column for column in names if any(row.get(column) is not None for row in rows)]
        for column in present[1:]:
            # `input` is a part of a request, and refused or read with it.
            if column != "input" and any(
                row.get(column) is not None and row.get(present[0]) is not None for row in rows
            ):
                unread.append(column)
    return tuple(unread)


def _judgement_columns(name: str) -> tuple[str, ...]:
    """Columns that, if they judge an answer, say that it must not be trained as a good one."""
    if name in ("messages", "sharegpt"):
        return CONVERSATION_SCORE_COLUMNS
    return SCORE_COLUMNS if name in ("alpaca", "prompt-completion", "question-answer") else ()


def _read_row(
    row: Mapping[str, Any],
    read: Format,
    known: Mapping[str, str],
    unread: tuple[str, ...],
    judgements: tuple[str, ...],
) -> Record:
    if known:
        row = _respell(row, known)
    for column in judgements:
        if row.get(column) is not None and is_judgement(row[column]):
            raise FormatError(
                f"`{column}` judges the answer, and the rows are not read as feedback: name their `format`"
            )
    if unread and not row.keys().isdisjoint(unread):
        row = {name: value for name, value in row.items() if name not in unread}
    return read(row)


def _name_format(source: Source, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(the name of the format, a sentence on how it was chosen). Raises DataError."""
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


def _bind_reader(name: str, source: Source, rows: Sequence[Mapping[str, Any]]) -> tuple[Format, str]:
    """(the function that reads the rows, a note on their scale or numbering). Raises DataError if that is ambiguous."""
    read = FORMATS[name]
    stated = None if source.mapping is None else stated_scale(source.mapping)
    if stated is not None and read is not feedback:
        raise DataError(
            f"`score_range` applies to feedback, and the rows are read as {name}",
            where=f"{source.label}: data.sources.mapping",
            hint="give prompt, completion and score in the mapping too",
        )
    if stated is not None:
        return partial(feedback, scale=stated), f"; scores from {stated.low:g} to {stated.high:g}, as the recipe says"
    if read is feedback:
        scale, note = infer_feedback_scale(rows, source.label)
        return partial(feedback, scale=scale), note
    if read is multiple_choice:
        numbering, note = infer_numbering(rows, source.label)
        return partial(multiple_choice, numbering=numbering), note
    return read, ""
