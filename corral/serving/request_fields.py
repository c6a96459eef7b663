"""How the fields of a request are judged: those that are honoured, those that are refused, and those that change nothing.

Each type of request declares the fields that it honours; in `only`, those that it takes at harmless values alone, because any
other would change what the answer means; and in `ignored`, those that change nothing. A field that nobody declares is ignored
as well. `report` names what was ignored, unless it was false, in one log line and a header; a strict server refuses undeclared
fields, false ones too. A null field is as one that was left out.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

from fastapi import Response
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

NOTE_HEADERS = ("x-corral-ignored", "x-corral-max-tokens")
"""Of a response: the fields that had no effect; the most tokens of an answer, if fewer than were requested."""
_MAX_NAMED = 10
_MAX_NAME_CHARACTERS = 64
_NOT_IN_NAMES = re.compile(r"[^\w.\-]", re.ASCII)  # names go into a header and the log
_log = logging.getLogger(__name__)


@dataclass
class Notes:
    """How a request was answered otherwise than it asked, without changing what the answer means."""

    ignored: dict[str, None] = field(default_factory=dict[str, None])
    """Names of fields that had no effect, in order; one more than `_MAX_NAMED` at most."""
    unknown: str | None = None
    """The first field that its type does not declare."""
    max_tokens: int | None = None
    """The tokens of an answer, if fewer than were requested."""

    def add_ignored(self, name: str) -> None:
        """Note that a field has no effect."""
        if len(self.ignored) <= _MAX_NAMED:
            self.ignored[_NOT_IN_NAMES.sub("?", name[:_MAX_NAME_CHARACTERS]) or "?"] = None


_collecting: ContextVar[Notes | None] = ContextVar("collecting", default=None)
"""Of the request that is being validated."""


def report(notes: Notes, response: Response) -> Response:
    """Name what was ignored or changed of a request in one log line, and in headers of its response."""
    headers: dict[str, str] = {}
    if notes.ignored:
        names = [*notes.ignored]
        headers["x-corral-ignored"] = ", ".join([*names[:_MAX_NAMED], *(["..."] if len(names) > _MAX_NAMED else [])])
    if notes.max_tokens is not None:
        headers["x-corral-max-tokens"] = str(notes.max_tokens)
    if headers:
        _log.info("a request was answered with %s", "; ".join(f"{name}: {value}" for name, value in headers.items()))
        response.headers.update(headers)
    return response


class StrictModel(BaseModel):
    """Base of all parts of a request: values are of the declared types, and other fields are judged by name.

    `only`: field → values at which it changes nothing, besides null; any other value is refused.
    `why`: reasons for errors. `ignored`: fields that change nothing.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    why: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _judge_fields(cls, data: Any) -> Any:
        """Refuse, or note and leave out, the fields that the type does not honour; a hundred thousand of them cost little."""
        if not isinstance(data, dict):
            return data
        sent = cls.spread(cast(dict[str, Any], data))
        known = {name: sent[name] for name in cls.model_fields if name in sent}
        if len(known) == len(sent):
            return known
        for name, harmless in cls.only.items():
            if (value := sent.get(name)) is not None and value not in harmless:
                shown = " or ".join(json.dumps(each) for each in (None, *harmless))
                why = f"{cls.why[name]}; " if name in cls.why else ""
                context = {"field": name, "why": why, "shown": shown}
                what = "is not supported by this server: {why}leave it out (or {shown})"
                raise PydanticCustomError("unsupported", what, context)
        notes = _collecting.get() or Notes()
        for name, value in sent.items():
            if name in known or name in cls.only or value is None:
                continue
            if len(notes.ignored) > _MAX_NAMED and notes.unknown is not None:
                break
            if name not in cls.ignored and notes.unknown is None:
                notes.unknown = name
            if value is not False:  # asks for nothing, so there is nothing to tell
                notes.add_ignored(name)
        return known

    @classmethod
    def spread(cls, sent: dict[str, Any]) -> dict[str, Any]:
        """The fields as sent, with those of other names and places under their own."""
        return sent


class RequestBody(StrictModel):
    """Base of all requests whose response says what was ignored; see `report`."""

    _notes: Notes = PrivateAttr(default_factory=Notes)

    @property
    def notes(self) -> Notes:
        """What of it had no effect."""
        return self._notes

    @model_validator(mode="wrap")
    @classmethod
    def _collect_notes(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        token = _collecting.set(Notes())
        try:
            request = validate(data)
            request._notes = _collecting.get() or Notes()
        finally:
            _collecting.reset(token)
        return request
