"""Speeds of GPUs by their data sheets."""

from __future__ import annotations

from corral.preflight.devices import GPUS
from corral.recipe import Train
from corral.training.memory_estimate import ModelShape

LLAMA_3B = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, tied=True)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)


def test_rates_are_those_that_the_assumed_share_was_taken_from() -> None:
    # NeMo AutoModel: Llama-3.1-8B, LoRA, 4096 tokens: 12,473 tokens/s on an H100.
    rate = GPUS["h100"].tokens_per_second(LLAMA_8B, Train(pack_length=4096), 1.0, "bfloat16")
    assert 0.75 < rate / 12_473 < 1.1
    # torchtune: Llama-3.2-3B, LoRA, 4096 tokens: 8,210 tokens/s on an A100.
    rate = GPUS["a100-80g"].tokens_per_second(LLAMA_3B, Train(pack_length=4096), 1.0, "bfloat16")
    assert 0.75 < rate / 8_210 < 1.2


def test_what_costs_time_does_so_in_the_estimate() -> None:
    def rate(device: str = "a100-80g", dtype: str = "bfloat16", **settings: object) -> float:
        train = Train.model_validate({"pack_length": 4096, **settings})
        return GPUS[device].tokens_per_second(LLAMA_8B, train, 0.3, dtype)  # pyright: ignore[reportArgumentType]

    for settings in ({"gradient_checkpointing": True}, {"quantization": "nf4"}, {"method": "full"}):
        assert rate(**settings) < rate()
    assert rate("t4", "bfloat16") < rate("t4", "float16")


def test_a_t4_computes_in_float16_unless_it_is_told_otherwise() -> None:
    assert GPUS["t4"].dtype("auto") == "float16"
    assert GPUS["h100"].dtype("auto") == "bfloat16"
    assert GPUS["t4"].dtype("bfloat16") == "bfloat16"
