"""On a GPU: the same losses and gradients as on a CPU, one program for all packs, and nothing that waits for the device.

`pytest tests/model/compute/test_on_gpu.py` on a machine with one; skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model import packed_forward
from corral.model.compute import gpu_attention, gpu_compile
from corral.model.compute.fused_forwards import fuse
from corral.model.compute.token_logprobs import token_logprobs
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    ATTENTION,
    packed_losses_and_gradients,
    plain_losses_and_gradients,
    random_sequences,
    with_adapter,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
LENGTHS = (7, 130, 2, 64)


ROWS = random_sequences(*LENGTHS)


def adapted(device: str, dtype: torch.dtype, *, fused: bool) -> Any:
    tiny = make_tiny_model(300, hidden_size=256, head_dim=64, initializer_range=0.1).to(dtype)
    model = with_adapter(ATTENTION, tiny).to(device).train()
    if fused:
        fuse(model)
    return model


def as_vectors(losses: Tensor, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return losses.cpu(), torch.cat([g.float().cpu().flatten() for g in gradients.values()])


def packed(model: Any, sequences: Sequence[Sequence[int]] = ROWS) -> tuple[Tensor, Tensor]:
    return as_vectors(*packed_losses_and_gradients(model, sequences))


def plain(model: Any) -> tuple[Tensor, Tensor]:
    return as_vectors(*plain_losses_and_gradients(model, ROWS))


def gap(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@contextmanager
def waiting_is_an_error() -> Generator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_float32_losses_and_gradients_are_those_of_the_cpu() -> None:
    expected = plain(adapted("cpu", torch.float32, fused=False))
    actual = packed(adapted("cuda", torch.float32, fused=True))
    assert gap(actual[0], expected[0]) < 1e-4
    assert gap(actual[1], expected[1]) < 1e-3


@pytest.mark.parametrize(("compiled", "checkpointing"), [(True, False), (True, True), (False, False)])
def test_in_bfloat16_they_are_as_near_as_those_of_plain_transformers_and_peft(
    compiled: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = plain(adapted("cpu", torch.float32, fused=False))
    theirs = plain(adapted("cuda", torch.bfloat16, fused=False))
    if not compiled:
        monkeypatch.setattr(gpu_compile, "can_compile", lambda _: False)  # pyright: ignore[reportUnknownLambdaType]
    model = adapted("cuda", torch.bfloat16, fused=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ours, plain_ones, expected in zip(packed(model), theirs, exact, strict=True):
        assert gap(ours, expected) < 1.25 * gap(plain_ones, expected)


def test_the_kernel_takes_grouped_heads_from_ampere_on() -> None:
    grouped = torch.cuda.get_device_capability() >= (8, 0)
    gpu = torch.device("cuda", 0)
    assert gpu_attention.choose_kernel(gpu, torch.bfloat16, 128)[0] == ("grouped" if grouped else None)
    assert gpu_attention.choose_kernel(gpu, torch.float32, 128)[0] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_over_a_pack_is_that_of_each_sequence_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(203, 8, 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(203, 2, 64, device="cuda", dtype=dtype) for _ in range(2))
    ends = gpu_attention.sequence_ends(LENGTHS, q.device)
    assert ends is not None
    actual = gpu_attention.attend(q, k, v, 0.125, LENGTHS, ends)
    wide = (t.float().repeat_interleave(8 // t.shape[1], 1).transpose(0, 1)[None].split(LENGTHS, 2) for t in (q, k, v))
    alone = [F.scaled_dot_product_attention(*three, is_causal=True, scale=0.125) for three in zip(*wide, strict=True)]
    assert gap(actual.float(), torch.cat(alone, 2)[0].transpose(0, 1)) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_one_program_serves_packs_of_all_lengths_and_nothing_waits_for_the_device() -> None:
    from torch._dynamo.utils import counters

    model = adapted("cuda", torch.bfloat16, fused=True)
    packed(model)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    for lengths in ((9, 30), (400,), (3, 4, 5, 6, 90)):
        sequences = random_sequences(*lengths)
        with waiting_is_an_error():
            actual = packed_forward.target_logprobs(model, sequences, [range(1, n) for n in lengths])
            torch.cat(actual).sum().backward()
    assert counters["stats"]["unique_graphs"] == compiled


def test_the_head_gives_what_it_gives_on_the_cpu() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 64), torch.randn(3000, 64) / 8, torch.randint(0, 3000, (50,))
    results: list[tuple[Tensor, Tensor]] = []
    for device in ("cpu", "cuda"):
        h = hidden.to(device).requires_grad_()
        actual = token_logprobs(h, weight.to(device), targets.to(device))
        actual.square().sum().backward()
        assert h.grad is not None
        results.append((actual.detach().cpu(), h.grad.cpu()))
    for one, other in zip(*results, strict=True):
        assert gap(one, other) < 1e-5


def test_training_gives_the_losses_of_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    from corral.data.example_store import Example
    from corral.messages import Conversation
    from corral.model import adapters
    from corral.recipe import Lora, Train
    from corral.template import Encoded
    from corral.training.loop import Trainer
    from corral.training.objective_table import build_objective

    record = Conversation.from_turns(("user", "?"), ("assistant", "!"))
    sequences = [
        Encoded(tuple(ids), (False, *[True] * (len(ids) - 1)))
        for ids in random_sequences(30, 60, 90, 40, 20, 70, 50, 80)
    ]
    examples = [Example(str(i), "random", i, (s,), record) for i, s in enumerate(sequences)]
    losses: dict[str, list[float]] = {}
    config = Train(steps=4, batch_size=4)
    for device in ("cpu", "cuda"):
        model = adapters.attach(make_tiny_model(300).to(device), Lora(), seed=0)
        folder = tmp_path / device
        folder.mkdir()
        training = Trainer(
            model,
            examples,
            [],
            build_objective(config),
            config,
            pack_length=256,
            seed=0,
            folder=folder,
            save_best=lambda: None,
        )
        seen: list[float] = []
        training.run(on_step=lambda m, seen=seen: seen.append(m.loss or 0.0))
        losses[device] = seen
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
