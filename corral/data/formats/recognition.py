"""Recognises the format of a source from the columns and value types of its first rows, and says why.

Ambiguous rows are refused. The columns reported as used are those that the format really reads: it is run on the rows, and
its accesses are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from corral.data.formats.chat_messages import (
    COLUMNS_IF_ALONE,
    OPENAI,
    SHAREGPT,
    SYSTEM_COLUMNS,
    all_objects,
    openai_messages,
    parse_json_list,
    sharegpt,
    unused_message_keys,
    uses_tools,
)
from corral.data.formats.context_columns import MEDIA_COLUMNS, REASONING_COLUMNS, TOOL_COLUMNS
from corral.data.formats.fields import Format, FormatError, column_names, describe_type, short_repr
from corral.data.formats.multiple_choice import ANSWER_COLUMNS, CHOICES_COLUMNS, FIRST_OPTION_COLUMNS, multiple_choice
from corral.data.formats.preferences import (
    CHOSEN_COLUMNS,
    FEEDBACK_PROMPT_COLUMNS,
    PREFERENCE_PROMPT_COLUMNS,
    REJECTED_COLUMNS,
    feedback,
    preference,
)
from corral.data.formats.prompt_response import (
    COMPLETION_COLUMNS,
    TEXT_COLUMNS,
    alpaca,
    plain_text,
    prompt_completion,
    question_answer,
)
from corral.data.formats.public_datasets import PUBLIC_DATASETS, PublicDataset
from corral.data.formats.scores import CONVERSATION_SCORE_COLUMNS, SCORE_COLUMNS, is_judgement
from corral.errors import DataError

ValueTest: TypeAlias = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _objects_of(value: Any) -> list[dict[str, Any]]:
    """The objects of a list, or of its JSON, if it holds nothing else."""
    items = parse_json_list(value)
    return cast("list[dict[str, Any]]", items) if isinstance(items, list) and all_objects(cast("Any", items)) else []


def _is_openai(value: Any) -> bool:
    items = _objects_of(value)
    return bool(items) and all(
        "role" in item
        and (
            uses_tools(item, item["role"]) or ("content" in item and str(item["role"]).strip().lower() in OPENAI.roles)
        )
        for item in items
    )


def _is_sharegpt_like(value: Any) -> bool:
    items = _objects_of(value)
    return bool(items) and all(
        any(key in item for key in SHAREGPT.author_keys) and any(key in item for key in SHAREGPT.content_keys)
        for item in items
    )


def _is_sharegpt(value: Any) -> bool:
    return _is_sharegpt_like(value) and not _is_openai(value)


def _is_text_or_messages(value: Any) -> bool:
    return isinstance(value, str) or _is_sharegpt_like(value)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | dict) or _is_sharegpt_like(value)


def _is_choices(value: Any) -> bool:
    return isinstance(value, list | dict)


def _is_true_or_false(value: Any) -> bool:
    return isinstance(value, bool)


def _is_batch_body(value: Any) -> bool:
    return isinstance(value, dict) and _is_openai(cast("dict[str, Any]", value).get("messages"))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class _ColumnRule:
    """A column, by any of its names, with a test of its values and a description of them for messages."""

    names: tuple[str, ...]
    accepts: ValueTest
    description: str = ""


@dataclass(frozen=True, slots=True)
class _FormatRule:
    """The columns by which a format is recognised.

    Args:
        name: the format.
        read: reads its rows.
        required: columns that rows must have.
        optional: columns that must fit too if they are not null.
    """

    name: str
    read: Format
    required: tuple[_ColumnRule, ...]
    optional: tuple[_ColumnRule, ...] = ()

    def match_columns(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The row's columns that the format would use, or None if the row does not fit."""
        used: list[str] = []
        for column in self.required:
            name = next((n for n in column.names if column.accepts(row.get(n))), None)
            if name is None:
                return None
            used.append(name)
        for column in self.optional:
            for name in column.names:
                if row.get(name) is not None:
                    if not column.accepts(row[name]):
                        return None
                    used.append(name)
        return tuple(dict.fromkeys(used))


