"""Turns records into the token sequences that are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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

    Raises TemplateError if the template refuses the record.
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

    Raises ModelError if a row has a token that the model's embedding does not have.
    """
    results = list(_encode_all(list(records), template, limit))
    reasons = list(dict.fromkeys(r.what for r in results if isinstance(r, TemplateError)))
    rows: list[Sequences] = [() if isinstance(r, TemplateError) else r for r in results]
    sequences = [sequence for row in rows for sequence in row]
    lengths = [min(len(s.ids), limit) for s in sequences]
    trained = [[sum(s.trained[1:limit]) for s in row] for row in rows]
    ends = np.cumsum([0, *lengths])
    ids = np.fromiter((i for s in sequences for i in s.ids[:limit]), np.uint32, int(ends[-1]))
    template.check_embedded([int(ids.max(initial=0))])
    sequence_ends = np.cumsum([0, *map(len, rows)])
    return {
        "ids": ids,
        "trained": np.fromiter((t for s in sequences for t in s.trained[:limit]), np.bool_, len(ids)),
        "sequence_lengths": np.array(lengths, np.int64),
        "sequence_ends": sequence_ends,
        "token_ends": ends[sequence_ends],
        "tokens": np.array([sum(len(s.ids) for s in row) for row in rows], np.int64),
        "longest": np.array([max((len(s.ids) for s in row), default=0) for row in rows], np.int64),
        "trained_tokens": np.array([sum(counts) for counts in trained], np.int64),
        "least_trained": np.array([min(counts, default=0) for counts in trained], np.int64),
        "lost_end": np.array([any(any(s.trained[limit:]) for s in row) for row in rows], np.bool_),
        "reason": np.array([reasons.index(r.what) if isinstance(r, TemplateError) else -1 for r in results], np.int64),
        "reasons": np.frombuffer(json.dumps(reasons).encode(), np.uint8),
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
