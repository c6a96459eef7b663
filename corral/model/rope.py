"""Convert Llama-3.1's rotary scaling between transformers' rule and a GGUF file's divisors.

transformers stores the rule (`rope_type: llama3` with four numbers); a GGUF file stores its result, `rope_freqs.weight`, by
which llama.cpp divides each frequency. From divisors, a rule is solved for and then checked by computing the divisors again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_AGREE = 2e-6
"""Largest relative difference of two divisors that count as equal: a few roundings of float32."""


def llama3_rule(theta: float, factor: float, high: float, original: int = 8192) -> dict[str, Any]:
    """Llama-3.1's scaling as transformers' `rope_parameters`.

    Multiplying both frequency factors and the original length by a number changes nothing, so the low factor is taken as 1, as
    published.

    Args:
        theta: base of the frequencies.
        factor: by which the lowest frequencies are divided.
        high: `high_freq_factor`; 4 in the published models.
        original: length of the context before the scaling.
    """
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def llama3_divisors(config: Any) -> NDArray[np.float32]:
    """The divisor of each rotary frequency, by transformers' own rule.

    Args:
        config: a LlamaConfig whose `rope_parameters` are of type llama3.

    Returns:
        float32 [head_dim / 2], slowest frequency last.
    """
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return (plain / scaled).float().numpy()


def llama3_parameters(divisors: NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """The rule that gives these divisors, as transformers' `rope_parameters`; None if no rule is found.

    Args:
        divisors: [head_dim / 2], of a `rope_freqs.weight`.
        theta: base of the frequencies.
    """
    values = divisors.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 1 - _AGREE).all()) or values.ndim != 1:
        return None
    if np.allclose(values, 1, rtol=_AGREE):
        return {"rope_type": "default", "rope_theta": theta}
    dimension = 2 * len(values)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dimension, 2) / dimension)
    for factor, high, original in _candidates(values, wavelengths):
        rule = llama3_rule(theta, factor, high, original)
        config = LlamaConfig(
            hidden_size=dimension,
            num_attention_heads=1,
            head_dim=dimension,
            rope_parameters=rule,
            # transformers requires this to be no less than the original length.
            max_position_embeddings=max(original, 1) * 2,
        )
        if np.allclose(llama3_divisors(config), values, rtol=_AGREE, atol=0):
            return rule
    return None


def _candidates(values: NDArray[np.float64], wavelengths: NDArray[np.float64]) -> list[tuple[float, float, int]]:
    """(factor, high_freq_factor, original length), the published ones first."""
    factor = float(f"{values.max():.6g}")  # the largest divisor, unless all frequencies are faster than the blend
    candidates = [(factor, 4.0, 8192)]
    blended = (values > 1 + 1e-4) & (values < factor * (1 - 1e-4))
    if not blended.any() or factor <= 1:
        return candidates
    # Within the blend 1/divisor = (1 - s)/factor + s, and s = (original/wavelength - low) / (high - low).
    share = (1 / values[blended] - 1 / factor) / (1 - 1 / factor)
    lengths = wavelengths[blended]
    candidates += [(factor, 4.0, round(length * (3 * s + 1))) for length, s in zip(lengths, share, strict=True)]
    if len(lengths) > 1:
        slope, intercept = np.polyfit(1 / lengths, share, 1)
        if intercept < 0 < slope:
            high = 1 - 1 / intercept
            candidates += [(factor, float(f"{high:.{digits}g}"), round(-slope / intercept)) for digits in (3, 6)]
    return candidates
