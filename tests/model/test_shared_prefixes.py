"""What sequences begin with in common is computed once, and they get what they get whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.model.adapters import attach
from corral.model.full_finetuning import train_all_weights
from corral.model.loading import load_model
from corral.model.packed_forward import target_logprobs
from corral.model.quantisation import Quantization
from corral.model.shared_prefixes import pack_tokens
from corral.recipe import Lora
from tests.conftest import make_tiny_model
from tests.model.tiny import assert_gradients_equal, fill_lora_b, gradients, random_sequences

_SYSTEM, _SHORT, _LONG, *_ANSWERS = random_sequences(9, 30, 150, 1, 40, 17, 140, 60)
# Two pairs whose prompts begin alike, one of them longer than two blocks of attention; answers that begin alike; an answer
# that another begins with; a sequence that is there twice; and one that shares nothing.
SEQUENCES = [
    [*_SYSTEM, *_SHORT, *_ANSWERS[1]],
    [*_SYSTEM, *_SHORT, *_ANSWERS[1][:5], *_ANSWERS[2]],
    [*_SYSTEM, *_LONG, *_LONG, *_ANSWERS[3]],
    [*_SYSTEM, *_LONG, *_LONG, *_ANSWERS[0]],
    [*_SYSTEM, *_LONG, *_LONG, *_ANSWERS[3][:70]],
    [*_SYSTEM, *_SHORT, *_ANSWERS[1]],
    _ANSWERS[4],
]
POSITIONS = [range(20, 79), range(39, 61), range(309, 449), [309], range(1, 379), range(1, 79), range(1, 60)]


def test_every_sequence_is_found_in_the_pack_at_its_positions() -> None:
    pack = pack_tokens(SEQUENCES, share=True)
    for sequence, rows in zip(SEQUENCES, pack.rows, strict=True):
        assert [pack.ids[row] for row in rows] == sequence
        assert [pack.positions[row] for row in rows] == [*range(len(sequence))]
    assert sum(pack.lengths) == len(pack.ids)
    starts = [sum(pack.lengths[:i]) for i in range(len(pack.lengths))]
    assert all(max(prefix, default=-1) < start for prefix, start in zip(pack.prefixes, starts, strict=True))


def test_no_beginning_is_computed_twice() -> None:
    beginnings = {tuple(sequence[: i + 1]) for sequence in SEQUENCES for i in range(len(sequence))}
    assert len(pack_tokens(SEQUENCES, share=True).ids) == len(beginnings) < sum(map(len, SEQUENCES)) / 2


def test_whole_sequences_lie_end_to_end() -> None:
    pack = pack_tokens(SEQUENCES, share=False)
    assert pack.ids == [token for sequence in SEQUENCES for token in sequence]
    assert pack.lengths == [len(sequence) for sequence in SEQUENCES]
    assert not any(pack.prefixes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixes")
    make_tiny_model(300).save_pretrained(folder)
    return folder


def open_model(folder: Path, kind: str) -> Any:
    """What a stage trains, with adapters that change it."""
    if kind == "full":
        return train_all_weights(load_model(folder), torch.float32)
    quantization = Quantization("nf4") if kind == "nf4" else None
    model = load_model(folder, dtype="bfloat16" if kind == "bfloat16" else "float32", quantization=quantization)
    lora = Lora(rank=4, alpha=8, targets="all-linear", dora=kind == "dora", dropout=0.5 if kind == "dropout" else 0.0)
    return fill_lora_b(attach(model, lora, seed=0), 0.1)


def logprobs_and_gradients(model: Any, *, share: bool) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs: Sequence[Tensor] = target_logprobs(model, SEQUENCES, POSITIONS, share)
    model.zero_grad()
    # Weights of either sign that differ, so that what the sequences send into a prefix does not add up to nothing.
    torch.stack([one.sum() * (-0.7) ** i for i, one in enumerate(logprobs)]).sum().backward()
    return torch.cat(list(logprobs)).detach(), gradients(model)


@pytest.mark.parametrize("kind", ["lora", "lora, checkpointed", "dora", "nf4", "full", "bfloat16"])
def test_log_probs_and_gradients_are_those_of_whole_sequences(kind: str, folder: Path) -> None:
    model = open_model(folder, kind).train()
    if "checkpointed" in kind:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, expected_gradients = logprobs_and_gradients(model, share=False)
    actual, actual_gradients = logprobs_and_gradients(model, share=True)
    low = kind == "bfloat16"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1 if low else 2e-5)
    assert_gradients_equal(actual_gradients, expected_gradients, rtol=0.1 if low else 1e-3, atol=0.1 if low else 1e-4)
    assert any(not torch.equal(one, expected_gradients[name]) for name, one in actual_gradients.items())


def test_with_dropout_on_adapters_a_prompt_drops_the_same_inputs_for_both_answers(folder: Path) -> None:
    model = open_model(folder, "dropout").train()
    twice = [SEQUENCES[0], SEQUENCES[0]]
    first, second = target_logprobs(model, twice, [range(1, 79)] * 2, True)
    assert torch.equal(first, second)
    first, second = target_logprobs(model, twice, [range(1, 79)] * 2, False)
    assert not torch.allclose(first, second, atol=1e-3)
