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


async def test_completions_are_in_the_order_of_their_choices_whatever_finishes_first() -> None:
    stream, cancelled = generation(n=2)
    for delta in (
        Delta(1, (7,), (-1.0,)),
        Delta(0, (5,), (-0.5,)),
        Delta(1, (), (), "stop"),
        Delta(0, (6,), (-0.25,), "length"),
    ):
        stream.push(delta)
    assert await stream.completions() == [
        Completion((5, 6), (-0.5, -0.25), "length"),
        Completion((7,), (-1.0,), "stop"),
    ]
    assert cancelled == []


async def test_iteration_ends_with_the_last_choice() -> None:
    stream, cancelled = generation(n=2)
    stream.push(Delta(0, (5,), None, "stop"))
    stream.push(Delta(1, (6,), None, "stop"))
    stream.push(Delta(1, (99,)))
    assert [delta.ids async for delta in stream] == [(5,), (6,)]
    assert cancelled == []


async def test_an_error_is_raised_where_it_falls_in_the_stream_and_cancels_nothing() -> None:
    stream, cancelled = generation()
    stream.push(Delta(0, (5,)))
    stream.fail(EngineError("gone"))
    deltas = aiter(stream)
    assert await anext(deltas) == Delta(0, (5,))
    with pytest.raises(EngineError, match="gone"):
        await anext(deltas)
    assert cancelled == []


async def test_a_break_a_cancelled_reader_and_a_failing_reader_cancel_what_is_open() -> None:
    async def leave(stream: Generation) -> None:
        async for _ in stream:
            break

    async def fail(stream: Generation) -> None:
        async for _ in stream:
            raise ValueError

    async def read_on(stream: Generation) -> None:
        await stream.completions()

    for reader in (leave, fail, read_on):
        stream, cancelled = generation(n=2)
        stream.push(Delta(0, (5,), None, "stop"))
        task = asyncio.create_task(reader(stream))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)
        assert cancelled == [None], reader.__name__


async def test_deltas_may_come_from_a_thread_in_order() -> None:
    stream, _ = generation()

    def work() -> None:
        for id_ in range(1000):
            stream.push(Delta(0, (id_,)))
        stream.push(Delta(0, (), None, "stop"))

    thread = threading.Thread(target=work)
    thread.start()
    (completion,) = await stream.completions()
    thread.join()
    assert completion.ids == tuple(range(1000))


def test_an_engine_may_go_on_pushing_when_the_loop_is_gone() -> None:
    async def open_generation() -> Generation:
        return generation()[0]

    stream = asyncio.run(open_generation())
    stream.push(Delta(0, (5,)))
    stream.fail(EngineError("nobody hears this"))
