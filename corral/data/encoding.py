"""Turns records into the token sequences that are trained on, and fits those that are too long.

A document becomes windows of tokens. A conversation that is too long is split at the ends of answers into windows, each with
the system message and whole exchanges (a question and its answer); or only the first window stays; or it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal, TypeAlias, get_args

import numpy as np

from corral.data.plain_text import PlainTextEncoder, split_windows
from corral.data.row_store import Column, list_column
from corral.errors import DataError, TemplateError
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.recipe import Data
from corral.template import Encoded, Template

Sequences: TypeAlias = tuple[Encoded, ...]
Fit: TypeAlias = Literal["kept", "split", "trimmed", "truncated", "fully masked", "dropped"]
FITS: tuple[Fit, ...] = get_args(Fit)
"""What becomes of a row when it is encoded: all of it in one sequence; in several; only some of its turns; cut at the limit;
nothing of it is trained; it is left out."""

VERSION = 3


def encode_record(record: Record, template: Template) -> Sequences:
    """The whole token sequences of a record, of any length.

    A conversation is one sequence, in which the answers are trained. A preference is two, prompt + chosen and prompt +
    rejected, and feedback is one, prompt + completion; nothing of their prompts is trained. A text is one sequence, all of
    it trained.

    Raises TemplateError if the template refuses the record.
    """
    match record:
        case Conversation():
            return (template.encode(record),)
        case Preference():
            return (
                encode_answer(record.prompt, record.chosen, template),
                encode_answer(record.prompt, record.rejected, template),
            )
        case Feedback():
            return (encode_answer(record.prompt, record.completion, template),)
        case Text():
            return (_plain_text_encoder(template).encode(record.content),)


def encode_answer(prompt: Conversation, answer: str, template: Template) -> Encoded:
    """Prompt and answer as one sequence; only this answer is trained, not those within the prompt."""
    whole = template.encode(prompt.add("assistant", answer))
    # A prompt's ids are always a prefix of the ids of prompt and answer.
    context = len(template.prompt(prompt))
    return Encoded(whole.ids, (False,) * context + whole.trained[context:])


def count_scored_bytes(text: str, sequence: Encoded, template: Template) -> int:
    """UTF-8 bytes of a document, or of a window of one, that its loss is of.

    These are all bytes unless the sequence begins with a token of the text itself, which is predicted from nothing.
    """
    start = _plain_text_encoder(template).character_ends(text, [0])[0] if text and sequence.trained[0] else 0
    return len(text[start:].encode())


@lru_cache(maxsize=2)
def _plain_text_encoder(template: Template) -> PlainTextEncoder:
    return PlainTextEncoder(template)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The sequences of one row, each no longer than the limit.

    Args:
        fit: what became of it.
        sequences: none if the row is left out.
        parts: for each window of a conversation or text the [start, end) of its messages, without the system message, or of
            its characters; (0, 0) for a sequence that is no window.
        tokens: of the whole row.
        lost_end: whether the end of an answer that is trained was cut off.
        reason: why it is left out.
    """

    fit: Fit
    sequences: Sequences = ()
    parts: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    lost_end: bool = False
    reason: str | None = None

    @property
    def examples(self) -> int:
        """How many examples it becomes: one for each window, else one."""
        return sum(end > 0 for _, end in self.parts) or int(bool(self.sequences))

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(map(_count_trained, self.sequences))


def cut_record(record: Record, start: int, end: int) -> Record:
    """The part of a conversation or text that an `EncodedRow` names."""
    match record:
        case Conversation(messages) if messages[0].role == "system":
            return Conversation((messages[0], *messages[1 + start : 1 + end]))
        case Conversation(messages):
            return Conversation(messages[start:end])
        case Text(content):
            return Text(content[start:end])
        case _:
            raise AssertionError(f"a {type(record).__name__} has no parts")


def _has_no_system(record: Record) -> bool:
    """Whether the template's system message leads the record."""
    match record:
        case Conversation(messages) | Preference(Conversation(messages)) | Feedback(Conversation(messages)):
            return messages[0].role != "system"
        case Text():
            return False


def _count_trained(sequence: Encoded) -> int:
    return sum(sequence.trained[1:])


