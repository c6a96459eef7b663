"""Conversation in, answer out: template and engine composed once, for evaluation, chat, batch and serving alike.

The Answerer is async; `blocking` gives the same to code that is not. It does not know how ids become text (template), how
ids are computed (engine), or what answers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from corral.engines.base import Completion, Engine, Finish, Sampling
from corral.messages import Conversation
from corral.template import Template

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The choices for one prompt, as text and as ids."""

    texts: tuple[str, ...]
    completions: tuple[Completion, ...]
    prompt_tokens: int

    @property
    def text(self) -> str:
        """The first choice."""
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice; the last one carries `finish`."""

    choice: int
    text: str
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds the answers of a conversation."""

    nll: float
    """Negative log-likelihood in nats, summed over the trained tokens."""
    tokens: int


class Answerer:
    """A template over an engine.

    Args:
        sampling: the default; the template's stop ids are added to it.
    """

    def __init__(self, engine: Engine, template: Template, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.template = template
        self.sampling = sampling or Sampling()

    async def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
        """Complete a conversation that ends with the user.

        Raises:
            TemplateError: the template refuses the conversation.
            EngineError: the engine refuses or fails.
        """
        ids = self.template.prompt(conversation)
        completions = await self.engine.submit(ids, self._sampling(sampling)).completions()
        texts = tuple(self.template.decode(c.ids) for c in completions)
        return Answer(texts, tuple(completions), len(ids))

    async def stream(self, conversation: Conversation, sampling: Sampling | None = None) -> AsyncIterator[TextDelta]:
        """The same as text arrives. Leaving the iteration early cancels the work. Raises: as `answer`."""
        sampling = self._sampling(sampling)
        generation = self.engine.submit(self.template.prompt(conversation), sampling)
        decoders = [self.template.decoder() for _ in range(sampling.n)]
        try:
            async for delta in generation:
                decoder = decoders[delta.choice]
                text = decoder.push(delta.ids)
                if delta.finish is not None:
                    text += decoder.finish()
                if text or delta.finish:
                    yield TextDelta(delta.choice, text, delta.finish)
        finally:
            generation.cancel()

    async def score(self, conversation: Conversation) -> Score:
        """How likely the model finds the answers of a conversation. Raises: as `answer`."""
        encoded = self.template.encode(conversation)
        start = max(1, encoded.trained.index(True))
        logprobs = await self.engine.score(encoded.ids, start)
        trained = encoded.trained[start:]
        return Score(-sum(p for p, t in zip(logprobs, trained, strict=True) if t), sum(trained))

    def _sampling(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or self.sampling
        return replace(sampling, stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *self.template.stop_ids))))


class Blocking:
    """The sync face: an Answerer with an event loop of its own, in a thread. Made by `blocking`."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="corral-answerer", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end on the answerer's loop; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def answer(self, conversation: Conversation, sampling: Sampling | None = None) -> Answer:
        """See `Answerer.answer`."""
        return self.run(self.answerer.answer(conversation, sampling))

    def score(self, conversation: Conversation) -> Score:
        """See `Answerer.score`."""
        return self.run(self.answerer.score(conversation))

    def stream(self, conversation: Conversation, sampling: Sampling | None = None) -> Iterator[TextDelta]:
        """See `Answerer.stream`."""
        items: queue.SimpleQueue[TextDelta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with contextlib.aclosing(self.answerer.stream(conversation, sampling)) as deltas:  # pyright: ignore[reportArgumentType]
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


@contextlib.contextmanager
def blocking(answerer: Answerer) -> Generator[Blocking]:
    """An Answerer for code that is not async; its engine is closed with the context."""
    face = Blocking(answerer)
    try:
        yield face
    finally:
        face.close()
