"""Compiles a recipe's mapping, texts with column names in braces, into a function from rows to records.

`{title}` is a column, `{answer.value}` a key of an object, `{choices[0]}` an item of a list, `{{` and `}}` are braces.
Nothing is evaluated: a placeholder can only look up values in a row. A null counts as empty text; a text that is blank
after filling is a fault.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from corral.data.formats.chat_messages import SHAREGPT, ChatDialect, read_messages
from corral.data.formats.fields import (
    FormatError,
    column_names,
    describe_type,
    format_path,
    quote_names,
    valid_text,
    value_at_path,
)
from corral.data.formats.scores import Scale, infer_scale
from corral.data.formats.turns import ordered_conversation
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Message, Preference
from corral.recipe import Mapping as MappingSettings

Path: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_STEP = re.compile(r"\[(-?\d{1,9})\]|\.?([^.\[\]]+)")
_WHERE = "data.sources.mapping"


@dataclass(frozen=True, slots=True)
class TextPattern:
    """A text with placeholders, parsed into literal strings and paths into a row.

    Args:
        name: the setting that holds it, for messages.
        parts: literals as strings, paths as tuples.
    """

    name: str
    parts: tuple[str | Path, ...]

    @classmethod
    def parse(cls, name: str, source: str, where: str = _WHERE) -> TextPattern:
        """Parse a setting's text; `where` is the table that holds the setting.

        Raises DataError if a brace is not paired, or a placeholder names no column.
        """
        parts: list[str | Path] = []
        end = 0
        for match in _TOKEN.finditer(source):
            parts.append(source[end : match.start()])
            end = match.end()
            token = match.group()
            if token in ("{{", "}}"):
                parts.append(token[0])
            elif match.group(1) is not None:
                parts.append(_parse_path(match.group(1), f"{where}.{name}"))
            else:
                raise DataError(
                    f"a {token!r} without its other half in {_shorten(source)}",
                    where=f"{where}.{name}",
                    hint="put a column's name in {braces}; write {{ or }} for a brace in the text",
                )
        parts.append(source[end:])
        return cls(name, tuple(part for part in parts if part != ""))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths, in order."""
        return tuple(part for part in self.parts if isinstance(part, tuple))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text filled with a row's values.

        Raises FormatError if a value is missing or not a text, all is blank or, but for a system message, all values are.
        """
        values = [part if isinstance(part, str) else _value_as_text(row, part) for part in self.parts]
        from_row = [value for value, part in zip(values, self.parts, strict=True) if not isinstance(part, str)]
        filled = "".join(values)
        if not filled.strip() or (from_row and self.name != "system" and not "".join(from_row).strip()):
            raise FormatError(f"{self.name} is empty")
        return valid_text(filled, self.name)


def _parse_path(placeholder: str, where: str) -> Path:
    """`answer.aliases[0]` → `("answer", "aliases", 0)`."""
    steps: list[str | int] = []
    position = 0
    while position < len(placeholder):
        match = _STEP.match(placeholder, position)
        # The first step is a column, without a dot before it; other names have one.
        if not match or (match.group(2) is not None and (match.group()[0] == ".") == (not steps)):
            break
        step = match.group(2)
        steps.append(step.strip() if step is not None else int(match.group(1)))
        position = match.end()
    if position < len(placeholder) or not steps or "" in steps or isinstance(steps[0], int):
        raise DataError(
            f"{{{_shorten(placeholder, quotes=False)}}} names no column",
            where=where,
            hint="write {column}, {column.key} or {column[0]}; {{ for a brace in the text",
        )
    return tuple(steps)


def _value_at(row: Mapping[str, Any], path: Path) -> Any:
    """The value at a path. A column whose whole name is the path, dots included, takes precedence."""
    whole = format_path(path)
    return row[whole] if whole in row else value_at_path(row, path)


def _value_as_text(row: Mapping[str, Any], path: Path) -> str:
    name = format_path(path)
    value = _value_at(row, path)
    if value is None:
        return ""
    if isinstance(value, str):
        return valid_text(value, name)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) < 10**100:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value).removesuffix(".0")
    inside = "[0]" if isinstance(value, list) else ".key" if isinstance(value, dict) else ""
    raise FormatError(
        f"{name} is {describe_type(value)}" + (f": name what is in it, {{{name}{inside}}}" if inside else "")
    )


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """A compiled mapping. The type of record depends on the keys that the recipe gives."""

    prompt: TextPattern | None = None
    system: TextPattern | None = None
    completion: TextPattern | None = None
    chosen: TextPattern | None = None
    rejected: TextPattern | None = None
    score: Path | None = None
    scale: Scale = field(default_factory=Scale)
    messages: Path | None = None
    dialect: ChatDialect = SHAREGPT

    def __call__(self, row: Mapping[str, Any]) -> Conversation | Preference | Feedback:
        """The record of a row. Raises FormatError."""
        turns = [] if self.system is None else [Message("system", self.system.fill(row))]
        if self.messages is not None:
            turns += read_messages(_value_at(row, self.messages), format_path(self.messages), self.dialect)
            return ordered_conversation(turns)
        assert self.prompt is not None, "compile_mapping refuses a mapping without messages and prompt"
        prompt = Conversation((*turns, Message("user", self.prompt.fill(row))))
        if self.chosen is not None and self.rejected is not None:
            chosen, rejected = self.chosen.fill(row), self.rejected.fill(row)
            if chosen == rejected:
                raise FormatError("chosen and rejected are the same")
            return Preference(prompt, chosen, rejected)
        assert self.completion is not None, "compile_mapping refuses a mapping without an answer"
        completion = self.completion.fill(row)
        if self.score is None:
            return prompt.add("assistant", completion)
        value = _value_at(row, self.score)
        return Feedback(prompt, completion, self.scale.normalise(value, format_path(self.score)))

    @property
    def record_type(self) -> str:
        """What a row becomes, for a message."""
        if self.chosen is not None:
            return "a preference"
        return "feedback" if self.score is not None else "a conversation"

    @property
    def patterns(self) -> tuple[TextPattern, ...]:
        """The patterns it has."""
        given = (self.system, self.prompt, self.completion, self.chosen, self.rejected)
        return tuple(pattern for pattern in given if pattern is not None)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths in a row that it reads."""
        columns = (self.messages, self.score)
        return (*(p for pattern in self.patterns for p in pattern.paths), *(p for p in columns if p is not None))