_FROM_VALUE = "with `from` and `value`, in one of their spellings"
_CONVERSATIONS = tuple(name for name in OPENAI.columns if name not in COLUMNS_IF_ALONE)
_ANSWERS = tuple(name for name in COMPLETION_COLUMNS if name != "assistant")
_QUESTION = _ColumnRule(("question",), _is_text)
_RULES = (
    _FormatRule("messages", openai_messages, (_ColumnRule(_CONVERSATIONS, _is_openai, "with `role` and `content`"),)),
    _FormatRule("sharegpt", sharegpt, (_ColumnRule(_CONVERSATIONS, _is_sharegpt, _FROM_VALUE),)),
    _FormatRule("messages", openai_messages, (_ColumnRule(("body",), _is_batch_body, "with `messages`"),)),
    *(
        _FormatRule(
            "feedback",
            feedback,
            (_ColumnRule(_CONVERSATIONS, _is_sharegpt_like), _ColumnRule((judgement,), _is_true_or_false)),
        )
        for judgement in CONVERSATION_SCORE_COLUMNS
    ),
    _FormatRule(
        "alpaca",
        alpaca,
        (_ColumnRule(("instruction",), _is_text), _ColumnRule(("output", *_ANSWERS), _is_text)),
        (_ColumnRule(("input",), _is_text), _ColumnRule(("context",), _is_text)),
    ),
    _FormatRule(
        "prompt-completion",
        prompt_completion,
        (_ColumnRule(("prompt", "query", "input"), _is_text_or_messages), _ColumnRule(_ANSWERS, _is_answer)),
        (_ColumnRule(("context",), _is_text),),
    ),
    _FormatRule(
        "prompt-completion",
        prompt_completion,
        (_ColumnRule(("user",), _is_text), _ColumnRule(("assistant",), _is_text)),
    ),
    _FormatRule(
        "question-answer",
        question_answer,
        (_QUESTION, _ColumnRule(("answer", *_ANSWERS), _is_text)),
        (_ColumnRule(("context",), _is_text),),
    ),
    _FormatRule(
        "preference",
        preference,
        (_ColumnRule(CHOSEN_COLUMNS, _is_answer), _ColumnRule(REJECTED_COLUMNS, _is_answer)),
        (_ColumnRule(PREFERENCE_PROMPT_COLUMNS, _is_text_or_messages),),
    ),
    _FormatRule(
        "feedback",
        feedback,
        (
            _ColumnRule(FEEDBACK_PROMPT_COLUMNS, _is_text_or_messages),
            _ColumnRule(_ANSWERS, _is_answer),
            _ColumnRule(SCORE_COLUMNS, is_judgement),
        ),
    ),
    _FormatRule(
        "multiple-choice",
        multiple_choice,
        (_QUESTION, _ColumnRule(CHOICES_COLUMNS, _is_choices), _ColumnRule(ANSWER_COLUMNS, _is_scalar)),
    ),
    *(
        _FormatRule(
            "multiple-choice",
            multiple_choice,
            (
                _QUESTION,
                _ColumnRule((first,), _is_text),
                _ColumnRule((f"{first[:-1]}{chr(ord(first[-1]) + 1)}",), _is_text),
                _ColumnRule(ANSWER_COLUMNS, _is_scalar),
            ),
        )
        for first in FIRST_OPTION_COLUMNS
    ),
)
# Names that mean something else in rows with other columns.
_FALLBACK_RULES = (
    _FormatRule("messages", openai_messages, (_ColumnRule(COLUMNS_IF_ALONE, _is_openai, "with `role` and `content`"),)),
    _FormatRule("sharegpt", sharegpt, (_ColumnRule(COLUMNS_IF_ALONE, _is_sharegpt, _FROM_VALUE),)),
)
# Many data sets keep the rendered row in `text` beside its parts, so it counts only if there are no such parts.
_PLAIN_TEXT_RULE = _FormatRule("text", plain_text, (_ColumnRule(TEXT_COLUMNS, _is_text),))
_PART_COLUMNS = {
    name
    for rule in _RULES
    for column in rule.required
    if not {*column.names} <= {*SCORE_COLUMNS, *ANSWER_COLUMNS, "user"}
    for name in column.names
}
_KNOWN_COLUMNS = {
    *(
        name
        for rule in (*_RULES, *_FALLBACK_RULES)
        for part in (rule.required, rule.optional)
        for c in part
        for name in c.names
    ),
    *(
        *SYSTEM_COLUMNS,
        *TEXT_COLUMNS,
        *MEDIA_COLUMNS,
        *TOOL_COLUMNS,
        *REASONING_COLUMNS,
        "history",
        "context",
        "weight",
    ),
}


