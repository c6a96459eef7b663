"""The first rows of a source → the name of their format, and why, in words.

Decided from the columns and the kinds of their values; what could be two things is refused. Which columns are used is not
claimed but seen: the format reads the rows, and what it looks at is noted. This module does not know what the formats make
of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from corral.data.formats.chat_messages import (
    COLUMNS_IF_ALONE,
    OPENAI,
    SHAREGPT,
    all_objects,
    openai_messages,
    parse_json_list,
    sharegpt,
    uses_tools,
)
from corral.data.formats.fields import Format, FormatError, describe_type, short_repr
from corral.data.formats.multiple_choice import ANSWER_COLUMNS, CHOICES_COLUMNS, FIRST_OPTION_COLUMNS, multiple_choice
from corral.data.formats.preferences import (
    CHOSEN_COLUMNS,
    FEEDBACK_PROMPT_COLUMNS,
    PREFERENCE_PROMPT_COLUMNS,
    REJECTED_COLUMNS,
    SCORE_COLUMNS,
    feedback,
    preference,
)
from corral.data.formats.prompt_response import (
    COMPLETION_COLUMNS,
    PROMPT_COLUMNS,
    TEXT_COLUMNS,
    alpaca,
    plain_text,
    prompt_completion,
    question_answer,
)
from corral.data.formats.public_datasets import PUBLIC_DATASETS, PublicDataset
from corral.data.formats.scores import is_judgement
from corral.errors import DataError

Test: TypeAlias = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list, or of its JSON, that holds nothing else."""
    items = parse_json_list(value)
    return cast("list[dict[str, Any]]", items) if isinstance(items, list) and all_objects(cast("Any", items)) else []


def _is_openai(value: Any) -> bool:
    items = _objects(value)
    return bool(items) and all(
        "role" in item
        and (
            uses_tools(item, item["role"]) or ("content" in item and str(item["role"]).strip().lower() in OPENAI.roles)
        )
        for item in items
    )


def _is_turns(value: Any) -> bool:
    items = _objects(value)
    return bool(items) and all(
        any(key in item for key in SHAREGPT.author_keys) and any(key in item for key in SHAREGPT.content_keys)
        for item in items
    )


def _is_sharegpt(value: Any) -> bool:
    return _is_turns(value) and not _is_openai(value)


def _is_said(value: Any) -> bool:
    return isinstance(value, str) or _is_turns(value)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | dict) or _is_turns(value)


def _is_choices(value: Any) -> bool:
    return isinstance(value, list | dict)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A column that a format needs, by any of its names; what it holds, as a test and in words."""

    names: tuple[str, ...]
    holds: Test
    words: str = ""


@dataclass(frozen=True, slots=True)
class _Shape:
    """A format and the columns it is known by.

    Args:
        name: the format.
        read: what reads its rows.
        needs: columns it must have.
        may: columns that, where they hold something, must fit too.
    """

    name: str
    read: Format
    needs: tuple[_Slot, ...]
    may: tuple[_Slot, ...] = ()

    def columns_in(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The row's columns that the format would use, or None if the row does not have the form."""
        used: list[str] = []
        for slot in self.needs:
            name = next((n for n in slot.names if slot.holds(row.get(n))), None)
            if name is None:
                return None
            used.append(name)
        for slot in self.may:
            for name in slot.names:
                if row.get(name) is not None:
                    if not slot.holds(row[name]):
                        return None
                    used.append(name)
        return tuple(dict.fromkeys(used))