def compile_mapping(
    settings: MappingSettings, rows: Sequence[Mapping[str, Any]], where: str = _WHERE
) -> tuple[ColumnMapping, str]:
    """(a recipe's mapping, checked against the first rows; a note on the scale of its scores).

    Args:
        settings: the recipe's table.
        rows: the first rows of the source.
        where: the table, for errors.

    Raises DataError if a text cannot be parsed, the keys make no record, or a column is in none of the rows, or the scale
    of the scores cannot be inferred.
    """
    given = settings.model_dump(exclude={"score_range", "role", "content", "roles"}, exclude_none=True)
    _check_keys(settings, where)
    stated = stated_scale(settings, where)
    score, column = (given.pop(name, None) for name in ("score", "messages"))
    patterns: dict[str, Any] = {name: TextPattern.parse(name, source, where) for name, source in given.items()}
    score_path, messages_path = (
        None if source is None else _parse_single_column(name, source, where)
        for name, source in (("score", score), ("messages", column))
    )
    mapping = ColumnMapping(**patterns, score=score_path, messages=messages_path, dialect=_dialect(settings))
    for pattern in mapping.patterns:
        if not pattern.paths and pattern.name != "system":
            raise DataError(
                f"{_shorten(given[pattern.name])} names no column: every row would have the same text",
                where=f"{where}.{pattern.name}",
                hint=f"put a column's name in braces; the columns are {_list_columns(rows)}",
            )
        _check_columns(pattern.paths, rows, f"{where}.{pattern.name}")
    for name, path in (("score", score_path), ("messages", messages_path)):
        if path is not None:
            _check_columns((path,), rows, f"{where}.{name}")
    if stated is not None or score_path is None:
        return replace(mapping, scale=stated or Scale()), ""
    scale, note = infer_scale(_values_at(rows, score_path), format_path(score_path), f"{where}.score")
    return replace(mapping, scale=scale), note