@dataclass(frozen=True, slots=True)
class RecognisedFormat:
    """The format of some rows, and a sentence that says how it was recognised."""

    name: str
    why: str


def recognise(rows: Sequence[Mapping[str, Any]], where: str = "data.sources") -> RecognisedFormat:
    """The format that at least half of the rows have.

    Args:
        rows: the first rows of a source.
        where: the source, for errors.

    Raises DataError if no format matches, or two that use different columns.
    """
    if not rows:
        raise DataError("there is no row to tell the format from", where=where, hint="name it with `format`")
    has_no_parts = _PART_COLUMNS.isdisjoint(column_names(rows))
    matches = _matching_rules(_RULES, rows) or (_matching_rules(_FALLBACK_RULES, rows) if has_no_parts else [])
    names = list(dict.fromkeys(rule.name for rule, _ in matches))
    if len(names) == 1:
        _check_judgements(names[0], rows, where)
        return _describe_match(*matches[0], rows)
    if len(names) > 1:
        listed = "; or ".join(f"{rule.name}, by {_quote(columns)}" for rule, columns in matches)
        one_row_has_both = any(sum(bool(_columns_used(rule, [row])) for rule, _ in matches) > 1 for row in rows)
        raise DataError(
            f"the rows could be of two formats: {listed}",
            where=where,
            hint=f'name one: format = "{names[0]}"'
            if one_row_has_both
            else "write the rows of each format into a file of their own, and name both as `[[data.sources]]`",
        )
    if public_dataset := _match_public_dataset(rows):
        return public_dataset
    plain = _columns_used(_PLAIN_TEXT_RULE, rows)
    if plain and has_no_parts:
        return _describe_match(_PLAIN_TEXT_RULE, plain, rows)
    raise _unknown_format_error(rows, where, plain)


def _matching_rules(
    rules: Sequence[_FormatRule], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[_FormatRule, tuple[str, ...]]]:
    """The rules that the rows match, with the columns they use; without those that use a part of another's columns."""
    matches = [(rule, columns) for rule in rules if (columns := _columns_used(rule, rows))]
    return [(rule, columns) for rule, columns in matches if not any(set(columns) < set(more) for _, more in matches)]