_FROM_VALUE = "with `from` and `value`, in one of their spellings"
_CONVERSATIONS = tuple(name for name in OPENAI.columns if name not in COLUMNS_IF_ALONE)
_QUESTION = _Slot(("question",), _is_text)
_SHAPES = (
    _Shape("messages", openai_messages, (_Slot(_CONVERSATIONS, _is_openai, "with `role` and `content`"),)),
    _Shape("sharegpt", sharegpt, (_Slot(_CONVERSATIONS, _is_sharegpt, _FROM_VALUE),)),
    _Shape(
        "alpaca",
        alpaca,
        (_Slot(("instruction",), _is_text), _Slot(("output",), _is_text)),
        (_Slot(("input",), _is_text),),
    ),
    _Shape(
        "prompt-completion", prompt_completion, (_Slot(PROMPT_COLUMNS, _is_said), _Slot(COMPLETION_COLUMNS, _is_answer))
    ),
    _Shape(
        "question-answer",
        question_answer,
        (_QUESTION, _Slot(("answer",), _is_text)),
        (_Slot(("context",), _is_text),),
    ),
    _Shape(
        "preference",
        preference,
        (_Slot(CHOSEN_COLUMNS, _is_answer), _Slot(REJECTED_COLUMNS, _is_answer)),
        (_Slot(PREFERENCE_PROMPT_COLUMNS, _is_said),),
    ),
    _Shape(
        "feedback",
        feedback,
        (
            _Slot(FEEDBACK_PROMPT_COLUMNS, _is_said),
            _Slot(COMPLETION_COLUMNS, _is_answer),
            _Slot(SCORE_COLUMNS, is_judgement),
        ),
    ),
    _Shape(
        "multiple-choice",
        multiple_choice,
        (_QUESTION, _Slot(CHOICES_COLUMNS, _is_choices), _Slot(ANSWER_COLUMNS, _is_scalar)),
    ),
    *(
        _Shape(
            "multiple-choice",
            multiple_choice,
            (
                _QUESTION,
                _Slot((first,), _is_text),
                _Slot((f"{first[:-1]}{chr(ord(first[-1]) + 1)}",), _is_text),
                _Slot(ANSWER_COLUMNS, _is_scalar),
            ),
        )
        for first in FIRST_OPTION_COLUMNS
    ),
)
# Names that mean other things where there is more to a row.
_LAST = (
    _Shape("messages", openai_messages, (_Slot(COLUMNS_IF_ALONE, _is_openai, "with `role` and `content`"),)),
    _Shape("sharegpt", sharegpt, (_Slot(COLUMNS_IF_ALONE, _is_sharegpt, _FROM_VALUE),)),
)
# Many data sets keep the rendered row in `text` beside its parts, so it counts only where there are no such parts.
_PLAIN = _Shape("text", plain_text, (_Slot(TEXT_COLUMNS, _is_text),))
_PARTS = {
    name
    for shape in _SHAPES
    for slot in shape.needs
    if slot.names not in (SCORE_COLUMNS, ANSWER_COLUMNS)
    for name in slot.names
}


@dataclass(frozen=True, slots=True)
class RecognisedFormat:
    """The format of some rows, and a sentence that says how it is known."""

    name: str
    why: str


def recognise(rows: Sequence[Mapping[str, Any]], where: str = "data.sources") -> RecognisedFormat:
    """The format that at least half of the rows have.

    Args:
        rows: the first rows of a source.
        where: the source, for errors.

    Raises:
        DataError: there is none, or there are two that use different columns.
    """
    if not rows:
        raise DataError("there is no row to tell the format from", where=where, hint="name it with `format`")
    fitting = _fitting(_SHAPES, rows) or (_fitting(_LAST, rows) if _PARTS.isdisjoint(_names(rows)) else [])
    names = list(dict.fromkeys(shape.name for shape, _ in fitting))
    if len(names) == 1:
        _check_unjudged(names[0], rows, where)
        return _stated(*fitting[0], rows)
    if len(names) > 1:
        found = "; or ".join(f"{shape.name}, by {_quoted(columns)}" for shape, columns in fitting)
        raise DataError(
            f"the rows could be of two formats: {found}", where=where, hint=f'name one: format = "{names[0]}"'
        )
    if named := _named(rows):
        return named
    plain = _columns_used(_PLAIN, rows)
    if plain and _PARTS.isdisjoint(_names(rows)):
        return _stated(_PLAIN, plain, rows)
    raise _unknown(rows, where, plain)


def _fitting(shapes: Sequence[_Shape], rows: Sequence[Mapping[str, Any]]) -> list[tuple[_Shape, tuple[str, ...]]]:
    """The formats that the rows have, with the columns that show it; not those that see a part of what another sees."""
    found = [(shape, columns) for shape in shapes if (columns := _columns_used(shape, rows))]
    return [(shape, columns) for shape, columns in found if not any(set(columns) < set(more) for _, more in found)]


