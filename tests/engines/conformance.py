"""The engine protocol as tests, which every engine passes.

A test file subclasses `EngineConformance` and gives it a `subject`. A feature that an engine does not have must be refused.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest

from corral.engines.base import OPTIONAL_SAMPLING, Completion, Delta, Engine, Finish, Generation, Sampling
from corral.errors import EngineClosedError, EngineError, RequestError

GREEDY = Sampling(max_tokens=12)
DRAWN = Sampling(max_tokens=12, temperature=1.0, seed=7)


@dataclass(frozen=True)
class Failing:
    """An engine that fails on one prompt, and computes the subject's."""

    make: Callable[[], AbstractAsyncContextManager[Engine]]
    prompt: Sequence[int]


@dataclass(frozen=True)
class Subject:
    make: Callable[[], AbstractAsyncContextManager[Engine]]
    """Opens a fresh engine that can compute 1,000 tokens of one prompt, slowly enough to be cancelled before the end."""
    prompts: Sequence[Sequence[int]]
    """At least four, of very different lengths, one of them a single id."""
    failing: Failing | None = None
    tolerance: float = 1e-3
    """Between log-probabilities that are the same in theory."""
    computes_logits: bool = True
    """Whether a model chooses the ids, so that what changes logits changes them."""


def long_run(n: int = 1) -> Sampling:
    return Sampling(max_tokens=1000, n=n, temperature=1.0, seed=1)


async def deltas_of(generation: Generation) -> list[Delta]:
    return [delta async for delta in generation]


