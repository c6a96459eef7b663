from __future__ import annotations

import pytest
import torch

from corral.engines.base import Sampling
from corral.engines.token_sampling import sample
from tests.engines.tiny import distribution

VOCABULARY = 1000
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.4, top_p=0.5),
    Sampling(temperature=1.0, top_p=0.999),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=2.0, top_k=400),
    Sampling(temperature=0.9, top_k=30, top_p=0.6),
)


def logits(spread: float) -> torch.Tensor:
    """One row: nearly flat with a small spread, nearly all on a few ids with a large one."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * spread


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"T={s.temperature} top_p={s.top_p} top_k={s.top_k}")
def test_a_grid_of_uniforms_samples_each_id_in_proportion_to_its_probability(sampling: Sampling, spread: float) -> None:
    # Not random: over a grid of uniforms, an interval of length p holds N p points, give or take one.
    row, count = logits(spread), 4000
    ids = sample(row.expand(count, -1), [sampling] * count, [(i + 1) / count for i in range(count)])
    seen = ids.bincount(minlength=VOCABULARY) / count
    expected = distribution(row, sampling)
    assert (seen - expected).abs().max() <= 1.01 / count + 1e-5
    assert not seen[expected == 0].any()


def test_a_row_is_sampled_alike_in_every_batch() -> None:
    rows = torch.stack([logits(spread) for spread in (0.1, 1.0, 5.0) for _ in SAMPLINGS])
    samplings = [*SAMPLINGS] * 3
    uniforms = torch.rand(len(rows), generator=torch.Generator().manual_seed(5)).clamp(min=1e-6).tolist()
    together = sample(rows, samplings, uniforms)
    for i in range(len(rows)):
        assert sample(rows[i : i + 1], samplings[i : i + 1], uniforms[i : i + 1]).item() == together[i]


@pytest.mark.parametrize("uniform", [1e-12, 1.0])
def test_the_smallest_and_largest_uniform_sample_possible_ids(uniform: float) -> None:
    row = logits(1.0)
    row[:5] = row[-5:] = float("-inf")
    for sampling in SAMPLINGS:
        (id_,) = sample(row[None], [sampling], [uniform]).tolist()
        assert distribution(row, sampling)[id_] > 0
