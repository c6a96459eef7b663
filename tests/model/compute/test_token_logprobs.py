"""Log-probabilities from logits in parts equal those of log_softmax, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corral.model.compute import token_logprobs


@pytest.mark.parametrize(
    ("function", "limit"), [(token_logprobs.by_columns, "_CPU_LOGITS"), (token_logprobs.by_rows, "_GPU_LOGITS")]
)
@pytest.mark.parametrize("chunk", [1, 7, 50, 10**6])
@pytest.mark.parametrize("train_head", [True, False])
def test_logits_in_parts_equal_log_softmax(
    function: Any, limit: str, chunk: int, train_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logprobs, limit, 300 * chunk)
    torch.manual_seed(0)
    hidden = torch.randn(50, 64, requires_grad=True)
    weight = torch.randn(300, 64, requires_grad=train_head)
    targets, share = torch.randint(0, 300, (50,)), torch.randn(50)
    ours = function(hidden, weight, targets)
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    inputs = (hidden, weight) if train_head else (hidden,)
    gradients, expected = (torch.autograd.grad((logprobs * share).sum(), inputs) for logprobs in (ours, plain))
    for gradient, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-4)
