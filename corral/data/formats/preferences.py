"""Reads judged answers: pairs of a better and a worse one (Preference), and single ones with a score (Feedback)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from corral.data.formats.chat_messages import (
    add_system_column,
    is_hh,
    parse_json_list,
    read_hh_dialogue,
    read_messages,
    sharegpt,
)
from corral.data.formats.context_columns import check_context_columns, is_empty, refuse_columns
from corral.data.formats.fields import FormatError, describe_type, find_column, nonblank_text
from corral.data.formats.prompt_response import COMPLETION_COLUMNS, read_answer, read_prompt
from corral.data.formats.scores import SCORE_COLUMNS, Scale, infer_scale
from corral.data.formats.turns import TurnOrderError, check_turn_order
from corral.messages import Conversation, Feedback, Message, Preference

PREFERENCE_PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", "conversations", "conversation")
FEEDBACK_PROMPT_COLUMNS = ("prompt", "query", "question", "instruction")
CHOSEN_COLUMNS = ("chosen", "chosen_response")
REJECTED_COLUMNS = ("rejected", "rejected_response")


@check_context_columns
def preference(row: Mapping[str, Any]) -> Preference:
    """A pair of answers, in any of the usual forms:

    - `prompt`, `chosen`, `rejected`, each a text or a list of messages (TRL, Orca pairs: `question`; with `system`);
    - `chosen` and `rejected` as lists of messages that begin alike (UltraFeedback): the shared messages are the prompt;
    - `chosen` and `rejected` as dialogues "Human: … Assistant: …" that begin alike (HH; Bai et al. 2022);
    - `chosen` and `rejected` as texts that begin alike: the shared words are the prompt.

    Raises FormatError if the row has another form, the answers are the same, or they differ before the last message.
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
        better, worse = read_messages(chosen, chosen_name), read_messages(rejected, rejected_name)
        return _split_last_answer(better, worse, row, chosen_name)
    if is_hh(chosen) and is_hh(rejected):
        better, worse = read_hh_dialogue(chosen, chosen_name), read_hh_dialogue(rejected, rejected_name)
        return _split_last_answer(better, worse, row, chosen_name)
    prompt_name = next((name for name in PREFERENCE_PROMPT_COLUMNS if row.get(name) is not None), None)
    if prompt_name is None:
        refuse_columns(row, ("context", "history"), chosen_name)
    if prompt_name is None and isinstance(chosen, str) and isinstance(rejected, str):
        return _split_shared_words(nonblank_text(chosen, chosen_name), nonblank_text(rejected, rejected_name), row)
    better, worse = read_answer(chosen_name, chosen), read_answer(rejected_name, rejected)
    if prompt_name is None:
        raise FormatError(f"no `prompt`, and {chosen_name} does not begin with one")
    prompt = read_prompt(prompt_name, row[prompt_name], row)
    return Preference(prompt, *_require_different(better, worse))


def chosen_answer(row: Mapping[str, Any]) -> Conversation:
    """The prompt and the better answer of a pair, as a conversation to fine-tune on. Raises as `preference`."""
    pair = preference(row)
    return pair.prompt.add("assistant", pair.chosen)


def _split_shared_words(chosen: str, rejected: str, row: Mapping[str, Any]) -> Preference:
    """The pair of two texts that both begin with the prompt."""
    _require_different(chosen, rejected)
    # The texts may part within a word: the prompt ends before that word's space.
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  (character by character, as it should)
    last_word = re.search(r"\s\S*\Z", common)
    shared = common[: last_word.start()] if last_word else ""
    if not shared.strip():
        raise FormatError("no `prompt`, and chosen and rejected do not begin alike")
    prompt = Conversation(tuple(add_system_column([Message("user", shared)], row)))
    return Preference(
        prompt, nonblank_text(chosen[len(shared) :], "chosen"), nonblank_text(rejected[len(shared) :], "rejected")
    )


def _split_last_answer(
    chosen: list[Message], rejected: list[Message], row: Mapping[str, Any], chosen_name: str
) -> Preference:
    """The pair of two conversations that differ in their last message only."""
    check_turn_order(chosen)
    check_turn_order(rejected)
    refuse_columns(row, ("context", "history"), chosen_name)
    contents = {turn.content.strip() for turn in chosen[:-1]}
    for name in PREFERENCE_PROMPT_COLUMNS:
        if not is_empty(value := row.get(name)):
            asked = read_prompt(name, value, {}).messages
            if not contents.issuperset(turn.content.strip() for turn in asked):
                refuse_columns(row, (name,), chosen_name)
    if not (chosen[-1].trained and rejected[-1].trained):
        raise FormatError("an answer is not to be trained on, as it says itself")
    if chosen[:-1] != rejected[:-1]:
        raise FormatError("chosen and rejected differ before the last turn: they answer different prompts")
    prompt = Conversation(tuple(add_system_column(chosen[:-1], row)))
    return Preference(prompt, *_require_different(chosen[-1].content, rejected[-1].content))


def _require_different(chosen: str, rejected: str) -> tuple[str, str]:
    if chosen == rejected:
        raise FormatError("chosen and rejected are the same")
    return chosen, rejected


@check_context_columns
def feedback(row: Mapping[str, Any], scale: Scale | None = None) -> Feedback:
    """`prompt`, `completion` (or `response`, `output`), and `label` (true or false, in their words too; KTO, Ethayarajh et al.
    2024, arXiv 2402.01306) or `score`; or a list of messages, the last of them judged by `label` or `kto_tag`.

    Args:
        row: the row.
        scale: of the scores; by default 0 to 1.

    Raises:
        ContradictionError: the score is outside a scale that was inferred.
        FormatError: the row has another form.
    """
    name, value = find_column(row, SCORE_COLUMNS)
    score = (scale or Scale()).normalise(value, name)
    if set(COMPLETION_COLUMNS).isdisjoint(row):
        return _judged_conversation(row, score)
    prompt = read_prompt(*find_column(row, FEEDBACK_PROMPT_COLUMNS), row)
    return Feedback(prompt, read_answer(*find_column(row, COMPLETION_COLUMNS)), score)


def _judged_conversation(row: Mapping[str, Any], score: float) -> Feedback:
    try:
        conversation = sharegpt(row)
    except TurnOrderError as error:
        # A mended conversation might end with another answer than the one that is judged.
        raise FormatError(error.reason) from None
    if not conversation.messages[-1].trained:
        raise FormatError("the answer is judged, and not to be trained on, as it says itself")
    return Feedback(*conversation.split_answer(), score)


def infer_feedback_scale(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[Scale, str]:
    """(the scale of a source's judgements, a note on it), inferred from its first rows. Raises DataError."""
    scores = [find_column(row, SCORE_COLUMNS) for row in rows if not set(SCORE_COLUMNS).isdisjoint(row)]
    name = next((name for name, value in scores if value is not None), SCORE_COLUMNS[0])
    unjudged = {"prompt": "prompt-completion", "query": "prompt-completion", "instruction": "alpaca"}
    format_name = next((unjudged[column] for column in unjudged if any(column in row for row in rows)), None)
    advice = f'; or train on every answer, whatever its `{name}`: format = "{format_name}"' if format_name else ""
    return infer_scale([value for _, value in scores], name, where, advice)
