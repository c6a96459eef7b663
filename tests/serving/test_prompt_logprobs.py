"""The most likely tokens that a client is told are those of the model itself, and what it takes to find them is bounded."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError
from corral.model.loading import load_model
from corral.serving.models import ServedModel
from corral.serving.prompt_logprobs import GreedySteps, score_prompt
from tests.serving.conftest import Serve, openai_client
from tests.serving.test_completions import TEXT, generate, ids_of, post

IDS = [1, 88, 12, 300, 45, 45, 45, 7, 210, 33, 160, 5, 91]


def truth(folder: Path, ids: list[int]) -> list[tuple[float, int, float]]:
    """(log-prob of the given token, the most likely one, its log-prob) after each id but the last, by transformers."""
    model: Any = load_model(folder)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    best = logprobs.max(-1)
    return [(float(logprobs[at, id_]), int(best.indices[at]), float(best.values[at])) for at, id_ in enumerate(ids[1:])]


async def greedy_from(served: ServedModel, ids: list[int], count: int) -> list[int]:
    (completion,) = await generate(served, ids, Sampling(count))
    return [*ids, *completion.ids]


@pytest.mark.parametrize("written_by", ["chance", "the model", "both"])
async def test_the_most_likely_token_at_each_position_is_the_models(
    written_by: str, tiny_served: ServedModel, tiny_folder: Path
) -> None:
    ids = {
        "chance": IDS,
        "the model": await greedy_from(tiny_served, [1], 20),
        "both": [*await greedy_from(tiny_served, IDS[:4], 6), *IDS[4:]],
    }[written_by]
    engine = tiny_served.answerer.engine
    scored = await score_prompt(engine, ids, GreedySteps(engine))
    for one, given, (logprob, best, of_best) in zip(scored, ids[1:], truth(tiny_folder, ids), strict=True):
        assert one.logprob == pytest.approx(logprob, abs=1e-4)
        assert one.best is not None
        assert one.best[0] == best
        assert one.best[1] == pytest.approx(of_best, abs=1e-4)
        assert (one.best[1] == one.logprob) == (best == given), "equal to the last bit, as lm-eval compares them"
    greedy = [one.best is not None and one.best[0] == given for one, given in zip(scored, ids[1:], strict=True)]
    assert all(greedy) == (written_by == "the model")


async def test_without_top_log_probs_no_token_is_generated() -> None:
    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        raise AssertionError("a token was drawn")

    engine = ScriptedEngine(reply, logprob=-3.0)
    scored = await score_prompt(engine, IDS)
    assert [(one.logprob, one.best) for one in scored] == [(-3.0, None)] * (len(IDS) - 1)


async def test_a_token_with_more_than_half_of_the_probability_needs_no_step() -> None:
    lengths: list[int] = []

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        lengths.append(len(ids))
        return [9]

    for logprob, steps in ((-0.5, []), (-0.69, [1, 2, 3])):
        lengths.clear()
        engine = ScriptedEngine(reply, logprob=logprob)
        taken = GreedySteps(engine)
        scored = await score_prompt(engine, [5, 6, 9, 9], taken)
        assert sorted(lengths) == steps
        assert taken.tokens == sum(steps) + len(steps), "what they read, and a token drawn by each"
        assert [one.best[0] for one in scored if one.best] == ([6, 9, 9] if not steps else [9, 9, 9])


async def test_a_failed_step_stops_the_others() -> None:
    began = itertools.count()

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        next(began)
        raise RuntimeError("out of memory, on purpose")

    features = Features(max_length=500, vocabulary=400, logprobs=True, score=True)
    engine = ScriptedEngine(reply, features=features, logprob=-3.0)
    with pytest.raises(EngineError, match="on purpose"):
        await score_prompt(engine, [5] * 400, GreedySteps(engine))
    assert next(began) < 399


class Stuck(ScriptedEngine):
    """Scores at once, and never comes to the end of anything else."""

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        return [-3.0] * (len(ids) - start)


async def test_texts_scored_together_share_the_limit_of_concurrent_steps() -> None:
    lengths: list[int] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        lengths.append(len(ids))
        return [9]

    engine = Stuck(reply, delay_seconds=3600)
    steps = GreedySteps(engine)
    working = [asyncio.create_task(score_prompt(engine, [5] * 400, steps)) for _ in range(8)]
    await asyncio.sleep(0.1)
    assert len(lengths) == 32
    assert steps.tokens == sum(lengths) + 32
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    assert len(lengths) == 32, "none goes on for nobody"


def lm_eval_reads(answer: Any, context: int) -> tuple[float, bool]:
    """A sum of log-probs and "greedy", read out of the answer in the places where lm-eval 0.4.13 reads them."""
    logprobs = answer["choices"][0]["logprobs"]
    values = logprobs["token_logprobs"][context:-1]
    most = [max(each.values()) for each in logprobs["top_logprobs"][context:-1]]
    return sum(values), values == most


async def test_lm_evals_log_likelihoods_are_right_even_where_the_model_would_stop(
    tiny_url: str, tiny_served: ServedModel
) -> None:
    engine, template = tiny_served.answerer.engine, tiny_served.answerer.template
    context = ids_of(template, TEXT)
    (greedy,) = await generate(tiny_served, context, Sampling(5))
    for ids in ([*context, *greedy.ids], [*context, *greedy.ids[:3], 60, 61], [*context, 44]):
        # As lm-eval asks: one token is drawn beside those scored, and left out by the place where it must stand.
        body: Any = {"model": "tiny", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
        (own,) = await generate(tiny_served, context, Sampling(len(ids) - len(context)))
        (after,) = await generate(tiny_served, ids, Sampling(1))
        for ends in ([], list(after.ids)):
            status, answer = post(tiny_url, body | {"seed": 1234, "stop_token_ids": ends})
            assert status == 200, answer
            assert answer["choices"][0]["finish_reason"] == ("stop" if ends else "length")
            total, is_greedy = lm_eval_reads(answer, len(context))
            assert total == pytest.approx(sum(await engine.score(ids, len(context))), abs=1e-4)
            assert is_greedy == (list(own.ids) == ids[len(context) :])


def test_a_client_that_goes_away_while_its_prompt_is_scored_stops_the_steps(serve: Serve) -> None:
    steps: list[int] = []

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        steps.append(len(ids))
        return [50]

    server = serve(ScriptedEngine(reply, delay_seconds=0.1, logprob=-5.0))
    with openai_client(server.url, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="m", prompt=[50] * 2000, max_tokens=0, echo=True, logprobs=1)
    time.sleep(1)
    assert len(steps) < 1000


def test_finding_the_most_likely_prompt_tokens_counts_towards_usage(serve: Serve) -> None:
    server = serve(ScriptedEngine([50], logprob=-5.0))
    body: Any = {"prompt": [[50] * 9] * 8, "max_tokens": 0, "echo": True}
    used = [server.complete(**body, logprobs=logprobs)[1]["usage"] for logprobs in (0, 1)]
    steps = sum(length + 1 for length in range(1, 9))
    assert [(each["prompt_tokens"], each["completion_tokens"]) for each in used] == [(72, 0), (72 + 8 * steps, 0)]


def test_top_prompt_log_probs_are_limited_to_one_prompt_of_eight_thousand_tokens(serve: Serve) -> None:
    features = Features(max_length=16384, vocabulary=400, logprobs=True, score=True)
    server = serve(ScriptedEngine([50], features=features, logprob=-0.1))
    body: Any = {"max_tokens": 1, "echo": True, "logprobs": 1}  # as lm-eval asks
    assert server.complete(**body, prompt=[[50] * 8192])[0] == 200
    status, answer = server.complete(**body, prompt=[[50] * 8193])
    assert (status, answer["error"]["param"]) == (400, "logprobs")
    assert "'logprobs': 0, which costs one pass" in answer["error"]["message"]
    assert server.complete(**(body | {"logprobs": 0}), prompt=[[50] * 8193])[0] == 200
