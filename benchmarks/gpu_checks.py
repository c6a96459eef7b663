"""What `gpu.py` checks besides the speed of training: packs, the estimate of memory, and generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any


def packed_gap(model: Any, vocabulary: int) -> float:
    """The largest difference of a log-probability between a pack of sequences and each of them alone."""
    from gpu_rows import documents

    from corral.model import packed_forward

    sequences = [documents(1, length, vocabulary)[0][0] for length in (7, 130, 2, 64)]
    packed = packed_forward.score(model, sequences, [1] * len(sequences))
    alone = [packed_forward.score(model, [sequence], [1])[0] for sequence in sequences]
    return max(abs(a - b) for one, other in zip(packed, alone, strict=True) for a, b in zip(one, other, strict=True))


def estimate_ratio(shape: dict[str, Any], settings: Any, tokens: int, peak_gb: float) -> float:
    """The estimated peak of a step of LoRA in bfloat16, without the process, relative to torch's measured peak."""
    from corral.training import memory_estimate
    from corral.training.memory_estimate import ModelShape

    sizes = ModelShape(
        layers=shape["num_hidden_layers"],
        hidden=shape["hidden_size"],
        inner=shape["intermediate_size"],
        heads=shape["num_attention_heads"],
        key_heads=shape["num_key_value_heads"],
        head_size=shape["head_dim"],
        vocabulary=shape["vocab_size"],
        tied=shape["tie_word_embeddings"],
    )
    estimate = memory_estimate.memory(sizes, settings, tokens, tokens, "cuda", "bfloat16")
    return (estimate.peak - memory_estimate.PROCESS["cuda"]) / 1e9 / peak_gb


def generation(model: Any, vocabulary: int, *, prompts: int, length: int, new: int) -> dict[str, float]:
    """New tokens per second of corral's transformers engine and of transformers' `generate`, greedy; share of equal ids."""
    import torch
    from gpu_rows import documents

    from corral.engines.base import Sampling
    from corral.engines.transformers import TransformersEngine

    ids = [row for row, _ in documents(prompts, length, vocabulary)]

    async def ours() -> list[Sequence[int]]:
        engine = TransformersEngine(model)
        try:
            running = [engine.submit(each, Sampling(max_tokens=new)) for each in ids]
            return [(await each.completions())[0].ids for each in running]
        finally:
            await engine.close()

    def theirs() -> list[Sequence[int]]:
        model.set_attn_implementation("sdpa")
        rows = torch.tensor(ids, device=model.device)
        with torch.inference_mode():
            output = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return output[:, length:].tolist()

    figures: dict[str, float] = {}
    answers: list[list[Sequence[int]]] = []
    for name, run in (("corral", lambda: asyncio.run(ours())), ("plain", theirs)):
        run()  # kernels are loaded and compiled
        began = time.perf_counter()
        answers.append(run())
        figures[f"{name}_tokens_per_second"] = prompts * new / (time.perf_counter() - began)
    pairs = [a == b for one, other in zip(*answers, strict=True) for a, b in zip(one, other, strict=True)]
    return figures | {"equal_share": sum(pairs) / len(pairs)}
