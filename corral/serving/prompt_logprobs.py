"""How likely the engine's model finds a text, token by token, and what it would have written instead.

`Engine.score` tells the first. The second, the most likely token of each position, is drawn: one greedy step from each place
where the given token has not more than half of the probability and so may not be the most likely itself. That is exact for
every engine, and costs up to one short request for each token. It does not know what texts are, or who asks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from corral.engines.base import Engine, Sampling

# Half of the probability, and a little for the rounding of a coarse engine.
_CERTAIN = math.log(0.51)
_STEPS_AT_ONCE = 32
_STEP = Sampling(max_tokens=1, temperature=0.0, logprobs=True)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one token, given all before it."""

    logprob: float
    """Natural log of its probability."""
    best: tuple[int, float] | None
    """The most likely token in its place, and its log-probability; None where that was not asked for."""


class Steps:
    """Greedy steps, of whatever texts, so many at a time."""

    def __init__(self, engine: Engine) -> None:
        self.tokens = 0
        """What they took so far: tokens of their prompts, and one drawn by each."""
        self._engine = engine
        self._places = asyncio.Semaphore(_STEPS_AT_ONCE)

    async def after(self, ids: Sequence[int], count: int) -> tuple[int, float]:
        """The most likely id after the first `count`, and its log-probability. Raises: EngineError."""
        async with self._places:
            self.tokens += count + 1
            (drawn,) = await self._engine.submit(ids[:count], _STEP).completions()
        assert drawn.logprobs
        return drawn.ids[0], drawn.logprobs[0]


def worst(length: int) -> int:
    """Tokens that the steps of a text of so many may read, where each of its own is unlikely."""
    return length**2 // 2


async def likelihoods(engine: Engine, ids: Sequence[int], steps: Steps | None = None) -> list[Likelihood]:
    """Score ids[1:].

    Args:
        steps: draw the most likely tokens. None: they are not told.

    Returns: len(ids) − 1 of them.

    Raises:
        EngineError: the engine fails, cannot score, or (with `steps`) gives no log-probabilities.
    """
    scores = await engine.score(ids)
    if steps is None:
        return [Likelihood(score, None) for score in scores]
    found = [Likelihood(score, (id_, score)) for id_, score in zip(ids[1:], scores, strict=True)]
    uncertain = [place for place, score in enumerate(scores, start=1) if score <= _CERTAIN]
    left = iter(uncertain)

    async def work() -> None:
        for place in left:  # which all who work share
            best, logprob = await steps.after(ids, place)
            if best != ids[place]:
                found[place - 1] = Likelihood(scores[place - 1], (best, logprob))

    tasks = [asyncio.create_task(work()) for _ in uncertain[:_STEPS_AT_ONCE]]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # those left where one failed, or nobody waits any more
        await asyncio.gather(*tasks, return_exceptions=True)
    return found
