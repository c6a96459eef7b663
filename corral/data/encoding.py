"""Turns records into the token sequences that are trained on."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data.plain_text import PlainTextEncoder, split_windows
from corral.errors import TemplateError
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.template import Encoded, Template

Sequences: TypeAlias = tuple[Encoded, ...]

VERSION = 1


def encode_record(record: Record, template: Template) -> Sequences:
    """The whole token sequences of a record, of any length.

    A conversation is one sequence, in which the answers are trained. A preference is two, prompt + chosen and prompt +
    rejected, and feedback is one, prompt + completion; nothing of their prompts is trained. A text is one sequence, all of
    it trained; `encode_rows` splits one that is too long.

    Raises:
        TemplateError: the template refuses the record.
    """
    match record:
        case Conversation():
            return (template.encode(record),)
        case Preference():
            return (
                _encode_answer(record.prompt, record.chosen, template),
                _encode_answer(record.prompt, record.rejected, template),
            )
        case Feedback():
            return (_encode_answer(record.prompt, record.completion, template),)
        case Text():
            return (_plain_text_encoder(template).encode(record.content),)


def _encode_answer(prompt: Conversation, answer: str, template: Template) -> Encoded:
    """Prompt and answer as one sequence; only this answer is trained, not those within the prompt."""
    whole = template.encode(prompt.add("assistant", answer))
    # A prompt's ids are always a prefix of the ids of prompt and answer.
    context = len(template.prompt(prompt))
    return Encoded(whole.ids, (False,) * context + whole.trained[context:])


@lru_cache(maxsize=2)
def _plain_text_encoder(template: Template) -> PlainTextEncoder:
    return PlainTextEncoder(template)


@dataclass
class _Columns:
    """Growing arrays of a chunk of rows: flat over tokens and over sequences, the others with one value a row."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    trained: bytearray = field(default_factory=bytearray)
    sequence_lengths: array[int] = field(default_factory=lambda: array("q"))
    row_sequences: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("q"))
    longest: array[int] = field(default_factory=lambda: array("q"))
    trained_tokens: array[int] = field(default_factory=lambda: array("q"))
    least_trained: array[int] = field(default_factory=lambda: array("q"))
    lost_end: bytearray = field(default_factory=bytearray)
    reason: array[int] = field(default_factory=lambda: array("q"))

    def add(self, sequences: Sequences, limit: int, reason: int) -> None:
        trained = [sum(s.trained[1:limit]) for s in sequences]
        for s in sequences:
            self.ids.extend(s.ids[:limit])
            self.trained.extend(s.trained[:limit])
            self.sequence_lengths.append(min(len(s.ids), limit))
        self.row_sequences.append(len(sequences))
        self.tokens.append(sum(len(s.ids) for s in sequences))
        self.longest.append(max((len(s.ids) for s in sequences), default=0))
        self.trained_tokens.append(sum(trained))
        self.least_trained.append(min(trained, default=0))
        self.lost_end.append(any(any(s.trained[limit:]) for s in sequences))
        self.reason.append(reason)


def encode_rows(records: Iterable[Record], template: Template, limit: int) -> dict[str, NDArray[Any]]:
    """Encode rows and truncate their sequences at `limit` tokens; a plain text is split instead, so that it loses nothing.

    Returns these arrays:
        ids, trained: [tokens].
        sequence_lengths: [sequences].
        token_ends, sequence_ends: where each row's tokens and sequences begin. [rows + 1]
        tokens, longest: tokens of all sequences and of the longest one, before truncation. [rows]
        trained_tokens, least_trained: tokens that count in the loss after truncation, of all sequences and of the one that
            has fewest. [rows]
        lost_end: whether a trained token, so the end of an answer, was cut off. [rows]
        reason: index into `reasons` of why the template refuses the row, else -1. [rows]
        reasons: a JSON list, as bytes.
    """
    columns = _Columns()
    reasons: dict[str, int] = {}
    for sequences in _encode_all(list(records), template, limit):
        if isinstance(sequences, TemplateError):
            columns.add((), limit, reasons.setdefault(sequences.what, len(reasons)))
        else:
            columns.add(sequences, limit, -1)
    lengths = np.asarray(columns.sequence_lengths, np.int64)
    sequence_ends = np.concatenate([[0], np.cumsum(np.asarray(columns.row_sequences, np.int64))]).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return {
        "ids": np.asarray(columns.ids, np.uint32),
        "trained": np.frombuffer(columns.trained, np.bool_),
        "sequence_lengths": lengths,
        "sequence_ends": sequence_ends,
        "token_ends": ends[sequence_ends],
        "tokens": np.asarray(columns.tokens, np.int64),
        "longest": np.asarray(columns.longest, np.int64),
        "trained_tokens": np.asarray(columns.trained_tokens, np.int64),
        "least_trained": np.asarray(columns.least_trained, np.int64),
        "lost_end": np.frombuffer(columns.lost_end, np.bool_),
        "reason": np.asarray(columns.reason, np.int64),
        "reasons": np.frombuffer(json.dumps(list(reasons)).encode(), np.uint8),
    }


def _encode_all(records: Sequence[Record], template: Template, limit: int) -> Iterator[Sequences | TemplateError]:
    """The sequences of each record, or the error. Conversations are encoded in one batch, which is faster."""
    conversations = [record for record in records if isinstance(record, Conversation)]
    encoded = iter(template.encode_batch(conversations))
    for record in records:
        if isinstance(record, Conversation):
            whole = next(encoded)
            yield whole if isinstance(whole, TemplateError) else (whole,)
        else:
            try:
                whole = encode_record(record, template)
                yield split_windows(whole[0], limit) if isinstance(record, Text) else whole
            except TemplateError as error:
                yield error
