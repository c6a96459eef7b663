"""Which examples each step takes: a function of (seed, step) alone, so that nothing about it needs to be saved.

Knows nothing about what examples are but their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from corral.recipe import Train

_GROUP = 50  # steps' worth of examples that are sorted by length together


class Order:
    """The steps of a training stage.

    Epochs follow each other without a gap: each is a seeded permutation, and a step takes the next `batch_size` places. With
    `group_by_length`, stretches of a permutation are sorted by length and their batches shuffled.

    Args:
        config: the stage's settings.
        lengths: tokens of each example.
        seed: fixes the permutations.
    """

    def __init__(self, config: Train, lengths: Sequence[int], seed: int) -> None:
        self._config, self._seed = config, seed
        self._lengths = np.asarray(lengths)
        self._wanted = math.ceil(len(lengths) * (config.epochs or 1))
        self.steps = config.steps or math.ceil(self._wanted / config.batch_size)
        """Optimizer steps of the whole stage."""
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def batch(self, step: int) -> list[int]:
        """Which examples step `step` (from 1) takes; the last step of whole epochs may be smaller."""
        size, count = self._config.batch_size, len(self._lengths)
        if step == self.steps and self._config.steps is None:
            size = self._wanted - (step - 1) * size
        first = (step - 1) * self._config.batch_size
        return [int(self._epoch(place // count)[place % count]) for place in range(first, first + size)]

    def _make_epoch(self, epoch: int) -> np.ndarray[Any, Any]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        if not self._config.group_by_length:
            return order
        size = self._config.batch_size
        stretches = [order[at : at + _GROUP * size] for at in range(0, len(order), _GROUP * size)]
        order = np.concatenate([s[np.argsort(-self._lengths[s], kind="stable")] for s in stretches])
        whole = len(order) // size
        batches = order[: whole * size].reshape(whole, size)[random.permutation(whole)]
        return np.concatenate([batches.reshape(-1), order[whole * size :]])
