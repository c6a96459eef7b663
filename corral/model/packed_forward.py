"""Several sequences in one forward pass, isolated from each other: hidden states, and log-probabilities of target tokens.

A pack is sequences laid end to end in one row. Attention runs within each sequence and positions start anew in each, so a
sequence gets what it would get alone (to rounding), without padding and without a [tokens, tokens] mask. What sequences begin
with in common may be computed once (`shared_prefixes`). The head runs for the wanted positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from corral.model.compute import cpu_attention, gpu_attention, gpu_compile
from corral.model.compute.cpu_attention import Span
from corral.model.compute.cpu_matmul import padding_rows
from corral.model.compute.token_logprobs import module_logprobs, most_likely, token_logprobs
from corral.model.shared_prefixes import PackedTokens, pack_tokens

_LOGITS = 2**23  # at once, where the most likely tokens are looked for: 32 MiB in float32

ATTENTION_NAME = "corral_packed"
"""Under which transformers knows this module's attention."""


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequences: Sequence[Span] | None = None,
    ends: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of `sequences`, or transformers' own without them. Shapes as transformers has them."""
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ends is not None and not dropout:
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        return gpu_attention.attend(q, k, v, scale, [span.length for span in sequences], ends)[None], None
    if query.device.type == "cpu" and query.dtype == torch.float32 and not dropout:
        return cpu_attention.packed_attention(query, key, value, scale, sequences), None
    parts = [
        _attend_plainly(query[:, :, span.own], key, value, span, dropout_p=dropout, scale=scale) for span in sequences
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor, span: Span, **settings: Any) -> Tensor:
    """torch's own attention of a sequence's queries to the keys and values of a pack."""
    own_key, own_value = key[:, :, span.own], value[:, :, span.own]
    if span.prefix is None:
        return F.scaled_dot_product_attention(query, own_key, own_value, is_causal=True, enable_gqa=True, **settings)
    keys, values = (
        torch.cat((t.index_select(2, span.prefix), own), dim=2) for t, own in ((key, own_key), (value, own_value))
    )
    seen = torch.ones(span.length, keys.shape[2], dtype=torch.bool, device=query.device).tril_(span.shared)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True, **settings)


