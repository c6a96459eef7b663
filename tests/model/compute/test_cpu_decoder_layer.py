"""A decoder layer over a pack ≡ plain transformers + PEFT, sequence by sequence: log-probs, and gradients of every A and B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from corral.model.adapters import attach
from corral.model.compute import cpu_decoder_layer
from corral.model.compute.cpu_attention import Span
from corral.model.loading import load_model
from corral.model.packed_forward import target_logprobs
from corral.model.quantisation import Quantization
from corral.recipe import Lora
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    ALL_LINEAR,
    ATTENTION,
    assert_gradients_equal,
    gradients,
    plain_logprobs,
    remove_replaced_forwards,
)

LAYERS = 2
# One and two tokens, more than a block of attention, a length that is no multiple of anything; 397 tokens in all.
LENGTHS = (5, 40, 131, 1, 2, 201, 17)
_RANDOM = torch.Generator().manual_seed(3)
SEQUENCES: list[list[int]] = [torch.randint(3, 300, (n,), generator=_RANDOM).tolist() for n in LENGTHS]
# Some sequences from their second token on, some from their middle: not every position has a log-prob to weigh.
POSITIONS = [range(1 if i % 2 else (n + 1) // 2, n) for i, n in enumerate(LENGTHS)]
# Weights of either sign that differ from token to token, so that no gradient is a plain sum.
SHARES = [torch.randn(len(p), generator=_RANDOM) for p in POSITIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query heads, an untied head, and norms that scale each channel differently."""
    model = make_tiny_model(300, num_hidden_layers=LAYERS, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    folder = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths that `cpu_decoder_layer.forward` was called with, call by call."""
    calls: list[tuple[int, ...]] = []
    real = cpu_decoder_layer.forward

    def counting(layer: Any, x: Tensor, rotation: Any, sequences: tuple[Span, ...]) -> Tensor:
        calls.append(tuple(span.length for span in sequences))
        return real(layer, x, rotation, sequences)

    monkeypatch.setattr(cpu_decoder_layer, "forward", counting)
    return calls


def base(folder: Path, kind: str) -> Any:
    return load_model(folder, quantization=Quantization("nf4") if kind == "nf4" else None)


def plain_base(folder: Path, kind: str) -> Any:
    """The model with every forward as transformers and bitsandbytes have it, and the plainest attention.

    In training mode: bitsandbytes may compute NF4 in bfloat16 while evaluating.
    """
    model = remove_replaced_forwards(base(folder, kind))
    model.set_attn_implementation("eager")
    return model.train()


def trained(model: Any) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fill_adapters(model: Any) -> Any:
    """Every A and B drawn anew, none of them zero; equal for equal names and shapes."""
    generator = torch.Generator().manual_seed(4)
    for _, parameter in sorted(trained(model).items()):
        parameter.data.normal_(std=parameter.shape[1] ** -0.5 / 2, generator=generator)
    return model


def expected_logprobs(model: Any) -> list[Tensor]:
    rows = [plain_logprobs(model, ids) for ids in SEQUENCES]
    return [row[[p - 1 for p in positions]] for row, positions in zip(rows, POSITIONS, strict=True)]


def backward(logprobs: list[Tensor]) -> None:
    torch.stack([(one * share).sum() for one, share in zip(logprobs, SHARES, strict=True)]).sum().backward()


def assert_entered(entered: list[tuple[int, ...]], times: int) -> None:
    assert len(entered) == times
    # Rows of nothing may have been added to the last sequence.
    assert all(lengths[:-1] == LENGTHS[:-1] and lengths[-1] >= LENGTHS[-1] for lengths in entered)


def assert_logprobs_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "kind", "checkpointing", "rslora"),
    [
        (tuple(ATTENTION), "float32", False, False),
        (tuple(ATTENTION), "nf4", True, False),
        ("all-linear", "float32", False, True),
        ("all-linear", "float32", True, False),
        ("all-linear", "nf4", False, False),
        ("all-linear", "nf4", True, False),
        (("q_proj", "down_proj"), "float32", True, False),
        (("q_proj", "down_proj"), "nf4", False, False),
        (("k_proj", "gate_proj"), "float32", False, False),
        (("v_proj", "up_proj"), "float32", False, False),
    ],
)
def test_log_probs_and_gradients_are_those_of_plain_transformers_and_peft(
    targets: str | tuple[str, ...],
    kind: str,
    checkpointing: bool,
    rslora: bool,
    folder: Path,
    entered: list[tuple[int, ...]],
) -> None:
    names = ALL_LINEAR if isinstance(targets, str) else [*targets]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, use_rslora=rslora, task_type="CAUSAL_LM")
    plain = fill_adapters(get_peft_model(plain_base(folder, kind), config)).train()
    expected = expected_logprobs(plain)
    backward(expected)
    assert not entered

    lora = Lora(rank=4, alpha=6, targets=targets, rslora=rslora, dropout=0.0)  # pyright: ignore[reportArgumentType]
    ours: Any = fill_adapters(attach(base(folder, kind), lora, seed=0)).train()
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = list(target_logprobs(ours, SEQUENCES, POSITIONS))
    assert_entered(entered, LAYERS)
    backward(actual)
    assert_entered(entered, LAYERS * (2 if checkpointing else 1))

    assert_logprobs_equal(actual, expected)
    theirs = gradients(plain)
    assert len(theirs) == LAYERS * len(names) * 2
    assert all(g.abs().max() > 0.0 for g in theirs.values())
    assert_gradients_equal(gradients(ours), theirs, rtol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_with_the_adapter_off_log_probs_are_those_of_the_plain_base(
    kind: str, folder: Path, entered: list[tuple[int, ...]]
) -> None:
    with torch.no_grad():
        expected = expected_logprobs(plain_base(folder, kind))
        lora = Lora(rank=4, alpha=6, targets="all-linear", dropout=0.0)
        ours: Any = fill_adapters(attach(base(folder, kind), lora, seed=0)).train()
        with ours.disable_adapter():
            off = list(target_logprobs(ours, SEQUENCES, POSITIONS))
        assert_entered(entered, LAYERS)
        on = list(target_logprobs(ours, SEQUENCES, POSITIONS))
    assert_logprobs_equal(off, expected)
    assert not torch.allclose(torch.cat(on), torch.cat(expected), atol=1e-2)
