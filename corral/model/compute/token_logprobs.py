"""Log-probabilities of target tokens from hidden states, without a [tokens, vocabulary] tensor.

The gradient of log softmax(h Wᵀ)[target] with respect to h is W[target] − softmax(h Wᵀ) W, one vector a row that any later
weighting only scales. So it is computed in the forward pass, where the probabilities are at hand, and the backward pass is a
multiplication.

`by_columns` and `by_rows` differ in how they cut the logits, as a CPU and a GPU are fast with different shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from corral.model.compute import gpu_compile
from corral.model.compute.cpu_matmul import padding_rows, times_transposed

_CPU_LOGITS = 2**21  # at once: 8 MiB in float32
_GPU_LOGITS = 2**26  # at once: 128 MiB in bfloat16, 523 rows of Llama 3's vocabulary; products of far fewer fill no GPU
_MODULE_ROWS = 128


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, in float32, differentiable in `hidden` and `weight`.

    Args:
        hidden: [n, hidden size], the states that predict the targets.
        weight: [vocabulary, hidden size].
        targets: [n] token ids.

    Returns: [n].
    """
    return by_rows(hidden, weight, targets) if hidden.device.type != "cpu" else by_columns(hidden, weight, targets)


def by_columns(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`token_logprobs` with all rows at once, a part of the vocabulary after another."""
    result: Any = _ByColumns.apply(hidden, weight, targets)
    return result


def by_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`token_logprobs` with the whole vocabulary, some rows after others."""
    result: Any = _ByRows.apply(hidden, weight, targets)
    return result


def module_logprobs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """`token_logprobs` for an output layer that is more than a weight: it has an adapter or a bias, or is one of several.

    Some rows after others; for the gradient, logits are computed again.

    Args:
        head: [n, hidden size] → logits [n, vocabulary].
        hidden, targets: as for `token_logprobs`.
    """

    def logprobs(rows: Tensor, ids: Tensor) -> Tensor:
        logits = head(rows).float()
        return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(-1)

    parts = zip(hidden.split(_MODULE_ROWS), targets.split(_MODULE_ROWS), strict=True)
    return torch.cat([checkpoint(logprobs, rows, ids, use_reentrant=False) for rows, ids in parts])


def most_likely(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each row of [rows, vocabulary] the `count` most likely (id, log-probability), the most likely first."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


class _ByColumns(torch.autograd.Function):
    """Sums over the vocabulary are scaled to the highest logit so far (Milakov and Gimelshein 2018, arXiv 1805.02867)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        padding = padding_rows(len(hidden), 64) if hidden.device.type == "cpu" else 0
        rows = F.pad(hidden, (0, 0, 0, padding)) if padding else hidden
        highest = torch.full((len(rows), 1), -torch.inf, device=rows.device)
        total, weighted = (
            torch.zeros_like(highest),
            torch.zeros(rows.shape, device=rows.device) if needs_hidden else None,
        )
        at_target = torch.empty(len(hidden), device=rows.device)
        for start, part in _weight_parts(weight, len(rows)):
            logits = times_transposed(rows, part).float()
            column = targets - start
            inside = (column >= 0) & (column < len(part))
            picked = logits[: len(hidden)].gather(1, column.clamp(0, len(part) - 1)[:, None]).squeeze(1)
            at_target = torch.where(inside, picked, at_target)
            higher = torch.maximum(highest, logits.amax(dim=-1, keepdim=True))
            shrink, highest = (highest - higher).exp_(), higher
            exponentials = logits.sub_(higher).exp_()
            total.mul_(shrink).add_(exponentials.sum(dim=-1, keepdim=True))
            if weighted is not None:
                weighted.mul_(shrink).add_(times_transposed(exponentials.to(weight.dtype), part.T))
        normaliser = (highest + total.log())[: len(hidden)]
        slopes = None
        if weighted is not None:
            slopes = (weight[targets] - weighted.div_(total)[: len(hidden)]).to(hidden.dtype)
        ctx.save_for_backward(slopes, *((hidden, weight, targets, normaliser) if needs_weight else ()))
        return at_target - normaliser.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        slopes, *saved = ctx.saved_tensors
        grad_weight = None
        if saved:
            hidden, weight, targets, normaliser = saved
            grad_weight = torch.empty_like(weight)
            for start, part in _weight_parts(weight, len(hidden)):
                probabilities = (hidden @ part.T).float().sub_(normaliser).exp_()
                scaled = probabilities.mul_(-gradient[:, None]).to(hidden.dtype)
                grad_weight[start : start + len(part)] = scaled.T @ hidden
            grad_weight.index_add_(0, targets, hidden * gradient[:, None].to(hidden.dtype))
        return _hidden_gradient(slopes, gradient), grad_weight, None


def _weight_parts(weight: Tensor, rows: int) -> Generator[tuple[int, Tensor]]:
    """(start, rows of `weight` from there) such that the logits of `rows` rows stay within `_CPU_LOGITS`."""
    columns = 1 << max(1, _CPU_LOGITS // max(1, rows)).bit_length() - 1  # few sizes: see `padding_rows`
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        softmax_at = _softmax_function(hidden.device)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        slopes = torch.empty_like(hidden) if needs_hidden else None
        for part in _row_parts(hidden, weight):
            logprobs[part], probabilities = softmax_at(F.linear(hidden[part], weight), targets[part])
            if slopes is not None:
                torch.sub(weight[targets[part]], probabilities @ weight, out=slopes[part])
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if needs_weight else ()))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        slopes, *saved = ctx.saved_tensors
        grad_weight = None
        if saved:
            hidden, weight, targets = saved
            softmax_at = _softmax_function(hidden.device)
            grad_weight = torch.zeros_like(weight)
            for part in _row_parts(hidden, weight):
                _, probabilities = softmax_at(F.linear(hidden[part], weight), targets[part])
                scaled = hidden[part] * gradient[part, None].to(hidden.dtype)
                grad_weight.addmm_(probabilities.T, scaled, alpha=-1)
                grad_weight.index_add_(0, targets[part], scaled)
        return _hidden_gradient(slopes, gradient), grad_weight, None


def _row_parts(hidden: Tensor, weight: Tensor) -> Generator[slice]:
    rows = max(1, _GPU_LOGITS // len(weight))
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


def _hidden_gradient(slopes: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if slopes is None else slopes * gradient[:, None].to(slopes.dtype)


def _softmax_function(device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if not gpu_compile.can_compile(device):
        return _log_softmax_at
    function = gpu_compile.compiled(_log_softmax_at)
    any_length = gpu_compile.of_any_length
    return lambda logits, targets: function(any_length(logits), any_length(targets))


def _log_softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log softmax(logits)[target] in float32 [n], softmax in the dtype of the logits [n, vocabulary])."""
    # In place: uncompiled, each step would otherwise be a tensor as large as all logits.
    wide = logits.to(torch.float32, copy=True)
    wide.sub_(wide.amax(-1, keepdim=True))
    picked = wide.gather(1, targets[:, None])
    total = wide.exp_().sum(-1, keepdim=True)
    return (picked - total.log()).squeeze(1), wide.div_(total).to(logits.dtype)
