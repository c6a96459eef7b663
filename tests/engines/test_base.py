from __future__ import annotations

import asyncio
import threading

import pytest

from corral.engines.base import Completion, Delta, Generation
from corral.errors import EngineError


def generation(n: int = 1) -> tuple[Generation, list[int | None]]:
    """A Generation without an engine, and what it was told to cancel."""
    cancelled: list[int | None] = []
    return Generation(prompt_tokens=3, n=n, on_cancel=cancelled.append), cancelled


def test_completions_are_in_the_order_of_their_choices_whatever_finishes_first() -> None:
    async def test() -> None:
        made, cancelled = generation(n=2)
        for delta in (
            Delta(1, (7,), (-1.0,)),
            Delta(0, (5,), (-0.5,)),
            Delta(1, (), (), "stop"),
            Delta(0, (6,), (-0.25,), "length"),
        ):
            made.push(delta)
        assert await made.completions() == [
            Completion((5, 6), (-0.5, -0.25), "length"),
            Completion((7,), (-1.0,), "stop"),
        ]
        assert cancelled == []

    asyncio.run(test())


def test_iteration_ends_with_the_last_choice() -> None:
    async def test() -> None:
        made, cancelled = generation(n=2)
        made.push(Delta(0, (5,), None, "stop"))
        made.push(Delta(1, (6,), None, "stop"))
        made.push(Delta(1, (99,)))
        assert [delta.ids async for delta in made] == [(5,), (6,)]
        assert cancelled == []

    asyncio.run(test())


def test_an_error_is_raised_where_it_falls_in_the_stream_and_cancels_nothing() -> None:
    async def test() -> None:
        made, cancelled = generation()
        made.push(Delta(0, (5,)))
        made.fail(EngineError("gone"))
        stream = aiter(made)
        assert await anext(stream) == Delta(0, (5,))
        with pytest.raises(EngineError, match="gone"):
            await anext(stream)
        assert cancelled == []

    asyncio.run(test())


def test_a_break_a_cancelled_reader_and_a_failing_reader_cancel_what_is_open() -> None:
    async def leave(made: Generation) -> None:
        async for _ in made:
            break

    async def fail(made: Generation) -> None:
        async for _ in made:
            raise ValueError

    async def read_on(made: Generation) -> None:
        await made.completions()

    async def test() -> None:
        for reader in (leave, fail, read_on):
            made, cancelled = generation(n=2)
            made.push(Delta(0, (5,), None, "stop"))
            task = asyncio.create_task(reader(made))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0)
            assert cancelled == [None], reader.__name__

    asyncio.run(test())


def test_deltas_may_come_from_a_thread_in_order() -> None:
    async def test() -> None:
        made, _ = generation()

        def work() -> None:
            for id_ in range(1000):
                made.push(Delta(0, (id_,)))
            made.push(Delta(0, (), None, "stop"))

        thread = threading.Thread(target=work)
        thread.start()
        (completion,) = await made.completions()
        thread.join()
        assert completion.ids == tuple(range(1000))

    asyncio.run(test())


def test_an_engine_may_go_on_pushing_when_the_loop_is_gone() -> None:
    async def ask() -> Generation:
        return generation()[0]

    made = asyncio.run(ask())
    made.push(Delta(0, (5,)))
    made.fail(EngineError("nobody hears this"))
