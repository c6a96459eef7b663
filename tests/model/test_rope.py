from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from corral.model.rope import llama3_divisors, llama3_parameters


def rule(factor: float, low: float, high: float, original: int, theta: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def divisors(stated: dict[str, Any], head_dim: int) -> np.ndarray:
    longest = 16 * stated["original_max_position_embeddings"]
    return llama3_divisors(
        LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, rope_parameters=stated, max_position_embeddings=longest
        )
    )


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_the_published_rules_are_found_again(factor: float, head_dim: int) -> None:
    published = rule(factor, 1.0, 4.0, 8192, 5e5)
    exact = divisors(published, head_dim)
    assert exact.shape == (head_dim // 2,)
    assert (exact[0], exact[-1]) == (1, factor)
    assert llama3_parameters(exact, 5e5) == published


@pytest.mark.parametrize(
    "stated", [rule(16.0, 1.0, 8.0, 4096, 5e5), rule(4.0, 2.0, 6.0, 2048, 1e4), rule(8.0, 1.0, 4.0, 64, 1e4)]
)
def test_other_rules_are_solved_for_and_give_the_same_divisors(stated: dict[str, Any]) -> None:
    exact = divisors(stated, 128)
    solved = llama3_parameters(exact, stated["rope_theta"])
    assert solved is not None
    np.testing.assert_allclose(divisors(solved, 128), exact, rtol=2e-6)


def test_divisors_of_one_are_no_scaling() -> None:
    assert llama3_parameters(np.ones(16, np.float32), 1e4) == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(1, 8, 64),
        np.full(64, 2.0),
        np.array([1, math.nan]),
        np.array([1, math.inf]),
        np.array([1.0, 0.5]),
        np.zeros(4),
        np.array([1, 1e30]),
    ],
)
def test_divisors_that_no_rule_gives_have_no_parameters(values: np.ndarray) -> None:
    assert llama3_parameters(values.astype(np.float32), 5e5) is None
