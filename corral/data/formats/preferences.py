"""Formats of judged answers: pairs of a better and a worse one (Preference), and single ones with a score (Feedback).

Does not know what an objective makes of a judgement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from corral.data.formats.chat_messages import add_system_column, is_hh, parse_json_list, read_hh_dialogue, read_messages
from corral.data.formats.fields import FormatError, check_turn_order, describe_type, find_column, nonblank_text
from corral.data.formats.prompt_response import COMPLETION_COLUMNS, read_answer, read_prompt
from corral.data.formats.scores import Scale, infer_scale
from corral.messages import Conversation, Feedback, Message, Preference

PREFERENCE_PROMPT_COLUMNS = ("prompt", "question", "instruction", "conversations", "conversation")
FEEDBACK_PROMPT_COLUMNS = ("prompt", "query", "question", "instruction")
CHOSEN_COLUMNS = ("chosen", "chosen_response")
REJECTED_COLUMNS = ("rejected", "rejected_response")
SCORE_COLUMNS = ("label", "score")


def preference(row: Mapping[str, Any]) -> Preference:
    """A pair of answers, in any of the usual forms:

    - `prompt`, `chosen`, `rejected`, each a text or a list of messages (TRL, Orca pairs: `question`; with `system`);
    - `chosen` and `rejected` as lists of messages that begin alike (UltraFeedback): what is alike is the prompt;
    - `chosen` and `rejected` as dialogues "Human: … Assistant: …" that begin alike (HH; Bai et al. 2022);
    - `chosen` and `rejected` as texts that begin alike: the prompt is the words they share.

    Raises:
        FormatError: otherwise; the answers are the same; or they differ before the last turn.
    """
    (chosen_name, chosen), (rejected_name, rejected) = (
        find_column(row, CHOSEN_COLUMNS),
        find_column(row, REJECTED_COLUMNS),
    )
    chosen, rejected = parse_json_list(chosen), parse_json_list(rejected)
    if isinstance(chosen, str) != isinstance(rejected, str) and chosen is not None and rejected is not None:
        raise FormatError(
            f"{chosen_name} is {describe_type(chosen)}, {rejected_name} is {describe_type(rejected)}: expected one form"
        )
    if isinstance(chosen, list) and len(cast("list[Any]", chosen)) > 1:
        return _after_prompt(read_messages(chosen, chosen_name), read_messages(rejected, rejected_name), row)
    if is_hh(chosen) and is_hh(rejected):
        return _after_prompt(read_hh_dialogue(chosen, "chosen"), read_hh_dialogue(rejected, "rejected"), row)
    asked = next((name for name in PREFERENCE_PROMPT_COLUMNS if row.get(name) is not None), None)
    if asked is None and isinstance(chosen, str) and isinstance(rejected, str):
        return _parted(nonblank_text(chosen, chosen_name), nonblank_text(rejected, rejected_name), row)
    better, worse = read_answer(chosen_name, chosen), read_answer(rejected_name, rejected)
    if asked is None:
        raise FormatError(f"no `prompt`, and {chosen_name} does not begin with one")
    prompt = read_prompt(asked, row[asked], row)
    return Preference(prompt, *_different(better, worse))


def _parted(chosen: str, rejected: str, row: Mapping[str, Any]) -> Preference:
    """The pair of two texts, each with the prompt in it."""
    _different(chosen, rejected)
    # Where they part may be within a word that only begins alike: the prompt ends before that word's space.
    common = _common_start(chosen, rejected)
    last_word = re.search(r"\s\S*\Z", common)
    shared = common[: last_word.start()] if last_word else ""
    if not shared.strip():
        raise FormatError("no `prompt`, and chosen and rejected do not begin alike")
    prompt = Conversation(tuple(add_system_column([Message("user", shared)], row)))
    return Preference(
        prompt, nonblank_text(chosen[len(shared) :], "chosen"), nonblank_text(rejected[len(shared) :], "rejected")
    )


def _common_start(one: str, other: str) -> str:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return one[:low]


def _after_prompt(chosen: list[Message], rejected: list[Message], row: Mapping[str, Any]) -> Preference:
    """The pair of two conversations that differ in their last answer only."""
    check_turn_order(chosen)
    check_turn_order(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise FormatError("chosen and rejected differ before the last turn: they answer different prompts")
    prompt = Conversation(tuple(add_system_column(chosen[:-1], row)))
    return Preference(prompt, *_different(chosen[-1].content, rejected[-1].content))


def _different(chosen: str, rejected: str) -> tuple[str, str]:
    if chosen == rejected:
        raise FormatError("chosen and rejected are the same")
    return chosen, rejected


def feedback(row: Mapping[str, Any], scale: Scale | None = None) -> Feedback:
    """`prompt`, `completion` (or `response`, `output`), and `label` (true or false, in their words too; KTO, Ethayarajh et al.
    2024, arXiv 2402.01306) or `score`.

    Args:
        row: the row.
        scale: of the scores; by default 0 to 1.

    Raises:
        ContradictionError: the score is outside a scale that nobody stated.
        FormatError: the row has another form.
    """
    prompt = read_prompt(*find_column(row, FEEDBACK_PROMPT_COLUMNS), row)
    completion = read_answer(*find_column(row, COMPLETION_COLUMNS))
    name, value = find_column(row, SCORE_COLUMNS)
    return Feedback(prompt, completion, (scale or Scale()).normalise(value, name))


def infer_feedback_scale(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[Scale, str]:
    """(the scale of a source's judgements, what to say of it), told from its first rows. Raises: DataError."""
    found = [find_column(row, SCORE_COLUMNS) for row in rows if not set(SCORE_COLUMNS).isdisjoint(row)]
    name = next((name for name, value in found if value is not None), SCORE_COLUMNS[0])
    plain = next((form for form in ("prompt", "query", "instruction") if any(form in row for row in rows)), None)
    named = {"prompt": "prompt-completion", "query": "prompt-completion", "instruction": "alpaca"}.get(plain or "")
    otherwise = f'; or train on every answer, whatever its `{name}`: format = "{named}"' if named else ""
    return infer_scale([value for _, value in found], name, where, otherwise)
