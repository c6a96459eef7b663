"""An Answerer for code that is not async: its event loop runs in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Coroutine, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from corral.answering.answerer import Answer, Answerer, Score, TextDelta
from corral.engines.base import Sampling
from corral.messages import Conversation

T = TypeVar("T")


class SyncAnswerer:
    """An Answerer with an event loop of its own, in a thread. As a context manager it closes the engine at the end."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="corral-answerer", daemon=True)
        self._thread.start()

    def __enter__(self) -> SyncAnswerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the answerer's loop until it ends; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def answer(self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()) -> Answer:
        """See `Answerer.answer`."""
        return self.run(self.answerer.answer(conversation, sampling, stop))

    def score(self, conversation: Conversation) -> Score:
        """See `Answerer.score`."""
        return self.run(self.answerer.score(conversation))

    def stream(
        self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Generator[TextDelta, None, None]:
        """See `Answerer.stream`."""
        items: queue.SimpleQueue[TextDelta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with contextlib.aclosing(self.answerer.stream(conversation, sampling, stop)) as deltas:  # pyright: ignore[reportArgumentType]
                    async for delta in deltas:
                        items.put(delta)
                items.put(None)
            except BaseException as error:
                items.put(error)
                raise

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def close(self) -> None:
        """Close the engine and end the loop."""
        self.run(self.answerer.engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
