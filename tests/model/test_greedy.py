"""Greedy answers of several prompts at once are those that each prompt gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corral.model.greedy import GreedyAnswer, answer_greedily
from tests.conftest import make_tiny_model
from tests.model.tiny import ATTENTION, random_sequences, with_adapter

PROMPTS = random_sequences(5, 17, 9, 1, 30)
TOKENS = 12


def answer_alone(model: Any, prompt: list[int], stop_ids: set[int]) -> GreedyAnswer:
    """By the model's own forward over the whole text, token by token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TOKENS):
            id_ = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if id_ in stop_ids:
                return GreedyAnswer(tuple(ids[len(prompt) :]), ended=True)
            ids.append(id_)
    return GreedyAnswer(tuple(ids[len(prompt) :]), ended=False)


@pytest.mark.parametrize("adapted", [False, True])
def test_prompts_of_any_length_are_answered_as_each_alone(adapted: bool) -> None:
    model = with_adapter(ATTENTION).eval() if adapted else make_tiny_model(300)
    long = [answer_alone(model, prompt, set()) for prompt in PROMPTS]
    stop_ids = {long[0].ids[4], long[1].ids[7]}  # some end early, and leave the batch
    expected = [answer_alone(model, prompt, stop_ids) for prompt in PROMPTS]
    assert {answer.ended for answer in expected} == {True, False}
    assert answer_greedily(model, PROMPTS, stop_ids, TOKENS) == expected
