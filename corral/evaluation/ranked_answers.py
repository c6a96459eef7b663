"""Test rows that rank answers: preferences, and answers with scores.

The rows about one prompt are one row of the evaluation, because they are not independent: its different answers, and the pairs
of them of which one is better. So each answer is scored once, in however many pairs it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from corral.data.example_store import ExampleStore
from corral.evaluation.inference import Item, RankedAnswers
from corral.messages import Conversation, Feedback, Message, Preference, record_key

GOOD_SCORE = 0.5
"""An answer with at least this score is good by itself."""


def select_ranked_answers(test: ExampleStore, count: int) -> list[RankedAnswers]:
    """The prompts whose rows rank answers, in the order of their first rows.

    Args:
        test: prepared rows.
        count: most rows: prompts are taken with all their rows as long as these fit; of the first one, so many rows.
    """
    chosen: list[RankedAnswers] = []
    for prompt, records in _by_prompt(test).items():
        if chosen and len(records) > count:
            break
        if pairs := _rank(records[:count]):
            chosen.append(_ranked_answers(prompt, pairs))
            count -= len(records)
    return chosen


def count_ranked_prompts(test: ExampleStore) -> int:
    """How many prompts have rows that rank answers."""
    return sum(map(_ranks, _by_prompt(test).values()))


def good_answers(test: ExampleStore) -> Iterator[Item]:
    """Chosen answers, and those with a score of at least `GOOD_SCORE`, as conversations of which only this answer is trained;
    without copies. Those to the same prompt have the same `group`."""
    seen: set[Conversation] = set()
    for record in _records(test):
        if isinstance(record, Feedback) and record.score < GOOD_SCORE:
            continue
        answer = record.chosen if isinstance(record, Preference) else record.completion
        context = tuple(replace(m, trained=m.role != "assistant") for m in record.prompt.messages)
        conversation = Conversation((*context, Message("assistant", answer)))
        if conversation not in seen:
            seen.add(conversation)
            yield Item(record_key(conversation), conversation, group=record_key(record.prompt)[:16])


def first_of_groups(items: Iterator[Item]) -> Iterator[Item]:
    """The first item of each group."""
    seen: set[str] = set()
    for item in items:
        if item.group not in seen:
            seen.add(item.group)
            yield item


def _records(test: ExampleStore) -> Iterator[Preference | Feedback]:
    for example in test.select(types=(Preference, Feedback)):
        assert isinstance(example.record, Preference | Feedback)
        yield example.record


def _by_prompt(test: ExampleStore) -> dict[Conversation, list[Preference | Feedback]]:
    by_prompt: dict[Conversation, list[Preference | Feedback]] = {}
    for record in _records(test):
        by_prompt.setdefault(record.prompt, []).append(record)
    return by_prompt


def _rank(records: Sequence[Preference | Feedback]) -> set[tuple[str, str]]:
    """(better, worse) of each pair that rows about one prompt tell."""
    pairs = {(record.chosen, record.rejected) for record in records if isinstance(record, Preference)}
    scored = [record for record in records if isinstance(record, Feedback)]
    for one, other in combinations(sorted(scored, key=lambda record: -record.score), 2):
        if one.score > other.score:
            pairs.add((one.completion, other.completion))
    return {(better, worse) for better, worse in pairs if better != worse}


def _ranks(records: Sequence[Preference | Feedback]) -> bool:
    """Whether rows about one prompt tell a pair, without the pairs, which may be millions."""
    scored = [record for record in records if isinstance(record, Feedback)]
    # With two scores and two answers, two rows differ in both.
    different = (len({record.score for record in scored}), len({record.completion for record in scored}))
    return min(different) > 1 or any(isinstance(r, Preference) and r.chosen != r.rejected for r in records)


def _ranked_answers(prompt: Conversation, pairs: set[tuple[str, str]]) -> RankedAnswers:
    answers = sorted({answer for pair in pairs for answer in pair})
    numbers = {answer: number for number, answer in enumerate(answers)}
    indices = tuple(sorted((numbers[better], numbers[worse]) for better, worse in pairs))
    content = json.dumps([prompt.to_json(), answers, indices])
    return RankedAnswers(hashlib.sha256(content.encode()).hexdigest(), prompt, tuple(answers), indices)