AttentionInterface.register(ATTENTION_NAME, _packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def hidden_states(model: nn.Module, pack: PackedTokens) -> Tensor:
    """Last hidden states of the tokens of a pack, [tokens, hidden size], of a causal language model, or of a PEFT model around
    one."""
    causal = _causal_model(model)
    if causal.config._attn_implementation != ATTENTION_NAME:  # pyright: ignore[reportPrivateUsage]
        causal.set_attn_implementation(ATTENTION_NAME)
    total, device = len(pack.ids), causal.device
    padding = padding_rows(total, 64) if device.type == "cpu" else 0
    lengths = [*pack.lengths[:-1], pack.lengths[-1] + padding]  # after every token, so that no token attends to it
    ids = gpu_attention.copy_to(torch.tensor(pack.ids + [0] * padding), device)
    positions = gpu_attention.copy_to(torch.tensor(pack.positions + [0] * padding), device)
    prefixes = [torch.tensor(prefix, device=device) if prefix else None for prefix in pack.prefixes]
    backbone: Any = causal.base_model
    # Not read: a 4-d mask keeps transformers from building a [tokens, tokens] one.
    unused_mask = torch.zeros(1, 1, 1, 1, device=device)
    output = backbone(
        input_ids=ids.unsqueeze(0),
        attention_mask=unused_mask,
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        sequences=cpu_attention.spans(lengths, prefixes),
        ends=gpu_attention.sequence_ends(lengths, device),
    )
    return output.last_hidden_state[0, :total]


def _causal_model(model: nn.Module) -> PreTrainedModel:
    causal: Any = model
    return causal.get_base_model() if hasattr(causal, "get_base_model") else causal


def fallbacks(model: nn.Module) -> list[str]:
    """Why packs of that model are computed in a slower way than on other GPUs; empty if they are not, or on a CPU."""
    causal = _causal_model(model)
    if causal.device.type == "cpu":
        return []
    config: Any = causal.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _, reason = gpu_attention.choose_kernel(causal.device, causal.dtype, head_size)
    return [each for each in (reason, gpu_compile.fault(causal.device)) if each]


def head_logprobs(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token by the model's output layer, in float32; differentiable where gradients are on.

    Args:
        model: a causal language model, or a PEFT model around one, which may change its output layer.
        hidden: [n, hidden size], the states that predict the targets.
        targets: [n] token ids.

    Returns: [n].
    """
    head: Any = _causal_model(model).get_output_embeddings()
    if isinstance(head, nn.Linear) and getattr(head, "bias", None) is None:
        return token_logprobs(hidden, head.weight, targets)
    return module_logprobs(head, hidden, targets)


def target_logprobs(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    share_prefixes: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probabilities of the tokens at `positions` of each sequence, given all tokens before them.

    Args:
        model: a causal language model, or a PEFT model around one.
        sequences: token ids; computed as one pack.
        positions: for each sequence, ascending positions from 1 up.
        share_prefixes: compute what sequences begin with in common once, which `can_share_prefixes` must allow.

    Returns: for each sequence a float32 tensor as long as its positions; differentiable where gradients are on.
    """
    pack = pack_tokens(sequences, share=share_prefixes)
    hidden = hidden_states(model, pack)
    flat = torch.tensor([rows[p - 1] for rows, ps in zip(pack.rows, positions, strict=True) for p in ps])
    targets = torch.tensor([s[p] for s, ps in zip(sequences, positions, strict=True) for p in ps])
    picked = hidden.index_select(0, gpu_attention.copy_to(flat, hidden.device))
    logprobs = head_logprobs(model, picked, gpu_attention.copy_to(targets, hidden.device))
    return logprobs.split([len(ps) for ps in positions])


def can_share_prefixes(model: nn.Module) -> bool:
    """Whether packs of that model may compute a common prefix once: on a CPU. A GPU's variable-length kernel has no
    attention of two sequences to one prefix."""
    return _causal_model(model).device.type == "cpu"


def score(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of sequence[start:] for each sequence, computed as one pack without gradients."""
    with torch.inference_mode():
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        return [t.tolist() for t in target_logprobs(model, sequences, positions)]


def score_top(
    model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int], top: int
) -> list[list[tuple[float, list[tuple[int, float]]]]]:
    """`score`, with the most likely tokens at each position; some rows of logits after others.

    Returns: for each sequence and each token of sequence[start:] its log-probability and the `top` most likely
        (id, log-probability), the most likely first.
    """
    with torch.inference_mode():
        pack = pack_tokens(sequences, share=False)
        lengths = [len(s) - start for s, start in zip(sequences, starts, strict=True)]
        rows = [row for own, start in zip(pack.rows, starts, strict=True) for row in own[start - 1 : -1]]
        targets = [id_ for s, start in zip(sequences, starts, strict=True) for id_ in s[start:]]
        hidden = hidden_states(model, pack)
        causal: Any = _causal_model(model)
        head, size = causal.get_output_embeddings(), max(1, _LOGITS // causal.config.vocab_size)
        scores: list[tuple[float, list[tuple[int, float]]]] = []
        for i in range(0, len(rows), size):
            picked = hidden.index_select(0, torch.tensor(rows[i : i + size], device=hidden.device))
            logprobs = head(picked).float().log_softmax(-1)
            ids = torch.tensor(targets[i : i + size], device=hidden.device)
            own = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
            scores += zip(own, most_likely(logprobs, top), strict=True)
        ends = list(accumulate(lengths, initial=0))
        return [scores[a:b] for a, b in pairwise(ends)]
