"""Which examples each step takes: a function of (seed, step) alone, so that checkpoints need not save it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from corral.recipe import Train

_GROUP_STEPS = 50  # examples of so many steps are sorted by length together


class BatchSampler:
    """The batches of a training stage.

    Epochs follow each other without a gap: each is a seeded permutation, and a step takes the next `batch_size` examples.
    With `group_by_length`, chunks of a permutation are sorted by length and their batches shuffled.

    Args:
        config: the stage's settings.
        lengths: tokens of each example.
        seed: of the permutations.
    """

    def __init__(self, config: Train, lengths: Sequence[int], seed: int) -> None:
        self._config, self._seed = config, seed
        self._lengths = np.asarray(lengths)
        self._examples_in_epochs = math.ceil(len(lengths) * (config.epochs or 1))
        self.steps = config.steps or math.ceil(self._examples_in_epochs / config.batch_size)
        """Optimizer steps of the whole stage."""
        self._epoch = lru_cache(maxsize=4)(self._permutation)

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of step `step` (from 1); with epochs, the last step may be smaller."""
        size, count = self._config.batch_size, len(self._lengths)
        first = (step - 1) * size
        if step == self.steps and self._config.steps is None:
            size = self._examples_in_epochs - first
        return [int(self._epoch(i // count)[i % count]) for i in range(first, first + size)]

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        if not self._config.group_by_length:
            return order
        size = self._config.batch_size
        chunks = [order[start : start + _GROUP_STEPS * size] for start in range(0, len(order), _GROUP_STEPS * size)]
        order = np.concatenate([c[np.argsort(-self._lengths[c], kind="stable")] for c in chunks])
        full_batches = len(order) // size
        batches = order[: full_batches * size].reshape(full_batches, size)[random.permutation(full_batches)]
        return np.concatenate([batches.reshape(-1), order[full_batches * size :]])