def _check_judgements(name: str, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises DataError if answers have a judgement that cannot be read: bad ones would be trained like good ones."""
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


def _match_public_dataset(rows: Sequence[Mapping[str, Any]]) -> RecognisedFormat | None:
    """The public data set whose columns all rows have."""
    for name, entry in sorted(PUBLIC_DATASETS.items(), key=lambda item: -len(item[1].columns)):
        # One or two column names are no evidence.
        matches = len(entry.columns) > 2 and all(set(entry.columns) <= set(row) for row in rows)
        if matches and 2 * sum(_can_read(entry, row) for row in rows) >= len(rows):
            return RecognisedFormat(name, f"format: {name}, as the rows have its columns {_quote(entry.columns)}")
    return None


def _can_read(entry: PublicDataset, row: Mapping[str, Any]) -> bool:
    try:
        entry(row)
    except FormatError:
        return False
    return True


def _columns_used(rule: _FormatRule, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The columns that the format would use, if at least half of the rows fit it."""
    used = [columns for row in rows if (columns := rule.match_columns(row)) is not None]
    # An optional column is used if any row has a value in it.
    return tuple(dict.fromkeys(name for columns in used for name in columns)) if 2 * len(used) >= len(rows) else None


class _TrackedRow(dict[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        return self._record(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._record(name, super().get(name, default))

    def _record(self, name: str, value: Any) -> Any:
        if value is not None:
            self.seen.add(name)
        return value


def _columns_read(rule: _FormatRule, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns that the format reads in these rows."""
    seen: set[str] = set()
    for row in rows:
        tracked = _TrackedRow(row)
        try:
            rule.read(tracked)
        except FormatError:
            continue  # It may have looked for columns that only other rows have.
        seen |= tracked.seen
    return seen


def _describe_match(rule: _FormatRule, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> RecognisedFormat:
    seen = _columns_read(rule, rows)
    read = [name for name in dict.fromkeys((*columns, *column_names(rows))) if name in seen] or list(columns)
    description = next((column.description for column in rule.required if column.description), "")
    listed = _quote(read)
    if description:  # of the first column
        listed = f"{_quote(read[:1])} {description}{', and ' if read[1:] else ''}{_quote(read[1:])}"
    why = f"format: {rule.name}, as the rows have {listed}"
    unused = [name for name in column_names(rows) if name not in read]
    if unused:
        why += f"; not used: {_quote(unused)}"
    if rule.name in ("messages", "sharegpt") and (keys := unused_message_keys(rows, columns[0])):
        why += f"; keys of messages that are not used: {_quote(keys)}"
    return RecognisedFormat(rule.name, why)


def _unknown_format_error(rows: Sequence[Mapping[str, Any]], where: str, plain: Sequence[str] | None) -> DataError:
    names = column_names(rows)
    closest = _closest_formats(rows)
    advice = f"close: {'; '.join(closest)}. " if closest else ""
    advice += f'format = "text" would train {_quote(plain)} as it is. ' if plain else ""
    texts = [name for name in names if any(_is_text(row.get(name)) and row[name].strip() for row in rows)]
    usable = [name for name in texts if name.isprintable() and not set(name) & set("{}[]\"'")]
    advice += "Name a format"
    if len(usable) > 1:
        request, answer = (_column_called(words, usable) for words in (_REQUEST_WORDS, _ANSWER_WORDS))
        advice += ", or say what becomes of the columns: "
        advice += f'mapping = {{ prompt = "{{{request or "COLUMN"}}}", completion = "{{{answer or "COLUMN"}}}" }}'
    if len(usable) == 1 and not plain:
        advice += f"; to train {_quote(usable)} as a document, call it `text`"
    return DataError(
        f"the rows are of no known format: their columns are {_quote(names) or 'none'}",
        where=where,
        hint=advice,
    )


_REQUEST_WORDS = ("instruction", "prompt", "question", "query", "request", "user", "human", "input")
_ANSWER_WORDS = ("answer", "response", "completion", "reply", "output", "assistant")


def _column_called(words: Sequence[str], names: Sequence[str]) -> str | None:
    """The only one of the columns whose name holds one of the words."""
    matches = [name for name in names if any(word in name.casefold() for word in words)]
    return matches[0] if len(matches) == 1 else None


def respell_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each column that is a known one but for capitals, spaces around it or spaces for `_`, the known name.

    A column is left alone if the known one is there too, or two columns would become it.
    """
    names = column_names(rows)
    targets = {name: "_".join(name.split()).casefold() for name in names if name not in _KNOWN_COLUMNS}
    counts = Counter(targets.values())
    return {
        name: target
        for name, target in targets.items()
        if target in _KNOWN_COLUMNS and target not in names and counts[target] == 1
    }


def _closest_formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Up to three formats that the rows come closest to, and what they lack."""
    candidates: list[tuple[int, str]] = []
    for rule in _RULES:
        lacks = [lack for column in rule.required if (lack := _lacking(column, rows))]
        unfit = [lack for column in rule.optional if (lack := _lacking(column, rows))]
        lacks += [lack for lack in unfit if not lack.startswith("needs")]
        present = sum(any(name in row for name in column.names for row in rows) for column in rule.required)
        if present:
            candidates.append(
                (len(lacks) - present, f"{rule.name} ({', '.join(lacks) or 'most rows have another form'})")
            )
    return [text for _, text in sorted(candidates, key=lambda item: item[0])[:3]]


def _lacking(column: _ColumnRule, rows: Sequence[Mapping[str, Any]]) -> str | None:
    name = next((name for name in column.names if any(row.get(name) is not None for row in rows)), None)
    if name is None:
        return f"needs `{column.names[0]}`"
    values = [row[name] for row in rows if row.get(name) is not None]
    wrong = next((value for value in values if not column.accepts(value)), None)
    if wrong is None:
        return None
    return f"`{name}` is {describe_type(wrong)}{f', not {column.description}' if column.description else ''}"


def _quote(names: Sequence[str]) -> str:
    # A name may hold anything; escaped, it can be printed anywhere.
    escaped = [name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name for name in names]
    quoted = [f"`{name if len(name) <= 40 else f'{name[:39]}…'}`" for name in escaped]
    return ", ".join(quoted[:20]) + (" …" if len(quoted) > 20 else "")