def _check_unjudged(name: str, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises: DataError (answers have a judgement that cannot be read: bad ones would be trained like good ones)."""
    if name not in ("prompt-completion", "alpaca"):
        return
    for row in rows:
        for column in SCORE_COLUMNS:
            if row.get(column) is not None and not is_judgement(row[column]):
                raise DataError(
                    f"`{column}` may say how good an answer is, but {short_repr(row[column])} is not a known judgement",
                    where=where,
                    hint="write true or false, or a number; or train on every answer, whatever it says: "
                    f'format = "{name}"',
                )


def _named(rows: Sequence[Mapping[str, Any]]) -> RecognisedFormat | None:
    """The public data set whose columns all rows have."""
    for name, entry in sorted(PUBLIC_DATASETS.items(), key=lambda item: -len(item[1].columns)):
        # One or two columns of a name could be anything.
        there = len(entry.columns) > 2 and all(set(entry.columns) <= set(row) for row in rows)
        if there and 2 * sum(_reads(entry, row) for row in rows) >= len(rows):
            return RecognisedFormat(name, f"format: {name}, as the rows have its columns {_quoted(entry.columns)}")
    return None


def _reads(entry: PublicDataset, row: Mapping[str, Any]) -> bool:
    try:
        entry(row)
    except FormatError:
        return False
    return True


def _columns_used(shape: _Shape, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The columns a format would use in most of the rows that have its form, if at least half of the rows have it."""
    used = [columns for row in rows if (columns := shape.columns_in(row)) is not None]
    # An optional column is used if any row has something in it.
    return tuple(dict.fromkeys(name for columns in used for name in columns)) if 2 * len(used) >= len(rows) else None


class _Noted(dict[str, Any]):
    """A row that notes which of its columns are looked at."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        return self._noted(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._noted(name, super().get(name, default))

    def _noted(self, name: str, value: Any) -> Any:
        if value is not None:
            self.seen.add(name)
        return value


def _columns_read(shape: _Shape, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns that a format looks at in these rows."""
    seen: set[str] = set()
    for row in rows:
        noted = _Noted(row)
        try:
            shape.read(noted)
        except FormatError:
            continue  # It may have looked for what another row has.
        seen |= noted.seen
    return seen


def _stated(shape: _Shape, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> RecognisedFormat:
    seen = _columns_read(shape, rows)
    read = [name for name in dict.fromkeys((*columns, *_names(rows))) if name in seen] or list(columns)
    words = next((slot.words for slot in shape.needs if slot.words), "")
    # What is said in words is said of the first column.
    shown = f"{_quoted(read[:1])} {words}{', and ' if read[1:] else ''}{_quoted(read[1:])}" if words else _quoted(read)
    why = f"format: {shape.name}, as the rows have {shown}"
    unused = [name for name in _names(rows) if name not in read]
    if unused:
        why += f"; not used: {_quoted(unused)}"
    return RecognisedFormat(shape.name, why)


def _unknown(rows: Sequence[Mapping[str, Any]], where: str, plain: Sequence[str] | None) -> DataError:
    names = _names(rows)
    close = _close(rows)
    near = f"close: {'; '.join(close)}. " if close else ""
    near += f'format = "text" would train {_quoted(plain)} as it is. ' if plain else ""
    texts = [name for name in names if any(_is_text(row.get(name)) and row[name].strip() for row in rows)]
    usable = [name for name in texts if name.isprintable() and not set(name) & set("{}[]\"'")]
    mapped = f'mapping = {{ prompt = "{{{usable[0]}}}", completion = "{{{usable[-1]}}}" }}' if len(usable) > 1 else ""
    way = f"Name a format, or say what becomes of the columns: {mapped}" if mapped else "Name a format"
    if len(usable) == 1 and not plain:
        way += f"; to train {_quoted(usable)} as a document, call it `text`"
    return DataError(
        f"the rows are of no known format: their columns are {_quoted(names) or 'none'}",
        where=where,
        hint=f"{near}{way}",
    )


def _close(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The formats that lack least, and what they lack; at most three."""
    found: list[tuple[int, str]] = []
    for shape in _SHAPES:
        lacks = [_lack(slot, rows) for slot in (*shape.needs, *shape.may)]
        lacks = [lack for lack in lacks[: len(shape.needs)] if lack] + [
            lack for lack in lacks[len(shape.needs) :] if lack and not lack.startswith("needs")
        ]
        present = sum(any(name in row for name in slot.names for row in rows) for slot in shape.needs)
        if present:
            found.append((len(lacks) - present, f"{shape.name} ({', '.join(lacks) or 'most rows have another form'})"))
    return [words for _, words in sorted(found, key=lambda item: item[0])[:3]]


def _lack(slot: _Slot, rows: Sequence[Mapping[str, Any]]) -> str | None:
    there = [name for name in slot.names if any(row.get(name) is not None for row in rows)]
    if not there:
        return f"needs `{slot.names[0]}`"
    values = [row[there[0]] for row in rows if row.get(there[0]) is not None]
    wrong = next((value for value in values if not slot.holds(value)), None)
    return (
        None
        if wrong is None
        else f"`{there[0]}` is {describe_type(wrong)}{f', not {slot.words}' if slot.words else ''}"
    )


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(name) for name in dict.fromkeys(name for row in rows for name in row)]


def _quoted(names: Sequence[str]) -> str:
    # A name may hold anything; escaped, it can be printed anywhere.
    escaped = [name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name for name in names]
    shown = [f"`{name if len(name) <= 40 else f'{name[:39]}…'}`" for name in escaped]
    return ", ".join(shown[:20]) + (" …" if len(shown) > 20 else "")
