"""A sequence in a pack gets what it gets alone, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from corral.model import packed_forward
from tests.conftest import make_tiny_model


def plain_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def sequences(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (7, 31, 2, 60, 1)]


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
    rows = sequences(300)
    together = packed_forward.score(model, rows, [1] * len(rows))
    for row, scores in zip(rows, together, strict=True):
        assert scores == pytest.approx(plain_logprobs(model, row).tolist(), abs=2e-5) if len(row) > 1 else scores == []


def test_another_sequence_in_the_pack_changes_nothing() -> None:
    model = make_tiny_model(300)
    row = sequences(300)[1]
    first = packed_forward.score(model, [[5] * 9, row], [1, 1])[1]
    second = packed_forward.score(model, [[250, 3] * 20, row], [1, 1])[1]
    assert first == pytest.approx(second, abs=1e-6)


def test_gradients_of_a_pack_are_the_sum_of_those_alone() -> None:
    model = make_tiny_model(300)
    rows = [r for r in sequences(300) if len(r) > 1]

    def gradients(work: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        work().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    together = gradients(
        lambda: torch.cat(packed_forward.target_logprobs(model, rows, [range(1, len(r)) for r in rows])).sum()
    )
    model.set_attn_implementation("eager")
    alone = gradients(lambda: torch.stack([plain_logprobs(model, r).sum() for r in rows]).sum())
    for name, expected in alone.items():
        assert torch.allclose(together[name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()), name


def test_generation_still_works_on_a_model_that_was_packed() -> None:
    model = make_tiny_model(300)
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    packed_forward.score(model, [[1, 2, 3]], [1])
    after = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert before.tolist() == after.tolist()
    assert isinstance(model.config, LlamaConfig)
