"""A tiny Llama of random weights (grouped-query attention, two layers, 256 ids), adapters, and what transformers computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from corral.engines.base import Sampling
from corral.model import adapters
from corral.model.loading import load_model
from corral.recipe import Lora

VOCABULARY = 256
CONTEXT = 2048


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """In float32, in evaluation mode. The weights are large enough that the model prefers some ids plainly."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def random_ids(length: int) -> list[int]:
    """The same for the same length."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def generated(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers' own generate gives, greedily."""
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def scores(model: Any, ids: Sequence[int], start: int = 1) -> list[float]:
    """Log-probabilities of ids[start:] by transformers."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)[start - 1 :].tolist()


def distribution(logits: torch.Tensor, sampling: Sampling, ids: Sequence[int] = (), prompt: int = 0) -> torch.Tensor:
    """Probabilities of the next id from [vocabulary] logits, by transformers' own logits processors.

    Args:
        ids: the prompt and the answer so far.
        prompt: how many of them are the prompt's.
    """
    before: Any = torch.tensor([ids], dtype=torch.long)
    processed: Any = logits[None].clone()
    if sampling.logit_bias:
        processed = SequenceBiasLogitsProcessor([[[id_], bias] for id_, bias in sampling.logit_bias])(before, processed)
    if sampling.repetition_penalty != 1 and ids:
        processed = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(before, processed)
    for id_, count in Counter(ids[prompt:]).items():  # transformers has none of these two: OpenAI's definition
        processed[0, id_] -= sampling.frequency_penalty * count + sampling.presence_penalty
    if sampling.min_tokens:
        processed = MinNewTokensLengthLogitsProcessor(
            prompt, sampling.min_tokens, list(sampling.stop_ids), device="cpu"
        )(before, processed)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(processed[0].argmax(), len(logits)).float()
    processed = TemperatureLogitsWarper(sampling.temperature)(before, processed)
    if sampling.top_k:
        processed = TopKLogitsWarper(sampling.top_k)(before, processed)
    if sampling.top_p < 1:
        processed = TopPLogitsWarper(sampling.top_p)(before, processed)
    if sampling.min_p:
        processed = MinPLogitsWarper(sampling.min_p)(before, processed)
    return processed.softmax(-1)[0]


def write_adapter(base: Path, folder: Path, seed: int = 1, *, std: float = 0.05, **lora: Any) -> Path:
    """An adapter of that model, on every layer, that plainly changes it; `lora`: other settings of `[train.lora]`."""
    adapted = adapters.attach(load_model(base), Lora.model_validate({"targets": "all-linear"} | lora), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=std)
    folder.mkdir(exist_ok=True)
    adapters.save(adapted, folder, base=str(base))
    return folder
