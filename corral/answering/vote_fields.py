"""How an answer was voted on, as JSON values: what rows that are kept say of it, in evaluation and in batches.

It does not know how votes are counted (consensus), nor what else a row holds.
"""

from __future__ import annotations

from typing import Any

from corral.answering.answerer import Answer


def vote_fields(answer: Answer) -> dict[str, Any]:
    """All candidates of a vote and what they came to; nothing where there was none.

    Returns: lists with a place for each candidate: `candidates` (texts, as far as they got), `finishes` ("cancelled": was not
    needed), `votes` (scores; None for one that was not needed), and `results` where results were counted (None: it has none);
    and `winner`, the place of the answer.
    """
    vote = answer.vote
    if vote is None:
        return {}
    fields: dict[str, Any] = {
        "candidates": list(answer.texts),
        "finishes": [completion.finish for completion in answer.completions],
        "votes": list(vote.scores),
    }
    if any(result is not None for result in vote.results):
        fields["results"] = list(vote.results)
    return fields | {"winner": vote.winner}
