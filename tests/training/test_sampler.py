"""Which examples a step takes."""

from __future__ import annotations

import random
from typing import Any

from corral.recipe import Train
from corral.training.sampler import BatchSampler


def make_sampler(count: int, seed: int = 9, **settings: Any) -> BatchSampler:
    lengths = [random.Random(i).randint(5, 500) for i in range(count)]
    return BatchSampler(Train(**{"batch_size": 7, "steps": 20} | settings), lengths, seed)


def test_every_example_comes_once_an_epoch_and_a_step_depends_only_on_the_seed() -> None:
    for grouped in (False, True):
        indices = [i for step in range(1, 11) for i in make_sampler(35, group_by_length=grouped).batch(step)]
        assert sorted(indices[:35]) == sorted(indices[35:70]) == list(range(35))
        assert indices[:35] != indices[35:70]
        assert make_sampler(35, group_by_length=grouped).batch(4) == indices[21:28]
        assert make_sampler(35, 10, group_by_length=grouped).batch(4) != indices[21:28]


def test_steps_cross_the_border_of_an_epoch() -> None:
    indices = [i for step in range(1, 11) for i in make_sampler(10).batch(step)]
    assert len(indices) == 70
    assert all(sorted(indices[at : at + 10]) == list(range(10)) for at in range(0, 70, 10))


def test_whole_epochs_end_with_a_smaller_step() -> None:
    sampler = make_sampler(10, steps=None, epochs=1.5)
    assert sampler.steps == 3
    assert [len(sampler.batch(step)) for step in (1, 2, 3)] == [7, 7, 1]


def test_grouping_puts_similar_lengths_into_a_step_and_shuffles_the_steps() -> None:
    def spread(sampler: BatchSampler, lengths: list[int]) -> float:
        steps = [[lengths[i] for i in sampler.batch(step)] for step in range(1, sampler.steps + 1)]
        return sum(max(s) - min(s) for s in steps) / len(steps)

    lengths = [random.Random(i).randint(5, 500) for i in range(700)]
    plain, grouped = (make_sampler(700, steps=100, group_by_length=on) for on in (False, True))
    assert spread(grouped, lengths) < spread(plain, lengths) / 10
    means = [sum(lengths[i] for i in grouped.batch(step)) for step in range(1, 51)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