async def complete(engine: Engine, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
    return await engine.submit(ids, sampling).completions()


def finishes(deltas: Sequence[Delta]) -> dict[int, list[Finish]]:
    reasons: dict[int, list[Finish]] = {}
    for delta in deltas:
        assert delta.choice not in reasons or not reasons[delta.choice], f"choice {delta.choice} went on after its end"
        reasons.setdefault(delta.choice, []).extend([delta.finish] if delta.finish else [])
    return reasons


def wait_for(condition: Callable[[], bool]) -> None:
    """Polls for as long as it takes: a test that would wait for ever fails by never ending."""
    while not condition():
        time.sleep(0.02)


def differ_in(completions: Sequence[Completion]) -> int:
    return len({completion.ids for completion in completions})


def honoured(engine: Engine) -> dict[str, Any]:
    """Changes of logits that the engine supports."""
    changes: dict[str, Any] = {
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "logit_bias": ((3, 2.0),),
        "min_p": 0.01,
    }
    return {name: value for name, value in changes.items() if name in engine.features.honours}


def check_tops(ids: Sequence[int], logprobs: Any, tops: Any, tolerance: float) -> None:
    """That the most likely ids are in order, differ, and agree with the log-probability of the id at their place."""
    for id_, logprob, top in zip(ids, logprobs, tops, strict=True):
        values = [value for _, value in top]
        assert values == sorted(values, reverse=True)
        assert len(dict(top)) == len(top)
        assert dict(top).get(id_, logprob) == pytest.approx(logprob, abs=tolerance)
        assert id_ in dict(top) or logprob <= values[-1] + tolerance


class EngineConformance:
    """Subclass as `Test…` and define the fixture `subject`."""

    @pytest.fixture
    def subject(self) -> Subject:
        raise NotImplementedError("a subclass defines the engine to test")

    # What a completion is

    async def test_each_of_n_choices_finishes_exactly_once_and_nothing_follows(self, subject: Subject) -> None:
        async with subject.make() as engine:
            ended = finishes(await deltas_of(engine.submit(subject.prompts[0], replace(DRAWN, n=5))))
        assert sorted(ended) == [0, 1, 2, 3, 4]
        assert all(len(each) == 1 for each in ended.values())

    @pytest.mark.parametrize("max_tokens", [1, 2, 9])
    async def test_max_tokens_ends_with_length_after_exactly_that_many(self, subject: Subject, max_tokens: int) -> None:
        async with subject.make() as engine:
            completions = await complete(engine, subject.prompts[1], replace(DRAWN, n=3, max_tokens=max_tokens))
        for completion in completions:
            assert completion.finish == "length"
            assert len(completion.ids) == max_tokens

    async def test_a_stop_id_ends_its_choice_and_is_left_out(self, subject: Subject) -> None:
        async with subject.make() as engine:
            sampling = replace(DRAWN, n=2, max_tokens=20)
            free = await complete(engine, subject.prompts[2], sampling)
            stop = free[0].ids[5]
            stopped = await complete(engine, subject.prompts[2], replace(sampling, stop_ids=(stop,)))
        for whole, cut in zip(free, stopped, strict=True):
            assert cut.finish == ("stop" if stop in whole.ids else "length")
            assert cut.ids == (whole.ids[: whole.ids.index(stop)] if stop in whole.ids else whole.ids)

    async def test_a_stop_id_at_once_leaves_an_empty_completion(self, subject: Subject) -> None:
        async with subject.make() as engine:
            (free,) = await complete(engine, subject.prompts[0], GREEDY)
            logprobs = engine.features.logprobs
            (empty,) = await complete(
                engine, subject.prompts[0], replace(GREEDY, stop_ids=(free.ids[0],), logprobs=logprobs)
            )
        assert (empty.ids, empty.finish) == ((), "stop")
        assert empty.logprobs in ((), None)

    async def test_streamed_deltas_put_together_are_the_completions(self, subject: Subject) -> None:
        async with subject.make() as engine:
            sampling = replace(DRAWN, n=3, logprobs=engine.features.logprobs)
            generation = engine.submit(subject.prompts[1], sampling)
            assert generation.prompt_tokens == len(subject.prompts[1])
            deltas = await deltas_of(generation)
            completions = await complete(engine, subject.prompts[1], sampling)
        for choice, completion in enumerate(completions):
            own = [delta for delta in deltas if delta.choice == choice]
            assert tuple(id_ for delta in own for id_ in delta.ids) == completion.ids
            if completion.logprobs is not None:
                streamed = [value for delta in own for value in delta.logprobs or ()]
                assert streamed == pytest.approx(completion.logprobs, abs=subject.tolerance)

    # How it is drawn

    async def test_greedy_gives_the_same_ids_every_time_alone_and_among_others(self, subject: Subject) -> None:
        async with subject.make() as engine:
            alone = [await complete(engine, prompt, GREEDY) for prompt in subject.prompts]
            together = await asyncio.gather(*(complete(engine, prompt, GREEDY) for prompt in subject.prompts))
        assert alone == together

    async def test_a_seed_gives_the_same_ids_alone_and_among_others(self, subject: Subject) -> None:
        async with subject.make() as engine:
            changed = replace(DRAWN, top_p=0.8, **honoured(engine))
            samplings = [replace(DRAWN, n=2), changed, replace(DRAWN, top_k=20, temperature=0.5), GREEDY]
            work = list(zip(subject.prompts, samplings, strict=False))
            alone = [await complete(engine, *each) for each in work]
            together = await asyncio.gather(*(complete(engine, *each) for each in work))
        assert alone == together

    async def test_another_seed_another_choice_or_no_seed_gives_other_ids(self, subject: Subject) -> None:
        async with subject.make() as engine:
            samplings = [replace(DRAWN, n=2), replace(DRAWN, seed=8), *[replace(DRAWN, seed=None)] * 2]
            done = await asyncio.gather(*(complete(engine, subject.prompts[0], each) for each in samplings))
            completions = [completion for completions in done for completion in completions]
        assert differ_in(completions) == len(completions) == 5

    # Log-probabilities

    async def test_logprobs_come_when_asked_for_and_only_then(self, subject: Subject) -> None:
        async with subject.make() as engine:
            (without,) = await complete(engine, subject.prompts[0], DRAWN)
            assert without.logprobs is None
            if engine.features.logprobs:
                for completion in await complete(engine, subject.prompts[0], replace(DRAWN, n=2, logprobs=True)):
                    assert completion.logprobs is not None
                    assert len(completion.logprobs) == len(completion.ids)
                    assert all(value <= 0 for value in completion.logprobs)
            else:
                with pytest.raises(RequestError):
                    engine.submit(subject.prompts[0], replace(DRAWN, logprobs=True))

    @pytest.mark.parametrize(
        "sampling", [GREEDY, replace(DRAWN, n=2, temperature=0.6, top_p=0.9)], ids=["greedy", "drawn"]
    )
    async def test_logprobs_of_a_completion_are_its_scores(self, subject: Subject, sampling: Sampling) -> None:
        async with subject.make() as engine:
            if not (engine.features.logprobs and engine.features.score):
                pytest.skip("the engine gives log-probabilities in one way at most")
            for prompt, more in product(subject.prompts, ({}, honoured(engine))):
                for completion in await complete(engine, prompt, replace(sampling, logprobs=True, **more)):
                    scores = await engine.score([*prompt, *completion.ids], len(prompt))
                    assert scores == pytest.approx(completion.logprobs, abs=subject.tolerance)

    async def test_scores_are_as_many_as_asked_for_and_the_same_together(self, subject: Subject) -> None:
        longest = max(subject.prompts, key=len)

        async with subject.make() as engine:
            if not engine.features.score:
                with pytest.raises(RequestError):
                    await engine.score(longest)
                return
            whole = await engine.score(longest)
            assert len(whole) == len(longest) - 1
            together = await asyncio.gather(*(engine.score(longest, start) for start in range(1, len(longest) + 1)))
            for start, scores in enumerate(together, start=1):
                assert scores == pytest.approx(whole[start - 1 :], abs=subject.tolerance)

    async def test_the_most_likely_ids_come_with_those_sampled_and_with_those_scored(self, subject: Subject) -> None:
        async with subject.make() as engine:
            prompt = subject.prompts[2]
            if "top_logprobs" not in engine.features.honours:
                with pytest.raises(RequestError, match=r"top_logprobs|log-probabilities"):
                    engine.submit(prompt, replace(GREEDY, logprobs=True, top_logprobs=2))
            else:
                sampling = replace(DRAWN, n=2, logprobs=True, top_logprobs=5)
                mixed = [(sampling, 5), (replace(sampling, top_logprobs=2), 2), (replace(sampling, top_logprobs=0), 0)]
                done = await asyncio.gather(*(complete(engine, prompt, each) for each, _ in mixed))
                for (_, count), (completion, _) in zip(mixed, done, strict=True):
                    assert completion.ids == done[0][0].ids
                    assert [len(top) for top in completion.top_logprobs or ()] == [count] * len(completion.ids) * bool(
                        count
                    )
                for completion in done[0]:
                    check_tops(completion.ids, completion.logprobs, completion.top_logprobs, subject.tolerance)
            if not engine.features.score_top:
                with pytest.raises(RequestError, match="alternatives"):
                    await engine.score_top(prompt)
                return
            longest = max(subject.prompts, key=len)
            plain = await engine.score(longest)
            for top in (1, 5, 20):
                scored = await engine.score_top(longest, top=top)
                logprobs = [each.logprob for each in scored]
                assert logprobs == pytest.approx(plain, abs=subject.tolerance)
                assert {len(each.top) for each in scored} == {top}
                check_tops(longest[1:], logprobs, [each.top for each in scored], subject.tolerance)
            tail = await engine.score_top(longest, len(longest) - 2, top=3)
            assert [each.logprob for each in tail] == pytest.approx(plain[-2:], abs=subject.tolerance)
            assert await engine.score_top(longest, len(longest), top=3) == []
            for count in (0, 21):
                with pytest.raises(RequestError, match=f"top = {count}"):
                    await engine.score_top(longest, top=count)

    # Fields that not every engine supports

    @pytest.mark.parametrize("name", OPTIONAL_SAMPLING)
    async def test_a_field_that_an_engine_does_not_support_is_refused_and_its_neutral_value_is_not(
        self, subject: Subject, name: str
    ) -> None:
        values: dict[str, Any] = {"logit_bias": ((1, 1.0),), "min_tokens": 1, "top_logprobs": 1}
        async with subject.make() as engine:
            asked = replace(GREEDY, logprobs=engine.features.logprobs, **{name: values.get(name, 0.5)})
            if name in engine.features.honours:
                (completion,) = await complete(engine, subject.prompts[0], asked)
                assert len(completion.ids) == GREEDY.max_tokens
            else:
                with pytest.raises(RequestError, match=name):
                    engine.submit(subject.prompts[0], asked)
            await complete(engine, subject.prompts[0], replace(asked, **{name: OPTIONAL_SAMPLING[name]}))

    async def test_no_stop_id_ends_an_answer_before_min_tokens(self, subject: Subject) -> None:
        async with subject.make() as engine:
            if "min_tokens" not in engine.features.honours:
                pytest.skip("the engine does not support min_tokens")
            sampling = replace(DRAWN, n=3, max_tokens=20)
            free = await complete(engine, subject.prompts[2], sampling)
            stops = tuple({completion.ids[1] for completion in free})
            late = await complete(engine, subject.prompts[2], replace(sampling, stop_ids=stops, min_tokens=8))
        for whole, completion in zip(free, late, strict=True):
            assert completion.ids[0] == whole.ids[0]
            assert len(completion.ids) >= 8
            assert not set(completion.ids[:8]) & set(stops)

    async def test_a_bias_makes_an_id_certain_or_impossible(self, subject: Subject) -> None:
        async with subject.make() as engine:
            if "logit_bias" not in engine.features.honours or not subject.computes_logits:
                pytest.skip("the engine does not support logit_bias")
            (free,) = await complete(engine, subject.prompts[2], GREEDY)
            forced, banned = (replace(DRAWN, logit_bias=((free.ids[0], bias),)) for bias in (100.0, -100.0))
            (always,), (never,), (again,) = await asyncio.gather(
                *(complete(engine, subject.prompts[2], each) for each in (forced, banned, GREEDY))
            )
        assert set(always.ids) == {free.ids[0]}
        assert free.ids[0] not in never.ids
        assert again == free

    @pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
    async def test_a_penalty_lessens_repetition_and_its_opposite_increases_it(
        self, subject: Subject, name: str
    ) -> None:
        async with subject.make() as engine:
            if name not in engine.features.honours or not subject.computes_logits:
                pytest.skip(f"the engine does not support {name}")
            values = (0.3, 1.0, 3.0) if name == "repetition_penalty" else (-2.0, 0.0, 2.0)
            usual = Sampling(max_tokens=60, n=8, temperature=2.0, seed=3)
            changes: list[dict[str, Any]] = [{name: value} for value in values]
            samplings = [replace(usual, **change) for change in changes]
            done = await asyncio.gather(*(complete(engine, subject.prompts[1], each) for each in samplings))
        most, some, least = (sum(len(set(each.ids)) for each in completions) for completions in done)
        assert most < some < least

    async def test_min_p_of_1_leaves_only_the_most_likely_id(self, subject: Subject) -> None:
        async with subject.make() as engine:
            if "min_p" not in engine.features.honours or not subject.computes_logits:
                pytest.skip("the engine does not support min_p")
            drawn = await complete(engine, subject.prompts[2], replace(DRAWN, n=4, min_p=1.0))
            (greedy,) = await complete(engine, subject.prompts[2], GREEDY)
        assert drawn == [greedy] * 4

    # Cancelling

    async def test_cancelling_scores_that_wait_leaves_the_others(self, subject: Subject) -> None:
        longest = max(subject.prompts, key=len)

        async with subject.make() as engine:
            if not engine.features.score:
                pytest.skip("the engine does not score")
            alone = await engine.score(longest)
            tasks = [asyncio.create_task(engine.score(longest)) for _ in range(200)]
            await asyncio.sleep(0)
            for task in tasks[1::2]:
                task.cancel()
            for i, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                assert (
                    isinstance(result, asyncio.CancelledError)
                    if i % 2
                    else result == pytest.approx(alone, abs=subject.tolerance)
                )
            assert await engine.score(longest) == pytest.approx(alone, abs=subject.tolerance)

    async def test_cancelling_one_choice_leaves_the_others(self, subject: Subject) -> None:
        async with subject.make() as engine:
            generation = engine.submit(subject.prompts[0], long_run(n=3))
            deltas: list[Delta] = []
            async for delta in generation:
                if not deltas:
                    generation.cancel(1)
                deltas.append(delta)
        assert finishes(deltas) == {0: ["length"], 1: ["cancelled"], 2: ["length"]}

    async def test_cancelling_all_ends_every_choice_before_its_time(self, subject: Subject) -> None:
        async with subject.make() as engine:
            generation = engine.submit(subject.prompts[0], long_run(n=3))
            asyncio.get_running_loop().call_soon(generation.cancel)
            at_once = await generation.completions()
            generation = engine.submit(subject.prompts[0], long_run(n=3))
            asyncio.get_running_loop().call_later(0.02, generation.cancel)
            later = await generation.completions()
        for completion in (*at_once, *later):
            assert completion.finish == "cancelled"
            assert len(completion.ids) < 1000

    async def test_cancelling_what_has_ended_or_never_was_does_nothing(self, subject: Subject) -> None:
        async with subject.make() as engine:
            generation = engine.submit(subject.prompts[0], GREEDY)
            generation.cancel(5)
            (completion,) = await generation.completions()
            assert completion.finish == "length"
            generation.cancel()
            generation.cancel(0)
            assert await complete(engine, subject.prompts[0], GREEDY) == [completion]

    async def test_cancelling_the_task_that_asks_frees_its_work(self, subject: Subject) -> None:
        async with subject.make() as engine:
            generation = engine.submit(subject.prompts[0], long_run(n=2))
            task = asyncio.create_task(generation.completions())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            rest = await deltas_of(generation)
            assert [delta.finish for delta in rest if delta.finish] == ["cancelled"] * 2
            (completion,) = await complete(engine, subject.prompts[0], GREEDY)
            assert completion.finish == "length"

    async def test_leaving_a_stream_early_frees_its_work(self, subject: Subject) -> None:
        async with subject.make() as engine:
            generation = engine.submit(subject.prompts[0], long_run(n=2))
            async for _ in generation:
                break
            rest = await deltas_of(generation)
            assert [delta.finish for delta in rest if delta.finish] == ["cancelled"] * 2

    # Refusing, failing, closing

    @pytest.mark.parametrize(
        "change",
        [
            {"n": 0},
            {"max_tokens": 0},
            {"temperature": -0.1},
            {"temperature": float("inf")},
            {"temperature": float("nan")},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"top_p": float("nan")},
            {"top_k": -1},
            {"max_tokens": 10**9},
            {"min_p": 1.1},
            {"min_p": float("nan")},
            {"repetition_penalty": 0.0},
            {"repetition_penalty": float("inf")},
            {"frequency_penalty": 2.5},
            {"presence_penalty": float("nan")},
            {"logit_bias": ((-1, 1.0),)},
            {"logit_bias": ((1, 101.0),)},
            {"min_tokens": 13},
            {"top_logprobs": 21},
            {"top_logprobs": 3},
        ],
        ids=str,
    )
    async def test_impossible_sampling_is_refused_before_any_work(
        self, subject: Subject, change: dict[str, Any]
    ) -> None:
        async with subject.make() as engine:
            with pytest.raises(RequestError) as caught:
                engine.submit(subject.prompts[0], replace(DRAWN, **change))
            ((name, value),) = change.items()
            assert name in str(caught.value)
            assert name == "logit_bias" or str(value) in str(caught.value)

    async def test_impossible_ids_are_refused_before_any_work(self, subject: Subject) -> None:
        async with subject.make() as engine:
            too_long = [*subject.prompts[0], *[1] * engine.features.max_length]
            for ids in ([], [engine.features.vocabulary], [1, -1], too_long):
                with pytest.raises(RequestError):
                    engine.submit(ids, GREEDY)
                with pytest.raises(RequestError):
                    await engine.score(ids)
            for start in (0, -1, 4):
                with pytest.raises(RequestError):
                    await engine.score([1, 2, 3], start)

    async def test_prompt_and_completion_may_fill_the_context_but_not_exceed_it(self, subject: Subject) -> None:
        async with subject.make() as engine:
            ids = [subject.prompts[0][0]] * (engine.features.max_length - 3)
            with pytest.raises(RequestError, match=f"{len(ids)} prompt .* 4 new .* {engine.features.max_length}"):
                engine.submit(ids, replace(GREEDY, max_tokens=4))
            (completion,) = await complete(engine, ids, replace(GREEDY, max_tokens=3))
            assert len(completion.ids) == 3

    async def test_an_error_reaches_its_request_and_the_engine_goes_on(self, subject: Subject) -> None:
        failing = subject.failing
        if failing is None:
            pytest.skip("this engine cannot be made to fail on one prompt")
        async with failing.make() as engine:
            before = [await complete(engine, prompt, GREEDY) for prompt in subject.prompts]
            with pytest.raises(EngineError):
                await complete(engine, failing.prompt, replace(GREEDY, n=3))
            mixed = [complete(engine, prompt, GREEDY) for prompt in (*subject.prompts, failing.prompt)]
            *others, failed = await asyncio.gather(*mixed, return_exceptions=True)
            assert isinstance(failed, EngineError)
            assert others == before
            assert [await complete(engine, prompt, GREEDY) for prompt in subject.prompts] == before

    async def test_closing_fails_what_is_under_way_and_closing_again_is_allowed(self, subject: Subject) -> None:
        async with subject.make() as engine:
            tasks = [asyncio.create_task(complete(engine, prompt, long_run(n=2))) for prompt in subject.prompts]
            longest = max(subject.prompts, key=len)
            scores = [asyncio.create_task(engine.score(longest)) for _ in range(20 if engine.features.score else 0)]
            await asyncio.sleep(0.02)
            await asyncio.gather(engine.close(), engine.close())
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineClosedError)
            for result in await asyncio.gather(*scores, return_exceptions=True):
                assert isinstance(result, list | EngineClosedError)
            await engine.close()

    async def test_a_closed_engine_refuses(self, subject: Subject) -> None:
        async with subject.make() as engine:
            await engine.close()
            with pytest.raises(EngineClosedError):
                engine.submit(subject.prompts[0], GREEDY)
            if engine.features.score:
                with pytest.raises(EngineClosedError):
                    await engine.score(max(subject.prompts, key=len))

    # Many at once, and many loops

    async def test_32_requests_at_once_are_all_answered_as_alone(self, subject: Subject) -> None:
        async with subject.make() as engine:
            work = [(subject.prompts[i % 4], replace(DRAWN, n=1 + i % 3, max_tokens=1 + i, seed=i)) for i in range(32)]
            together = await asyncio.gather(*(complete(engine, *each) for each in work))
            for (_, sampling), completions in zip(work, together, strict=True):
                assert [len(completion.ids) for completion in completions] == [sampling.max_tokens] * sampling.n
            for i in (0, 13, 31):
                assert await complete(engine, *work[i]) == together[i]

    def test_one_engine_serves_several_event_loops_one_after_another_and_side_by_side(self, subject: Subject) -> None:
        engine = asyncio.run(_enter(subject.make()))
        prompt = subject.prompts[1]

        async def leave_behind() -> None:
            engine.submit(prompt, long_run(n=2))
            await asyncio.sleep(0)

        first = asyncio.run(complete(engine, prompt, DRAWN))
        asyncio.run(leave_behind())
        answers: list[list[Completion]] = []
        threads = [
            threading.Thread(target=lambda: answers.append(asyncio.run(complete(engine, prompt, DRAWN))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [first] * 4
        asyncio.run(engine.close())


def _enter(opened: AbstractAsyncContextManager[Engine]) -> Coroutine[Any, Any, Engine]:
    return opened.__aenter__()
