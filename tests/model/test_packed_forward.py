"""A sequence in a pack gets what it gets alone, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from corral.model import packed_forward
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    assert_gradients_equal,
    packed_losses_and_gradients,
    plain_logprobs,
    plain_losses_and_gradients,
    random_sequences,
)

LENGTHS = (7, 31, 2, 60, 1)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_pack_gives_each_sequence_what_it_gets_alone(rope: dict[str, Any] | None, tied: bool) -> None:
    changes = {"rope_parameters": rope} if rope else {}
    model = make_tiny_model(300, tie_word_embeddings=tied, **changes)
    rows = random_sequences(*LENGTHS)
    together = packed_forward.score(model, rows, [1] * len(rows))
    for row, scores in zip(rows, together, strict=True):
        assert scores == pytest.approx(plain_logprobs(model, row).tolist(), abs=2e-5) if len(row) > 1 else scores == []


def test_another_sequence_in_the_pack_changes_nothing() -> None:
    model = make_tiny_model(300)
    (row,) = random_sequences(31)
    first = packed_forward.score(model, [[5] * 9, row], [1, 1])[1]
    second = packed_forward.score(model, [[250, 3] * 20, row], [1, 1])[1]
    assert first == pytest.approx(second, abs=1e-6)


def test_the_most_likely_tokens_are_those_of_each_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(300)
    rows, starts = random_sequences(*LENGTHS), [1, 20, 2, 3, 1]
    monkeypatch.setattr(packed_forward, "_LOGITS", 7 * 300)  # several parts for each sequence
    scored = packed_forward.score_top(model, rows, starts, 4)
    plain = packed_forward.score(model, rows, starts)
    for row, start, scores, values in zip(rows, starts, scored, plain, strict=True):
        assert [value for value, _ in scores] == pytest.approx(values, abs=2e-5)
        with torch.no_grad():
            best = model(torch.tensor([row])).logits[0, start - 1 : -1].log_softmax(-1).topk(4)
        assert [[id_ for id_, _ in top] for _, top in scores] == best.indices.tolist()
        assert [value for _, top in scores for _, value in top] == pytest.approx(
            best.values.flatten().tolist(), abs=2e-5
        )


def test_gradients_of_a_pack_are_those_of_its_sequences_alone() -> None:
    model = make_tiny_model(300)
    rows = random_sequences(*LENGTHS[:-1])

    _, together = packed_losses_and_gradients(model, rows)
    model.set_attn_implementation("eager")
    _, alone = plain_losses_and_gradients(model, rows)
    assert_gradients_equal(together, alone, atol=1e-4)


def test_generation_still_works_on_a_model_that_was_packed() -> None:
    model = make_tiny_model(300)
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    packed_forward.score(model, [[1, 2, 3]], [1])
    after = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert before.tolist() == after.tolist()
    assert isinstance(model.config, LlamaConfig)
