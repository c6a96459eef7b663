"""What rows say of a vote."""

from __future__ import annotations

from corral.answering.answerer import Answer
from corral.answering.consensus import Candidate, Consensus, Method
from corral.answering.vote_fields import vote_fields
from corral.engines.base import Completion

TEXTS = ("Answer: 4", "four it is", "Answer: 4", "")


def answer(method: Method | None) -> Answer:
    """Of four choices, the last was cancelled."""
    ballot = Consensus(method or "majority").ballot(4)
    for place, text in enumerate(TEXTS[:3]):
        ballot.add(place, Candidate(text, -0.5))
    finishes = ("stop", "length", "stop", "cancelled")
    done = tuple(Completion((5,), None, finish) for finish in finishes)
    return Answer(TEXTS, done, 3, vote=ballot.vote() if method else None)


def test_all_candidates_are_told_with_what_was_counted() -> None:
    assert vote_fields(answer("majority")) == {
        "candidates": list(TEXTS),
        "finishes": ["stop", "length", "stop", "cancelled"],
        "votes": [1.0, 0.0, 1.0, None],
        "results": ["4", None, "4", None],
        "winner": 0,
    }


def test_nothing_is_said_to_be_counted_where_texts_were_compared_and_nothing_at_all_without_a_vote() -> None:
    told = vote_fields(answer("rouge-l"))
    assert told.keys() == {"candidates", "finishes", "votes", "winner"}
    assert told["votes"][3] is None
    assert vote_fields(answer(None)) == {}