class RowEncoder:
    """Encodes records as the recipe's settings say.

    Args:
        template: makes ids and masks.
        data: `max_length`, `overlong` and `train_on` are used.

    Raises DataError for conversations for which the template's system message leaves no room.
    """

    def __init__(self, template: Template, data: Data) -> None:
        self.template = template
        self.limit, self.overlong, self.train_on = data.max_length, data.overlong, data.train_on
        self._least_prompt = 0
        if template.system is not None:
            self._least_prompt = len(template.prompt(Conversation.from_turns(("user", "?"))))

    def encode_all(self, records: Iterable[Record]) -> Iterator[EncodedRow]:
        """Each record's sequences. Conversations are encoded in one batch, which is faster."""
        records = [self._select_answers(record) for record in records]
        if self._least_prompt >= self.limit and any(map(_has_no_system, records)):
            raise DataError(
                f"with the system message the shortest prompt has {self._least_prompt} tokens, and an example with its "
                f"answer may have {self.limit}",
                where="data.max_length, data.system",
                hint="raise `max_length` or shorten the system message",
            )
        conversations = [record for record in records if isinstance(record, Conversation)]
        encoded = iter(self.template.encode_batch(conversations))
        for record in records:
            try:
                if isinstance(record, Conversation):
                    whole = next(encoded)
                    if isinstance(whole, TemplateError):
                        raise whole
                    row = self._fit_conversation(record, whole)
                elif isinstance(record, Text):
                    row = self._fit_text(record.content)
                else:
                    row = self._fit_answers(encode_record(record, self.template))
            except TemplateError as error:
                yield EncodedRow("dropped", reason=error.what)
            else:
                yield self._refuse_untrained(row)

    def _select_answers(self, record: Record) -> Record:
        if self.train_on == "answers" or not isinstance(record, Conversation):
            return record
        earlier = (replace(message, trained=message.role != "assistant") for message in record.messages[:-1])
        return Conversation((*earlier, record.messages[-1]))

    def _refuse_untrained(self, row: EncodedRow) -> EncodedRow:
        """The row, or one that is fully masked if one of its answers, or all of its windows, have no trained token."""
        if row.reason is not None or (row.sequences and all(map(_count_trained, row.sequences))):
            return row
        cut = f"none of the first {self.limit} tokens" if row.fit == "truncated" else "none of its tokens"
        reason = f"fully masked: {cut} is trained"
        return EncodedRow("fully masked", tokens=row.tokens, lost_end=row.lost_end, reason=reason)

    def _too_long(self, tokens: int) -> EncodedRow:
        return EncodedRow("dropped", tokens=tokens, reason=f"longer than {self.limit} tokens")

    def _fit_text(self, text: str) -> EncodedRow:
        encoder = _plain_text_encoder(self.template)
        whole = encoder.encode(text)
        windows = split_windows(whole, self.limit)
        if len(windows) == 1:
            return EncodedRow("kept", windows, ((0, 0),), len(whole.ids))
        borders = [0, *encoder.character_ends(text, [i * (self.limit - 1) for i in range(1, len(windows))]), len(text)]
        parts = tuple(pairwise(borders))
        return EncodedRow("split", windows, parts, len(whole.ids))

    def _fit_answers(self, sequences: Sequences) -> EncodedRow:
        """Of a preference or feedback: each answer with its prompt."""
        tokens = sum(len(sequence.ids) for sequence in sequences)
        if all(len(sequence.ids) <= self.limit for sequence in sequences):
            row = EncodedRow("kept", sequences, ((0, 0),) * len(sequences), tokens)
        elif self.overlong == "truncate":
            row = self._truncate(sequences, tokens)
        else:
            return self._too_long(tokens)
        if (
            len(sequences) == 2
            and row.sequences[0].ids == row.sequences[1].ids
            and all(map(_count_trained, row.sequences))
        ):
            cut = f"the first {self.limit} tokens of" if row.fit == "truncated" else "the tokens of"
            return EncodedRow("dropped", tokens=tokens, reason=f"{cut} chosen and rejected are the same")
        return row

    def _truncate(self, sequences: Sequences, tokens: int) -> EncodedRow:
        cut = tuple(Encoded(s.ids[: self.limit], s.trained[: self.limit]) for s in sequences)
        lost_end = any(any(s.trained[self.limit :]) for s in sequences)
        return EncodedRow("truncated", cut, ((0, 0),) * len(cut), tokens, lost_end)

    def _fit_conversation(self, conversation: Conversation, whole: Encoded) -> EncodedRow:
        tokens, turns = len(whole.ids), len(conversation.messages)
        turns -= conversation.messages[0].role == "system"
        if tokens <= self.limit:
            return EncodedRow("kept", (whole,), ((0, 0),), tokens)
        if self.overlong == "drop" or (self.overlong == "split" and turns <= 2):
            return self._too_long(tokens)
        if self.train_on == "last_answer" and self.overlong == "split":
            return self._fit_last_answer(conversation, turns, tokens)
        windows = self._windows(conversation, turns)
        if self.overlong == "truncate":
            first = next(windows, None)
            if first is None or first[0][0] > 0:  # not even the first exchange fits: its answer is cut
                return self._truncate((whole,), tokens)
            return EncodedRow("truncated", (first[1],), ((0, 0),), tokens)
        kept = list(windows)
        covered = sum(end - start for (start, end), _ in kept)
        if not kept:
            return self._too_long(tokens)
        kept = [window for window in kept if _count_trained(window[1])]
        fit: Fit = "split" if covered == turns else "trimmed"
        return EncodedRow(fit, tuple(w for _, w in kept), tuple(part for part, _ in kept), tokens)

    def _fit_last_answer(self, conversation: Conversation, turns: int, tokens: int) -> EncodedRow:
        """The last exchange with as many before it as fit."""
        for start in range(2, turns, 2):
            part = cut_record(conversation, start, turns)
            assert isinstance(part, Conversation)
            window = self.template.encode(part)
            if len(window.ids) <= self.limit:
                return EncodedRow("trimmed", (window,), ((start, turns),), tokens)
        return self._too_long(tokens)

    def _windows(self, conversation: Conversation, turns: int) -> Iterator[tuple[tuple[int, int], Encoded]]:
        """([start, end) of its turns, its ids) of each window: as many whole exchanges as fit; one that does not fit by itself
        is in none."""

        def encode(start: int, end: int) -> Encoded:
            part = cut_record(conversation, start, end)
            assert isinstance(part, Conversation)
            return self.template.encode(part)

        alone = [len(encode(start, start + 2).ids) for start in range(0, turns, 2)]
        # What the exchanges of a window share: the system message and what the template puts before the first turn.
        shared = max(0, alone[0] + alone[1] - len(encode(0, 4).ids)) if len(alone) > 1 else 0
        start = 0
        while start < turns:
            end, length = start + 2, alone[start // 2]
            while end < turns and length + alone[end // 2] - shared <= self.limit:
                length += alone[end // 2] - shared
                end += 2
            # The sum is an estimate: tokens may differ where exchanges meet.
            window = encode(start, end)
            while len(window.ids) > self.limit and end > start + 2:
                end -= 2
                window = encode(start, end)
            if len(window.ids) <= self.limit:
                yield (start, end), window
            start = end


def encode_rows(records: Iterable[Record], template: Template, data: Data) -> dict[str, Column]:
    """Encode rows as `RowEncoder` does.

    Returns these columns of a `RowStore`:
        ids, trained: of each row the lists of its sequences.
        parts: of each row the [start, end) of each sequence, as in `EncodedRow`.
        tokens: of the whole row.
        trained_tokens: tokens that count in the loss.
        fit: index into `FITS`.
        examples: how many examples each row becomes.
        lost_end: whether the end of a trained answer was cut off.
        reason: why the row is left out, or empty.

    Raises ModelError if a row has a token that the model's embedding does not have, and DataError as `RowEncoder`.
    """
    import pyarrow as pa

    rows = list(RowEncoder(template, data).encode_all(records))
    sequences = [sequence for row in rows for sequence in row.sequences]
    parts = np.array([part for row in rows for part in row.parts], np.int64).reshape(-1, 2)
    token_bounds = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])
    bounds = np.cumsum([0, *(len(row.sequences) for row in rows)])
    ids = np.fromiter(chain.from_iterable(s.ids for s in sequences), np.uint32, int(token_bounds[-1]))
    template.check_embedded([int(ids.max(initial=0))], "a row to train on or to evaluate")
    trained = np.fromiter(chain.from_iterable(s.trained for s in sequences), np.bool_, len(ids))
    return {
        "ids": list_column(list_column(ids, token_bounds), bounds),
        "trained": list_column(list_column(trained, token_bounds), bounds),
        "parts": list_column(parts, bounds),
        "tokens": np.array([row.tokens for row in rows], np.int64),
        "trained_tokens": np.array([row.trained_tokens for row in rows], np.int64),
        "fit": np.array([FITS.index(row.fit) for row in rows], np.int8),
        "examples": np.array([row.examples for row in rows], np.int64),
        "lost_end": np.array([row.lost_end for row in rows], np.bool_),
        "reason": pa.array([row.reason or "" for row in rows], pa.string()),
    }