def stated_scale(settings: MappingSettings, where: str = _WHERE) -> Scale | None:
    """The scale of scores that a mapping states, if any. Raises DataError if the range is not one."""
    if settings.score_range is None:
        return None
    low, high = settings.score_range
    if not (math.isfinite(low) and math.isfinite(high) and low != high):
        raise DataError(f"the range {low:g} to {high:g} has no width", where=f"{where}.score_range", hint="e.g. [1, 5]")
    return Scale(low, high, stated=True)


def has_only_score_range(settings: MappingSettings) -> bool:
    """Whether a mapping gives nothing but the scale of scores, so that the rows' format decides the rest."""
    return set(settings.model_dump(exclude_none=True)) == {"score_range"}


def _dialect(settings: MappingSettings) -> ChatDialect:
    """How messages are written: ShareGPT's ways, changed by what the mapping gives."""
    roles = {name.strip().lower(): role for name, role in (settings.roles or {}).items()}
    return replace(
        SHAREGPT,
        author_keys=(settings.role,) if settings.role else SHAREGPT.author_keys,
        content_keys=(settings.content,) if settings.content else SHAREGPT.content_keys,
        roles={**SHAREGPT.roles, **roles},
        expected_roles="system, user or assistant, another word for them, or one of the mapping's `roles`",
    )


def _values_at(rows: Iterable[Mapping[str, Any]], path: Path) -> Iterator[Any]:
    for row in rows:
        try:
            yield _value_at(row, path)
        except FormatError:
            continue


_KEY_SETS = (
    {"messages"},
    {"prompt", "completion"},
    {"prompt", "completion", "score"},
    {"prompt", "chosen", "rejected"},
)


def _check_keys(settings: MappingSettings, where: str) -> None:
    given = set(settings.model_dump(exclude_none=True))
    keys = given - {"system", "score_range", "role", "content", "roles"}
    if keys not in _KEY_SETS:
        raise DataError(
            f"a mapping of {', '.join(sorted(given - {'score_range'})) or 'nothing'} makes no record",
            where=where,
            hint="give prompt and completion; or prompt, completion and score; or prompt, chosen and rejected; or messages; "
            "and system with any of them",
        )
    for key, needs in (("role", "messages"), ("content", "messages"), ("roles", "messages"), ("score_range", "score")):
        if key in given and needs not in keys:
            raise DataError(
                f"`{key}` says nothing without `{needs}`", where=f"{where}.{key}", hint="remove it, or give both"
            )


def _parse_single_column(name: str, source: str, where: str) -> Path:
    """The path of a score or of messages, given with or without braces."""
    pattern = TextPattern.parse(name, source if "{" in source or "}" in source else f"{{{source}}}", where)
    if len(pattern.parts) != 1 or not pattern.paths:
        example = {"score": "rating", "messages": "dialogue"}[name]
        raise DataError(
            f"{_shorten(source)} is not one column", where=f"{where}.{name}", hint=f'e.g. {name} = "{{{example}}}"'
        )
    return pattern.paths[0]


def _check_columns(paths: Iterable[Path], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    for path in paths:
        whole, column = format_path(path), str(path[0])
        if rows and not any(column in row or whole in row for row in rows):
            close = difflib.get_close_matches(column, column_names(rows), n=1)
            guess = f"did you mean {{{close[0]}}}? " if close else ""
            raise DataError(
                f"there is no column {column!r}",
                where=where,
                hint=f"{guess}the columns are {_list_columns(rows)}",
            )


def _list_columns(rows: Iterable[Mapping[str, Any]]) -> str:
    return quote_names(column_names(rows), most=30)


def _shorten(source: str, *, quotes: bool = True) -> str:
    shortened = source if len(source) <= 60 else f"{source[:59]}…"
    return repr(shortened) if quotes else shortened
