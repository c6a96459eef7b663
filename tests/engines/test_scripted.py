from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError, RequestError
from tests.engines.conformance import DRAWN, GREEDY, EngineConformance, Failing, Subject, complete, deltas_of

PROMPTS = ([3], [4, 5], [6, 7, 8, 9], [1] * 30)


def babble(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
    """Endless ids that depend on what a model's would depend on."""
    seed = random.random() if sampling.seed is None else sampling.seed
    drawn = "greedy" if sampling.temperature == 0 else f"{seed}:{choice}"
    numbers = random.Random(f"{ids}:{drawn}")
    while True:
        yield numbers.randrange(256)


def breaking(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
    for id_ in babble(ids, sampling, choice):
        yield id_
        if list(ids) == [13]:
            raise RuntimeError("out of memory, on purpose")


class TestScriptedEngine(EngineConformance):
    @pytest.fixture(params=[1, 4], ids="chunk={}".format)
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return Subject(
            make=lambda: ScriptedEngine(babble, chunk=request.param, delay_seconds=0.001),
            prompts=PROMPTS,
            failing=Failing(lambda: ScriptedEngine(breaking), [13]),
            computes_logits=False,
        )


class TestScriptedEngineWithoutScores(EngineConformance):
    @pytest.fixture
    def subject(self) -> Subject:
        features = Features(max_length=2000, vocabulary=256, logprobs=False, score=False)
        return Subject(lambda: ScriptedEngine(babble, features=features, delay_seconds=0.001), PROMPTS)


async def test_a_fixed_reply_is_given_to_everybody_and_stops_by_itself() -> None:
    async with ScriptedEngine([5, 6, 7]) as engine:
        for completion in await complete(engine, [1, 2], Sampling(n=2)):
            assert (completion.ids, completion.finish) == ((5, 6, 7), "stop")


async def test_a_reply_that_ends_with_a_chunk_ends_with_stop_too() -> None:
    async with ScriptedEngine([5, 6, 7, 8], chunk=2) as engine:
        deltas = await deltas_of(engine.submit([1], Sampling()))
    assert [delta.ids for delta in deltas] == [(5, 6), (7, 8), ()]
    assert deltas[-1].finish == "stop"


async def test_a_reply_may_depend_on_prompt_sampling_and_choice() -> None:
    async with ScriptedEngine(lambda ids, sampling, choice: [*ids, sampling.max_tokens, choice]) as engine:
        completions = await complete(engine, [8, 9], Sampling(n=2, max_tokens=50))
    assert [completion.ids for completion in completions] == [(8, 9, 50, 0), (8, 9, 50, 1)]


async def test_what_was_written_before_a_failure_still_arrives() -> None:
    async with ScriptedEngine(breaking) as engine:
        stream = aiter(engine.submit([13], GREEDY))
        assert len((await anext(stream)).ids) == 1
        with pytest.raises(EngineError, match="on purpose"):
            await anext(stream)


async def test_an_error_of_the_tree_passes_as_it_is() -> None:
    def refuse(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        raise RequestError("not today", hint="ask tomorrow")

    async with ScriptedEngine(refuse) as engine:
        with pytest.raises(RequestError, match="not today"):
            await complete(engine, [1], DRAWN)


async def test_every_id_has_the_given_logprob() -> None:
    async with ScriptedEngine([5, 6], logprob=-2.0) as engine:
        assert await engine.score([1, 2, 3]) == [-2.0, -2.0]
        (completion,) = await complete(engine, [1], Sampling(logprobs=True))
        assert completion.logprobs == (-2.0, -2.0)


def test_the_fake_is_light_to_import() -> None:
    code = "import sys, corral.engines.scripted; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
