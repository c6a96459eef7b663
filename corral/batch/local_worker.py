"""Answers prompts through an Answerer on this machine, as many at once as keep its engine full.

A row that the engine refuses is a bad row. If the engine fails, the rows under way are asked again in ever smaller groups,
because it cannot be seen which of them made it fail; a plain question after each failure tells a bad row from a broken
engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from corral.answering.answerer import Answerer
from corral.batch.prompts import Prompt
from corral.errors import CorralError, EngineError, RequestError, TemplateError, first_error
from corral.interrupts import Interrupts, Stopped
from corral.messages import Conversation

KeepRow: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Called with each finished row."""

COMPLETIONS_IN_FLIGHT = 320
"""Requested from an engine at once: OpenVINO computes up to 256 together, and a quarter more wait for those that end."""
_ATTEMPTS = 2
"""A row is bad when the engine has failed so often on it alone."""
_PROBE = Prompt(-1, {}, Conversation.from_turns(("user", "Hello")))
"""A working engine can answer this."""


def prompts_in_flight(choices: int, requests: int | None = None) -> int:
    """How many prompts are answered at once, with so many completions each.

    Args:
        requests: how many the engine takes at once, if it says so; a quarter more wait for those that end.
    """
    return -(-COMPLETIONS_IN_FLIGHT // choices) if requests is None else -(-5 * requests // 4)


async def answer_row(answerer: Answerer, prompt: Prompt, seed: int) -> dict[str, Any]:
    """The finished row of a prompt, perhaps a bad one. Raises: EngineError (the engine failed)."""
    assert prompt.conversation is not None, "a faulty row has no conversation"
    sampling = replace(answerer.sampling, seed=seed).for_row(prompt.index)
    try:
        answer = await answerer.answer(prompt.conversation, sampling)
    except (RequestError, TemplateError) as error:
        return prompt.error_row(error.what)
    return {
        "index": prompt.index,
        **prompt.id_field,
        "answer": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.completion_tokens,
        **({"result": answer.result} if answer.result != answer.text else {}),
        **answer.vote_fields(),
    }


class RowAnswerer:
    """Answers prompts through one Answerer, many at once on one event loop, and tells bad rows from a broken engine.

    Rows that fail beside each other are suspects. They are asked again in halves, and the failed ones of a half in halves of
    that, until those that make the engine fail are alone: one bad row among n costs about 2 log2(n) more rounds. A row is bad
    if it fails alone twice while the engine answers a plain question, asked in the same way, after each failure.
    """

    def __init__(self, answerer: Answerer, seed: int) -> None:
        self._answerer = answerer
        self._seed = seed
        self._together = 0
        """Rows that are being answered beside each other."""
        self._suspects: dict[asyncio.Future[dict[str, Any]], Prompt] = {}
        """Rows that failed, and where their result is awaited; no other row begins meanwhile."""
        self._none_together, self._no_suspects = asyncio.Event(), asyncio.Event()
        self._settling = asyncio.Lock()

    async def answer(self, prompt: Prompt) -> dict[str, Any]:
        """The finished row of a prompt, perhaps a bad one. Raises: EngineError (the engine is broken)."""
        while self._suspects:
            await self._no_suspects.wait()
        self._together += 1
        self._none_together.clear()
        result: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            return await answer_row(self._answerer, prompt, self._seed)
        except EngineError:
            self._suspects[result] = prompt
            self._no_suspects.clear()
        finally:
            self._together -= 1
            if not self._together:
                self._none_together.set()
        async with self._settling:  # the first suspect settles all
            await self._none_together.wait()
            if not result.done():
                await self._settle_suspects()
        return result.result()

    async def _settle_suspects(self) -> None:
        """Give every suspect its row, or the failure of a broken engine."""
        try:
            await self._settle([*self._suspects])
        except EngineError as failure:
            for result in self._suspects:
                if not result.done():
                    result.set_exception(failure)
                    result.exception()  # a waiter may have been cancelled
        finally:
            self._suspects.clear()
            self._no_suspects.set()

    async def _settle(self, suspects: list[asyncio.Future[dict[str, Any]]]) -> None:
        """Give each of these its row. Raises: EngineError (the engine is broken)."""
        if len(suspects) == 1:
            suspects[0].set_result(await self._answer_alone(self._suspects[suspects[0]]))
            return
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            if failed := half if len(half) == 1 else await self._ask_together(half):
                await self._settle(failed)

    async def _ask_together(
        self, suspects: list[asyncio.Future[dict[str, Any]]]
    ) -> list[asyncio.Future[dict[str, Any]]]:
        """Ask suspects beside each other. Returns those that failed again. Raises: EngineError (the engine is broken)."""
        rows = (answer_row(self._answerer, self._suspects[each], self._seed) for each in suspects)
        outcomes = await asyncio.gather(*rows, return_exceptions=True)
        failures: dict[asyncio.Future[dict[str, Any]], EngineError] = {}
        for result, outcome in zip(suspects, outcomes, strict=True):
            if isinstance(outcome, EngineError):
                failures[result] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                result.set_result(outcome)
        if failures:
            await self._raise_if_broken(next(iter(failures.values())))
        return [*failures]

    async def _answer_alone(self, prompt: Prompt) -> dict[str, Any]:
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return await answer_row(self._answerer, prompt, self._seed)
            except EngineError as failure:
                await self._raise_if_broken(failure)
                reason = failure.what
        return prompt.error_row(reason)

    async def _raise_if_broken(self, failure: EngineError) -> None:
        """Raises the failure if the engine does not answer a plain question."""
        try:
            plain = await answer_row(self._answerer, _PROBE, self._seed)
        except EngineError:
            raise failure from None
        if "error" in plain:
            raise failure


def answer_locally(
    open_answerer: Callable[[], Answerer], choices: int, seed: int, prompts: Iterator[Prompt], keep: KeepRow
) -> None:
    """Answer all prompts. The first signal stops at once, and drops the rows that are being answered.

    Raises:
        CorralError: the model cannot be loaded, the engine is broken, or `keep` fails.
        Stopped: by a signal.
    """
    answerer = open_answerer()
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        batch = _LocalBatch(answerer, seed, prompts, keep)

        def stop() -> None:
            loop.call_soon_threadsafe(batch.stop)

        interrupts = Interrupts(stop)
        with interrupts, interrupts.deferred():
            try:
                runner.run(batch.run(prompts_in_flight(choices, answerer.engine.features.requests)))
            except asyncio.CancelledError:
                raise Stopped(interrupts.signal) from None


class _LocalBatch:
    def __init__(self, answerer: Answerer, seed: int, prompts: Iterator[Prompt], keep: KeepRow) -> None:
        self._engine = answerer.engine
        self._rows = RowAnswerer(answerer, seed)
        self._prompts = prompts
        self._keep = keep
        self._task: asyncio.Task[Any] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Cancel the batch; must be called on its event loop."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def run(self, at_once: int) -> None:
        """Answer all prompts, and close the engine. Raises: CorralError."""
        self._task = asyncio.current_task()
        if self._stopped:
            raise asyncio.CancelledError
        async with self._engine:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(self._answer_next())
            except* CorralError as errors:
                raise first_error(errors) from None

    async def _answer_next(self) -> None:
        for prompt in self._prompts:
            self._keep(await self._rows.answer(prompt))
