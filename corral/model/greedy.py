"""Greedy answers to several prompts at once, by a model as it is in memory: plain, quantised, under an adapter or in shards.

For a model in training, which no engine owns. Answers that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """An answer without its stop id.

    Args:
        ended: whether the model ended it; else it was cut.
    """

    ids: tuple[int, ...]
    ended: bool


@torch.no_grad()
def answer_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_tokens: int,
    *,
    compute: Callable[[Callable[[], Tensor]], Tensor] = lambda step: step(),
    agree: Callable[[list[int]], list[int]] = list,
) -> list[GreedyAnswer]:
    """The most likely next token, again and again.

    Args:
        model: a causal language model in evaluation mode, or a PEFT model around one.
        prompts: token ids; none may be empty.
        compute: makes a forward pass; a sharded model needs its own way.
        agree: the next ids that all processes take, if several compute the same answers.
    """
    causal: Any = model
    causal = causal.get_base_model() if hasattr(causal, "get_base_model") else causal
    device = causal.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    # Padded on the left, so that all prompts end in the same column.
    ids = torch.tensor([[*[0] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    visible = torch.tensor(
        [[i >= width - len(prompt) for i in range(width)] for prompt in prompts], device=device
    ).long()
    positions = (visible.cumsum(1) - 1).clamp(min=0)
    cache, answers = DynamicCache(), [list[int]() for _ in prompts]
    running, ended = list(range(len(prompts))), set[int]()

    def next_ids() -> Tensor:
        output = causal(
            input_ids=ids,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].argmax(-1)

    for _ in range(max_tokens):
        chosen = agree(compute(next_ids).tolist())
        for row, id_ in zip(running, chosen, strict=True):
            if id_ in stop_ids:
                ended.add(row)
            else:
                answers[row].append(id_)
        kept = [place for place, row in enumerate(running) if row not in ended]
        if not kept:
            break
        if len(kept) < len(running):
            places = torch.tensor(kept, device=device)
            cache.batch_select_indices(places)
            visible, positions = visible[places], positions[places]
            running, chosen = [running[place] for place in kept], [chosen[place] for place in kept]
        ids = torch.tensor(chosen, device=device)[:, None]
        positions = positions[:, -1:] + 1
        visible = torch.cat([visible, torch.ones_like(ids)], 1)
    return [GreedyAnswer(tuple(answer), row in ended) for row, answer in enumerate(answers)]
