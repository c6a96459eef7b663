"""PromptFile → finished rows through an Answerer on this machine, as many at once as keep its engine full.

A row that the engine cannot do is a bad row. Where the engine fails, the rows that were under way are asked again one by
one (which of them is to blame cannot be seen while they share it), and a plain question tells a row that breaks the engine
from an engine that is broken. It does not know where rows come from or go to.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from corral.answering.answerer import Answer, Answerer
from corral.batch.prompts import Prompt
from corral.errors import CorralError, EngineError, RequestError, TemplateError
from corral.interrupts import Interrupts, Stopped
from corral.messages import Conversation

KeepRow: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Takes a finished row."""

COMPLETIONS_IN_FLIGHT = 320
"""Asked of an engine at once: OpenVINO computes up to 256 together, and a quarter more are ready when some end."""
_ATTEMPTS = 2
"""How often a row may break the engine alone until it is a bad row."""
_PLAIN = Prompt(-1, {}, Conversation.from_turns(("user", "Hello")))
"""What any engine that works can answer."""


def prompts_in_flight(choices: int) -> int:
    """PromptFile under way together, of so many completions each."""
    return -(-COMPLETIONS_IN_FLIGHT // choices)


async def answer_row(answerer: Answerer, prompt: Prompt, seed: int) -> dict[str, Any]:
    """The finished row of a prompt, perhaps a bad one. Raises: EngineError (the engine fails)."""
    assert prompt.conversation is not None, "a faulty row is not asked"
    digest = hashlib.sha256(f"{seed} {prompt.index}".encode()).digest()
    sampling = replace(answerer.sampling, seed=int.from_bytes(digest[:4]))
    try:
        return finished(prompt, await answerer.answer(prompt.conversation, sampling))
    except (RequestError, TemplateError) as error:
        return prompt.error_row(error.what)


def finished(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The row of the output: `tokens` are those drawn for all candidates."""
    row: dict[str, Any] = {
        "index": prompt.index,
        **prompt.id_field,
        "answer": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.completion_tokens,
    }
    if answer.result != answer.text:
        row["result"] = answer.result
    return row | answer.vote_fields()


class RowAnswerer:
    """Answers prompts through one Answerer, many at once on one event loop, and tells bad rows from a broken engine.

    A row that fails beside others is asked again when nobody else is, twice if need be. It is bad if it fails each time while
    the engine answers a plain question, asked in the same way, after each.
    """

    def __init__(self, answerer: Answerer, seed: int) -> None:
        self._answerer = answerer
        self._seed = seed
        self._together = 0
        """RowAnswerer under way beside each other."""
        self._suspects = 0
        """RowAnswerer that wait to be asked alone, or are; nothing new begins beside them."""
        self._none_together, self._no_suspects = asyncio.Event(), asyncio.Event()
        self._alone = asyncio.Lock()

    async def of(self, prompt: Prompt) -> dict[str, Any]:
        """The finished row of a prompt, perhaps a bad one. Raises: EngineError (the engine is broken)."""
        while self._suspects:
            await self._no_suspects.wait()
        self._together += 1
        self._none_together.clear()
        try:
            return await answer_row(self._answerer, prompt, self._seed)
        except EngineError:
            self._suspects += 1
            self._no_suspects.clear()
        finally:
            self._together -= 1
            if not self._together:
                self._none_together.set()
        try:
            async with self._alone:
                await self._none_together.wait()
                return await self._suspect(prompt)
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._no_suspects.set()

    async def _suspect(self, prompt: Prompt) -> dict[str, Any]:
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return await answer_row(self._answerer, prompt, self._seed)
            except EngineError as error:
                await self._must_work(error)
                reason = error.what
        return prompt.error_row(reason)

    async def _must_work(self, failure: EngineError) -> None:
        """Raises: the failure, unless the engine works."""
        try:
            plain = await answer_row(self._answerer, _PLAIN, self._seed)
        except EngineError:
            raise failure from None
        if "error" in plain:
            raise failure


def answer_locally(
    open_answerer: Callable[[], Answerer], choices: int, seed: int, prompts: Iterator[Prompt], keep: KeepRow
) -> None:
    """Answer all prompts; the first signal ends it in order, at once, and what is under way is dropped.

    Raises:
        CorralError: the model cannot be loaded, the engine is broken, or `keep` fails.
        Stopped: by a signal.
    """
    answerer = open_answerer()
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        work = _Work(answerer, seed, prompts, keep)

        def stop() -> None:
            loop.call_soon_threadsafe(work.stop)

        interrupts = Interrupts(stop)
        with interrupts, interrupts.deferred():
            try:
                runner.run(work.run(prompts_in_flight(choices)))
            except asyncio.CancelledError:
                raise Stopped(interrupts.signal) from None


class _Work:
    def __init__(self, answerer: Answerer, seed: int, prompts: Iterator[Prompt], keep: KeepRow) -> None:
        self._engine = answerer.engine
        self._rows = RowAnswerer(answerer, seed)
        self._prompts = prompts
        self._keep = keep
        self._task: asyncio.Task[Any] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Cancel the work; on its loop."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def run(self, prompts_in_flight: int) -> None:
        """Answer all prompts, and close the engine. Raises: CorralError."""
        self._task = asyncio.current_task()
        if self._stopped:
            raise asyncio.CancelledError
        async with self._engine:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(prompts_in_flight):
                        group.create_task(self._lane())
            except* CorralError as errors:
                # Many fail alike; one error is what a person can read.
                raise _first(errors) from None

    async def _lane(self) -> None:
        for prompt in self._prompts:
            self._keep(await self._rows.of(prompt))


def _first(errors: BaseExceptionGroup[CorralError]) -> CorralError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
