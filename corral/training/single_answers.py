"""The answers that objectives of single answers train on: those with a score, and both answers of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from corral.data.example_store import Example, SequenceFigures, SizedExamples
from corral.data.mixture import equal_groups
from corral.messages import Feedback, Preference, record_key
from corral.training.reference_logprobs import rows_digest

CHOSEN_SCORE, REJECTED_SCORE = 1.0, 0.0


class SingleAnswers(SizedExamples):
    """Examples of one answer with a score each: scored rows as they are; of a pair the chosen answer with score 1 and the
    rejected one with 0.

    Answers of pairs whose tokens, those of the prompt included, are the same count once, and not at all if a scored row has
    them too: its score is the user's own. An answer that is chosen in one pair and rejected in another is neither good nor bad
    and is left out.

    Attributes:
        contradictory: how many different answers are left out as they are chosen in one pair and rejected in another.
        starts: tokens of each example before its answer. [examples]
        prompts: for each example the number of the first that has the same prompt. [examples]

    Args:
        rows: of pairs and scored answers.
        figures: of their sequences.
    """

    def __init__(self, rows: Sequence[Example], figures: SequenceFigures) -> None:
        self._rows = rows
        is_pair = np.bincount(figures.example, minlength=len(rows))[figures.example] == 2
        contents = equal_groups(figures.content)
        scored, chosen, rejected = (
            np.bincount(contents, weights=which, minlength=len(contents))[contents] > 0
            for which in (~is_pair, is_pair & (figures.place == 0), is_pair & (figures.place == 1))
        )
        contradictory = chosen & rejected & ~scored
        self.contradictory = len(np.unique(contents[contradictory]))
        # Repeats of a pair are wanted; the same answer in another pair is not.
        is_first = figures.stored == figures.stored[contents]
        kept = np.flatnonzero(~is_pair | (is_first & ~contradictory & ~scored))
        self._example, self._place, self._is_pair = figures.example[kept], figures.place[kept], is_pair[kept]
        self.lengths, self.trained_tokens, self.starts = (
            column[kept] for column in (figures.length, figures.trained, figures.start)
        )
        self.prompts = equal_groups(figures.prompt[kept])

    def __len__(self) -> int:
        return len(self._example)

    def example(self, index: int) -> Example:
        """One answer."""
        row, place = self._rows[int(self._example[index])], int(self._place[index])
        if not isinstance(row.record, Preference):
            return row
        answer, score = (
            (row.record.chosen, CHOSEN_SCORE),
            (row.record.rejected, REJECTED_SCORE),
        )[place]
        record = Feedback(row.record.prompt, answer, score)
        return replace(row, key=record_key(record), sequences=(row.sequences[place],), record=record)

    @cached_property
    def digest(self) -> str:
        """That of the rows."""
        return rows_digest(self._rows)
