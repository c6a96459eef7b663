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


async def likelihoods(engine: Engine, ids: Sequence[int], *, best: bool) -> list[Likelihood]:
    """Score ids[1:].

    Returns: len(ids) − 1 of them.

    Raises:
        EngineError: the engine fails, cannot score, or (for `best`) gives no log-probabilities.
    """
    scores = await engine.score(ids)
    if not best:
        return [Likelihood(score, None) for score in scores]
    at_once = asyncio.Semaphore(_STEPS_AT_ONCE)

    async def of(place: int, score: float) -> Likelihood:
        if score > _CERTAIN:
            return Likelihood(score, (ids[place], score))
        async with at_once:
            (drawn,) = await engine.submit(ids[:place], _STEP).completions()
        assert drawn.logprobs
        is_given = drawn.ids[0] == ids[place]
        return Likelihood(score, (drawn.ids[0], score if is_given else drawn.logprobs[0]))

    tasks = [asyncio.create_task(of(place, score)) for place, score in enumerate(scores, start=1)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # those left where one failed, or nobody waits any more
        await asyncio.gather(*tasks, return_exceptions=True)
