"""Prompts → finished rows through an Answerer on this machine, as many at once as keep its engine full.

A row that the engine cannot do is a bad row. Where the engine fails, the rows that were under way are asked again one by
one: which of them is to blame cannot be seen while they share it. It does not know where rows come from or go to.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from corral.answerer import Answer, Answerer
from corral.batch.prompts import Prompt
from corral.errors import CorralError, EngineError, RequestError, TemplateError
from corral.interrupts import Interrupts, Stopped

Keep: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Takes a finished row."""

COMPLETIONS = 320
"""Asked of an engine at once: OpenVINO computes up to 256 together, and a quarter more are ready when some end."""
_FAILURES = 3
"""Rows that fail alone, one after another, until it is the engine that is taken to be broken."""


def at_once(choices: int) -> int:
    """Prompts under way together, of so many completions each."""
    return -(-COMPLETIONS // choices)


async def answer_row(answerer: Answerer, prompt: Prompt, seed: int) -> dict[str, Any]:
    """The finished row of a prompt, perhaps a bad one. Raises: EngineError (the engine fails)."""
    assert prompt.conversation is not None, "a faulty row is not asked"
    digest = hashlib.sha256(f"{seed} {prompt.index}".encode()).digest()
    sampling = replace(answerer.sampling, seed=int.from_bytes(digest[:4]))
    try:
        return finished(prompt, await answerer.answer(prompt.conversation, sampling))
    except (RequestError, TemplateError) as error:
        return prompt.bad(error.what)


def finished(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The row of the output: `tokens` are those drawn for all candidates."""
    row: dict[str, Any] = {
        "index": prompt.index,
        **prompt.given,
        "answer": answer.text,
        "finish": answer.completions[answer.chosen].finish,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": sum(len(completion.ids) for completion in answer.completions),
    }
    if answer.result != answer.text:
        row["result"] = answer.result
    if answer.vote is not None:
        row["candidates"] = list(answer.texts)
        row["finishes"] = [completion.finish for completion in answer.completions]
        row["votes"] = list(answer.vote.scores)
        row["winner"] = answer.vote.winner
    return row


def answer_here(
    open_answerer: Callable[[], Answerer], choices: int, seed: int, prompts: Iterator[Prompt], keep: Keep
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
        with interrupts, interrupts.gently():
            try:
                runner.run(work.run(at_once(choices)))
            except asyncio.CancelledError:
                raise Stopped(interrupts.signal) from None


class _Work:
    def __init__(self, answerer: Answerer, seed: int, prompts: Iterator[Prompt], keep: Keep) -> None:
        self._answerer = answerer
        self._seed = seed
        self._prompts = prompts
        self._keep = keep
        self._task: asyncio.Task[Any] | None = None
        self._stopped = False
        self._more = True
        self._suspects: list[Prompt] = []
        """Under way when the engine failed."""
        self._failed: list[tuple[Prompt, EngineError]] = []
        """Failed alone, and no row has been answered since."""

    def stop(self) -> None:
        """Cancel the work; on its loop."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def run(self, at_once: int) -> None:
        """Answer all prompts, and close the engine. Raises: CorralError."""
        self._task = asyncio.current_task()
        if self._stopped:
            raise asyncio.CancelledError
        async with self._answerer.engine:
            try:
                while self._more:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(at_once):
                            group.create_task(self._lane())
                    suspects, self._suspects = self._suspects, []
                    for prompt in suspects:
                        await self._alone(prompt)
            except* CorralError as errors:
                # Many fail alike; one error is what a person can read.
                raise _first(errors) from None
        if self._failed:
            raise self._failed[-1][1]

    async def _lane(self) -> None:
        while not self._suspects:
            prompt = next(self._prompts, None)
            if prompt is None:
                self._more = False
                return
            try:
                row = await answer_row(self._answerer, prompt, self._seed)
            except EngineError:
                self._suspects.append(prompt)
                return
            self._done(row)

    async def _alone(self, prompt: Prompt) -> None:
        try:
            row = await answer_row(self._answerer, prompt, self._seed)
        except EngineError as error:
            self._failed.append((prompt, error))
            if len(self._failed) == _FAILURES:
                raise
            return
        self._done(row)

    def _done(self, row: Mapping[str, Any]) -> None:
        # The engine works, so what failed alone before is to blame itself.
        if "error" not in row:
            for prompt, error in self._failed:
                self._keep(prompt.bad(error.what))
            self._failed.clear()
        self._keep(row)


def _first(errors: BaseExceptionGroup[CorralError]) -> CorralError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
