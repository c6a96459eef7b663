"""A Llama of 100,000 random weights: grouped-query attention, two layers, 256 ids. Knows nothing about engines."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
