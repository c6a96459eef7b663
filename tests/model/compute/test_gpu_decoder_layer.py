"""The decoder layer for GPUs, run on a CPU, equals that of transformers and PEFT. `test_on_gpu` runs it on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model import packed_forward
from corral.model.compute import gpu_attention, gpu_compile, gpu_decoder_layer
from corral.model.compute.fused_forwards import fuse
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    ALL_LINEAR,
    ATTENTION,
    packed_losses_and_gradients,
    plain_losses_and_gradients,
    random_sequences,
    with_adapter,
)


def adapted(targets: Sequence[str], dtype: torch.dtype = torch.float32) -> Any:
    return with_adapter(targets, make_tiny_model(300).to(dtype))


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient, as a whole."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - e).norm() / e.norm()).item() for n, e in expected.items())


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes packs on the CPU take the GPU's path; traced operations run one by one instead of as generated kernels.

    Returns: the graphs that were compiled.
    """
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any, **settings: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs, **settings)

    functions: dict[Any, Any] = {}

    def compiled(function: Any) -> Any:
        return functions.setdefault(function, torch.compile(function, backend=backend, fullgraph=True))

    def sequence_ends(lengths: Sequence[int], _: torch.device) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    torch.compiler.reset()
    monkeypatch.setattr(gpu_attention, "sequence_ends", sequence_ends)
    monkeypatch.setattr(gpu_compile, "can_compile", lambda _: True)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(gpu_compile, "compiled", compiled)
    return graphs


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_layer_computes_what_transformers_and_peft_do(
    targets: list[str], checkpointing: bool, compilations: list[Any]
) -> None:
    plain, fused = adapted(targets).train(), adapted(targets).train()
    fuse(fused)
    if checkpointing:
        fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sequences = random_sequences(7, 31, 2, 60)
    expected = packed_losses_and_gradients(plain, sequences)
    assert not compilations
    actual = packed_losses_and_gradients(fused, sequences)
    assert compilations
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-5)
    assert distance(actual[1], expected[1]) < 1e-4


def test_one_program_serves_all_layers_and_lengths(compilations: list[Any]) -> None:
    model = adapted(ATTENTION).train()
    fuse(model)
    packed_losses_and_gradients(model, random_sequences(7, 31, 2, 60))
    after_one = len(compilations)
    for lengths in ((9, 30), (100,), (3, 4, 5, 6, 90), (17, 20)):
        packed_losses_and_gradients(model, random_sequences(*lengths))
    # Two functions; the first layer's input, which needs no gradient, makes its own of each.
    assert len(compilations) == after_one == 4


def test_an_adapter_that_is_switched_off_is_off_in_compiled_layers(compilations: list[Any]) -> None:
    model = adapted(ALL_LINEAR)
    fuse(model)
    sequences = random_sequences(7, 31)
    base = packed_forward.score(make_tiny_model(300), sequences, [1, 1])
    on = packed_forward.score(model, sequences, [1, 1])
    with model.disable_adapter():
        off = packed_forward.score(model, sequences, [1, 1])
    assert off[1] == pytest.approx(base[1], abs=2e-5)
    assert max(abs(a - b) for a, b in zip(on[1], base[1], strict=True)) > 1e-2
    assert compilations


def test_a_part_with_a_hook_is_called(compilations: list[Any]) -> None:
    model = adapted(ATTENTION)
    fuse(model)
    seen: list[int] = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(1))  # pyright: ignore[reportUnknownLambdaType]
    packed_forward.score(model, random_sequences(5), [1])
    assert len(seen) == 2
    assert not compilations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_low_precision_are_transformers_to_one_rounding(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm: Any = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.2)
    x = torch.randn(40, 64).to(dtype)
    expected = norm(x).float()
    for actual in (
        F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon),
        gpu_decoder_layer._rms_norm(x, norm.weight, norm.variance_epsilon),  # pyright: ignore[reportPrivateUsage]
    ):
        assert actual.dtype == dtype
        assert ((actual.float() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


def test_a_machine_on_which_nothing_compiles_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no triton\nand a long trace")

    monkeypatch.setattr(torch, "compile", refuse)
    gpu_compile.fault.cache_clear()
    try:
        assert not gpu_compile.can_compile(torch.device("cuda", 0))
        assert not gpu_compile.can_compile(torch.device("cuda", 0))
    finally:
        gpu_compile.fault.cache_clear()
    (message,) = caplog.messages
    assert message.endswith("uncompiled: no triton")


def test_layers_that_are_not_compiled_attend_the_same_way(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = adapted(ATTENTION), adapted(ATTENTION)
    fuse(fused)
    monkeypatch.setattr(gpu_compile, "can_compile", lambda _: False)  # pyright: ignore[reportUnknownLambdaType]
    sequences = random_sequences(7, 31, 2, 60)
    actual, expected = packed_losses_and_gradients(fused, sequences), packed_losses_and_gradients(plain, sequences)
    assert not compilations
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-5)
    assert distance(actual[1], expected[1]) < 1e-4


def test_compiled_layers_in_bfloat16_are_as_near_to_float32_as_transformers_and_peft(compilations: list[Any]) -> None:
    sequences = random_sequences(7, 31, 2, 60)
    exact = packed_losses_and_gradients(adapted(ALL_LINEAR, torch.float32), sequences)
    fused = adapted(ALL_LINEAR, torch.bfloat16)
    fuse(fused)
    actual = packed_losses_and_gradients(fused, sequences)
    assert compilations
    theirs = plain_losses_and_gradients(adapted(ALL_LINEAR, torch.bfloat16), sequences)
    assert all(g.dtype == torch.float32 for g in actual[1].values())
    assert (actual[0] - exact[0]).norm() < 1.5 * (theirs[0] - exact[0]).norm()
    assert distance(actual[1], exact[1]) < 1.5 * distance(theirs[1], exact[1])
