from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from corral.engines.base import Sampling
from corral.engines.token_sampling import LogitChanges, changed, sample
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
    Sampling(temperature=1.0, min_p=0.3),
    Sampling(temperature=1.5, min_p=1e-4),
    Sampling(temperature=1.2, min_p=0.05, top_k=300, top_p=0.97),
    Sampling(temperature=0.8, min_p=1.0),
)


def logits(spread: float) -> torch.Tensor:
    """One row: nearly flat with a small spread, nearly all on a few ids with a large one."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * spread


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"T={s.temperature} {s.top_p} {s.top_k} {s.min_p}")
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


CHANGES = (
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, logit_bias=((3, 5.0), (900, -100.0), (17, 100.0))),
    Sampling(temperature=0.7, repetition_penalty=1.3),
    Sampling(temperature=1.0, repetition_penalty=0.5),
    Sampling(temperature=1.0, frequency_penalty=0.9),
    Sampling(temperature=1.0, presence_penalty=-1.5, frequency_penalty=0.4),
    Sampling(temperature=1.0, min_tokens=4, stop_ids=(7, 8, 5000)),
    Sampling(temperature=0.0, repetition_penalty=3.0, presence_penalty=2.0),
    Sampling(
        temperature=1.1,
        top_k=200,
        top_p=0.98,
        min_p=0.01,
        logit_bias=((5, 4.0), (8, 6.0), (700, -3.0)),
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        min_tokens=5,
        stop_ids=(8,),
    ),
)


def test_each_row_of_a_mixed_batch_has_the_logits_that_transformers_own_processors_give() -> None:
    prompt, answer = [5, 6, 6, 7, 900], [5, 8, 8, 3, 8, 12]
    batch = [(sampling, count) for sampling in CHANGES for count in range(len(answer) + 1)]
    rows = torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    changes: list[LogitChanges | None] = []
    for sampling, count in batch:
        change = LogitChanges(sampling, prompt, VOCABULARY, rows.device) if LogitChanges.needed(sampling) else None
        if change is not None:
            for id_ in answer[:count]:
                change.add(id_)
        changes.append(change)
    given = rows.clone()
    new = changed(rows, changes)
    assert torch.equal(rows, given)
    for i, (sampling, count) in enumerate(batch):
        plain = replace(sampling, stop_ids=tuple(id_ for id_ in sampling.stop_ids if id_ < VOCABULARY))
        expected = distribution(rows[i], plain, [*prompt, *answer[:count]], len(prompt))
        truncation = Sampling(temperature=plain.temperature, top_k=plain.top_k, top_p=plain.top_p, min_p=plain.min_p)
        torch.testing.assert_close(distribution(new[i], truncation), expected)


def test_changes_are_the_same_while_another_model_is_loaded_in_16_bits() -> None:
    rows = logits(5.0)[None]

    def compute(dtype: torch.dtype) -> torch.Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # as transformers does while it builds a model
        try:
            changes = [LogitChanges(CHANGES[-1], [5, 6], rows.shape[1], rows.device)]
            for id_ in (5, 8):
                changes[0].add(id_)
            return changed(rows, changes)
        finally:
            torch.set_default_dtype(before)

    assert torch.equal(compute(torch.bfloat16), compute(torch.float32))


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-5])
def test_a_temperature_near_0_takes_the_most_likely_id(temperature: float) -> None:
    rows = torch.stack([logits(5.0), logits(5.0) + 80])
    assert sample(rows, [Sampling(temperature=temperature)] * 2, [1e-12, 1.0]).tolist() == rows.argmax(-1).tolist()
