"""The most likely tokens that a client is told are those of the model itself."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError
from corral.model.loading import load_model
from corral.serving.answering import Served
from corral.serving.likelihood import Steps, likelihoods

IDS = [1, 88, 12, 300, 45, 45, 45, 7, 210, 33, 160, 5, 91]


def truth(folder: Path, ids: list[int]) -> list[tuple[float, int, float]]:
    """(log-prob of the given token, the most likely one, its log-prob) after each id but the last, by transformers."""
    model: Any = load_model(folder)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    best = logprobs.max(-1)
    return [(float(logprobs[at, id_]), int(best.indices[at]), float(best.values[at])) for at, id_ in enumerate(ids[1:])]


def greedy_from(served: Served, ids: list[int], count: int) -> list[int]:
    async def work() -> Any:
        return await served.answerer.engine.submit(ids, Sampling(count)).completions()

    return [*ids, *asyncio.run(work())[0].ids]


@pytest.mark.parametrize("written_by", ["chance", "the model", "both"])
def test_the_most_likely_token_of_each_place_is_the_models(
    written_by: str, tiny_served: Served, tiny_folder: Path
) -> None:
    ids = {
        "chance": IDS,
        "the model": greedy_from(tiny_served, [1], 20),
        "both": [*greedy_from(tiny_served, IDS[:4], 6), *IDS[4:]],
    }[written_by]
    engine = tiny_served.answerer.engine
    found = asyncio.run(likelihoods(engine, ids, Steps(engine)))
    for one, given, (logprob, best, of_best) in zip(found, ids[1:], truth(tiny_folder, ids), strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.best is not None
        assert one.best[0] == best
        assert one.best[1] == pytest.approx(of_best, abs=1e-4)
        assert (one.best[1] == one.logprob) == (best == given), "equal to the last bit, as lm-eval compares them"
    greedy = [one.best is not None and one.best[0] == given for one, given in zip(found, ids[1:], strict=True)]
    assert all(greedy) == (written_by == "the model")


def test_without_the_most_likely_nothing_is_drawn(tiny_served: Served) -> None:
    drawn: list[int] = []
    engine = ScriptedEngine(lambda ids, sampling, choice: drawn, logprob=-3.0)
    found = asyncio.run(likelihoods(engine, IDS))
    assert [(one.logprob, one.best) for one in found] == [(-3.0, None)] * (len(IDS) - 1)


def test_a_token_with_more_than_half_of_the_probability_needs_no_step() -> None:
    asked: list[int] = []

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        asked.append(len(ids))
        return [9]

    for logprob, steps in ((-0.5, []), (-0.69, [1, 2, 3])):
        asked.clear()
        engine = ScriptedEngine(reply, logprob=logprob)
        taken = Steps(engine)
        found = asyncio.run(likelihoods(engine, [5, 6, 9, 9], taken))
        assert sorted(asked) == steps
        assert taken.tokens == sum(steps) + len(steps), "what they read, and a token drawn by each"
        assert [one.best[0] for one in found if one.best] == ([6, 9, 9] if not steps else [9, 9, 9])


def test_where_one_step_fails_the_others_are_stopped() -> None:
    began = itertools.count()

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        next(began)
        raise RuntimeError("out of memory, on purpose")

    features = Features(max_length=500, vocabulary=400, logprobs=True, score=True)
    engine = ScriptedEngine(reply, features=features, logprob=-3.0)
    with pytest.raises(EngineError, match="on purpose"):
        asyncio.run(likelihoods(engine, [5] * 400, Steps(engine)))
    assert next(began) < 399


class Stuck(ScriptedEngine):
    """Scores at once, and never comes to the end of anything else."""

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        return [-3.0] * (len(ids) - start)


def test_texts_that_share_their_steps_take_so_many_at_a_time_together() -> None:
    asked: list[int] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        asked.append(len(ids))
        return [9]

    async def work() -> None:
        engine = Stuck(reply, delay_seconds=3600)
        steps = Steps(engine)
        working = [asyncio.create_task(likelihoods(engine, [5] * 400, steps)) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert len(asked) == 32
        assert steps.tokens == sum(asked) + 32
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        assert len(asked) == 32, "none goes on for nobody"

    asyncio.run(work())
