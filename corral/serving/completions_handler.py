"""Between OpenAI's older protocol and an engine: text or ids → their continuation, as ids and as text.

It goes by ids: every id an engine draws is sent on at once, with its log-probability and the text it completes. No template is
applied. It does not know HTTP: who is connected, how events are sent, or that there are routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from corral.answering.answerer import StopStringCutter
from corral.engines.base import Delta, Finish, Generation
from corral.errors import TemplateError
from corral.serving.admission import Event
from corral.serving.chat_handler import DONE
from corral.serving.completions_protocol import CompletionRequest, TextChoice, TextCompletion, TextLogprobs
from corral.serving.generation import (
    Served,
    check,
    check_characters,
    check_length,
    faults,
    finish_reason,
    room,
    sampling,
    usage,
)
from corral.serving.prompt_logprobs import Likelihood, Steps, likelihoods, worst
from corral.serving.protocol import MAX_STOPS, Refused, Usage

_DEFAULT_TOKENS = 16  # OpenAI's
_CHARACTERS_OF_A_TOKEN = 4  # about what it takes to tell one
_IMPOSSIBLE = -9999.0  # JSON has no infinity; vLLM's number


async def asked_text(served: Served, request: CompletionRequest) -> AskedText:
    """Ask a model for what a request wants. Raises: Refused (it cannot be answered)."""
    _check(served, request)
    lengths = [len(prompt) for prompt in request.prompt if isinstance(prompt, str)]
    check_characters(served, max(lengths, default=0), param="prompt")
    return AskedText(
        served, request, await served.answerer.run_in_thread_if_long(sum(lengths), _prompts, served, request)
    )


class AskedText:
    """A request under way, made by `asked_text`: its text as it comes (`events`) or at its end (`whole`).

    The model's prompting and vote do not apply.

    Args:
        request: held against the model and the limits, save for its tokens.
        prompts: its prompts as ids.

    Raises:
        Refused: it wants too many tokens, or the engine takes no work.
    """

    def __init__(self, served: Served, request: CompletionRequest, prompts: Sequence[list[int]]) -> None:
        self._served = served
        self._request = request
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompts = prompts
        self._steps = Steps(served.answerer.engine)
        stop_ids = () if request.ignore_eos else served.answerer.template.stop_ids
        stop_ids = tuple(dict.fromkeys((*(request.stop_token_ids or ()), *stop_ids)))
        # Whoever asks what the one next token is, as lm-eval does, counts on being told, also where it ends the text.
        self._ends = stop_ids if request.wants_logprobs and request.max_tokens == 1 else ()
        self._generations: list[Generation] = []
        with faults():
            self._submit(() if self._ends else stop_ids)
        n = request.n or 1
        stops = list(dict.fromkeys(request.stops))
        self._choices = [
            _Choice(place * n + i, served, request, ids, self._ends, stops)
            for place, ids in enumerate(self._prompts)
            for i in range(n)
        ]

    async def whole(self) -> TextCompletion:
        """The answer. Raises: Refused (the engine failed)."""
        joined: dict[int, TextChoice] = {}
        with faults():
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if piece.index in joined:
                        _extend(joined[piece.index], piece)
                    else:
                        joined[piece.index] = piece
        return self._completion([joined[i] for i in sorted(joined)], self.usage)

    async def events(self) -> AsyncGenerator[Event, None]:
        """The data of each event, as JSON, and "[DONE]". A fault is the last event, with nothing after it."""
        # OpenAI sends `usage` (null in all chunks but the last) only to those who asked for it.
        hidden = None if self._request.wants_usage else {"usage"}
        try:
            with faults():
                async with contextlib.aclosing(self._pieces()) as pieces:
                    async for piece in pieces:
                        yield Event(self._completion([piece]).model_dump_json(exclude=hidden))
            if self._request.wants_usage:
                yield Event(self._completion([], self.usage).model_dump_json())
            yield DONE
        except Refused as refused:
            yield Event(refused.body().model_dump_json())

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all prompts and choices; the most likely tokens of prompts count as what it took to draw them."""
        return usage(sum(map(len, self._prompts)) + self._steps.tokens, sum(choice.drawn for choice in self._choices))

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended."""
        for generation in self._generations:
            generation.cancel()

    def _submit(self, stop_ids: tuple[int, ...]) -> None:
        request, engine = self._request, self._served.answerer.engine
        lengths: list[int] = []
        for ids in self._prompts:
            left = room(self._served, len(ids), request.max_tokens, param="prompt")
            default = min(left, _DEFAULT_TOKENS, self._served.limits.max_tokens)
            lengths.append(default if request.max_tokens is None else request.max_tokens)
            if request.echo and request.wants_logprobs:
                engine.check_score(ids, 1)
        self._check_tokens(sum(lengths))
        if request.max_tokens == 0:
            return
        try:
            for ids, length in zip(self._prompts, lengths, strict=True):
                drawn = sampling(request, length)
                self._generations.append(engine.submit(ids, replace(drawn, stop_ids=stop_ids)))
        except BaseException:
            self.cancel()
            raise

    def _check_tokens(self, answers: int) -> None:
        """Hold what the whole request may come to against the limit; `answers`: with one for each prompt. Raises: Refused."""
        n, most = self._request.n or 1, self._served.limits.tokens
        told = n if self._request.echo else 1
        tokens = told * sum(map(len, self._prompts)) + n * answers
        if tokens > most:
            what = (
                f"'prompt': at most {most} tokens are served in one request, and prompts and answers may have {tokens}"
            )
            raise Refused(400, what, param="prompt")
        if not (self._request.echo and self._request.logprobs):
            return
        steps, most = sum(worst(len(ids)) for ids in self._prompts), self._served.limits.step_tokens
        if steps > most:
            what = (
                f"'logprobs': to find the most likely tokens of these prompts may take {steps} tokens, and at most {most} are "
                "served in one request: send fewer or shorter prompts, or 'logprobs': 0, which costs one pass"
            )
            raise Refused(400, what, param="logprobs")

    async def _pieces(self) -> AsyncGenerator[TextChoice, None]:
        """What is sent of each choice, in order; the choices of several prompts as they come."""
        queue: asyncio.Queue[TextChoice | BaseException | None] = asyncio.Queue()

        async def pump(work: Coroutine[Any, Any, None]) -> None:
            try:
                await work
                queue.put_nowait(None)
            except BaseException as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(self._prompt(i, queue))) for i in range(len(self._prompts))]
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _prompt(self, place: int, queue: asyncio.Queue[Any]) -> None:
        """All of one prompt's choices."""
        request, n = self._request, self._request.n or 1
        choices = self._choices[place * n : (place + 1) * n]
        if request.echo or request.return_token_ids:
            known = await self._likelihoods(self._prompts[place]) if request.echo else []
            ids = self._prompts[place]
            size = _CHARACTERS_OF_A_TOKEN * len(ids)
            for choice in choices:
                head = await self._served.answerer.run_in_thread_if_long(
                    size, choice.head, request.prompt[place], ids, known
                )
                queue.put_nowait(head)
                await asyncio.sleep(0)  # one that is short is told here, and others wait
        if not self._generations:
            return
        generation = self._generations[place]
        async with contextlib.aclosing(aiter(generation)) as deltas:
            async for delta in deltas:
                choice = choices[delta.choice]
                if choice.finish is not None:
                    continue  # drawn before the engine heard of the stop string
                piece = choice.take(delta)
                if choice.finish is not None and delta.finish is None:
                    generation.cancel(delta.choice)
                queue.put_nowait(piece)
                if all(each.finish is not None for each in choices):
                    return

    async def _likelihoods(self, ids: Sequence[int]) -> list[Likelihood | None]:
        """One for each id of a prompt; None for the first."""
        request = self._request
        if request.logprobs is None:
            return []
        steps = self._steps if request.logprobs > 0 else None
        found = await likelihoods(self._served.answerer.engine, ids, steps)
        return [None, *found]

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=choices,
            usage=usage,
        )


class _Choice:
    """One continuation on its way from ids to text."""

    def __init__(
        self,
        index: int,
        served: Served,
        request: CompletionRequest,
        prompt: Sequence[int],
        ends: Sequence[int],
        stops: Sequence[str],
    ) -> None:
        self.finish: Finish | None = None
        self.drawn = 0
        """Tokens, without one that ended the text."""
        self._index = index
        self._request = request
        self._ends = ends
        self._template = served.answerer.template
        self._cutter = StopStringCutter(stops)
        # The text goes on from the prompt's: within a character, perhaps, and with the space that would begin a text.
        self._decoder = self._template.stream_decoder()
        if not request.echo:
            self._decoder.push(prompt)
        self._at = 0
        """Characters so far, as `text_offset` counts them."""

    def head(self, prompt: str | list[int], ids: Sequence[int], known: Sequence[Likelihood | None]) -> TextChoice:
        """The prompt's part: its text and log-probabilities, where they are asked for, and its ids."""
        text = ""
        shown = TextLogprobs()
        if self._request.echo:
            for place, id_ in enumerate(ids):
                if known:
                    self._add(shown, id_, known[place])
                new = self._decoder.push((id_,))
                self._at += len(new)
                text += new
        ends_here = self._request.max_tokens == 0
        with_ids = self._request.return_token_ids
        return TextChoice(
            index=self._index,
            text=prompt if self._request.echo and isinstance(prompt, str) else text,
            logprobs=self._shown(shown),
            finish_reason="length" if ends_here else None,
            token_ids=[] if with_ids else None,
            prompt_token_ids=list(ids) if with_ids else None,
        )

    def take(self, delta: Delta) -> TextChoice:
        """What new ids add. Raises: Refused (the engine cut the choice off)."""
        text = ""
        shown = TextLogprobs()
        ids: list[int] = []
        self.finish = delta.finish
        for place, id_ in enumerate(delta.ids):
            ids.append(id_)
            if delta.logprobs is not None:
                logprob = delta.logprobs[place]
                best = (id_, logprob) if self._request.temperature == 0 else None
                self._add(shown, id_, Likelihood(logprob, best))
            if id_ in self._ends:
                self.finish = "stop"
                break
            self.drawn += 1
            new = self._decoder.push((id_,))
            self._at += len(new)
            text += self._cutter.push(new)
            if self._cutter.stopped:
                break
        if self.finish is not None and not self._cutter.stopped:
            text += self._cutter.push(self._decoder.finish())
            text += self._cutter.finish()
        if self._cutter.stopped:
            self.finish = "stop"
        return TextChoice(
            index=self._index,
            text=text,
            logprobs=self._shown(shown),
            finish_reason=None if self.finish is None else finish_reason(self.finish),
            token_ids=ids if self._request.return_token_ids else None,
        )

    def _shown(self, logprobs: TextLogprobs) -> TextLogprobs | None:
        return logprobs if self._request.wants_logprobs else None

    def _add(self, shown: TextLogprobs, id_: int, known: Likelihood | None) -> None:
        name = self._name(id_)
        logprob = None if known is None else max(known.logprob, _IMPOSSIBLE)
        shown.tokens.append(name)
        shown.token_logprobs.append(logprob)
        shown.text_offset.append(self._at)
        if not self._request.logprobs:
            return
        best = None
        if known is not None and known.best is not None and logprob is not None:
            # Two ids may have one name: what is the greatest here is the greatest of all.
            best = {name: logprob}
            other = self._name(known.best[0])
            best[other] = max(best.get(other, _IMPOSSIBLE), known.best[1])
        if shown.top_logprobs is None:
            shown.top_logprobs = []
        shown.top_logprobs.append(best)

    def _name(self, id_: int) -> str:
        data = self._template.token_bytes[id_]
        if not data:
            return self._template.tokenizer.backend_tokenizer.id_to_token(id_) or f"token_id:{id_}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _extend(choice: TextChoice, piece: TextChoice) -> None:
    choice.text += piece.text
    choice.finish_reason = piece.finish_reason
    if choice.token_ids is not None:
        choice.token_ids += piece.token_ids or ()
    if choice.logprobs is not None and piece.logprobs is not None:
        choice.logprobs.tokens += piece.logprobs.tokens
        choice.logprobs.token_logprobs += piece.logprobs.token_logprobs
        choice.logprobs.text_offset += piece.logprobs.text_offset
        if piece.logprobs.top_logprobs is not None:
            choice.logprobs.top_logprobs = (choice.logprobs.top_logprobs or []) + piece.logprobs.top_logprobs


def _check(served: Served, request: CompletionRequest) -> None:
    """Hold the request against the model and the limits. Raises: Refused."""
    check(served, request, most_stops=MAX_STOPS)
    check_length(served, request.max_tokens)
    most, choices = served.limits.prompts, served.limits.choices
    can_score = served.answerer.engine.features.score
    scores = bool(request.echo) and request.wants_logprobs
    best = "0 or 1: the most likely token is all that is told beside the token itself"
    rules = (
        (len(request.prompt) > most, "prompt", f"at most {most} prompts are served"),
        (len(request.prompt) * (request.n or 1) > choices, "n", f"at most {choices} choices of all prompts are served"),
        ((request.logprobs or 0) > 1, "logprobs", best),
        (request.max_tokens == 0 and not request.echo, "max_tokens", "0 leaves nothing to answer without 'echo': true"),
        (scores and not can_score, "logprobs", "the engine of this server tells none of a prompt"),
    )
    for is_broken, param, what in rules:
        if is_broken:
            raise Refused(400, f"{param!r}: {what}", param=param)


def _prompts(served: Served, request: CompletionRequest) -> list[list[int]]:
    """All prompts as ids. Raises: Refused."""
    return [_ids(served, request, prompt) for prompt in request.prompt]


def _ids(served: Served, request: CompletionRequest, prompt: str | list[int]) -> list[int]:
    begins = request.add_special_tokens is not False
    try:
        ids = prompt if isinstance(prompt, list) else served.texts.ids(prompt, begin=begins)
    except TemplateError as error:
        raise Refused(400, f"'prompt': {error.what}", param="prompt") from error
    vocabulary = served.answerer.engine.features.vocabulary
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        what = f"'prompt': it must have tokens, with ids from 0 to {vocabulary - 1}"
        raise Refused(400, what, param="prompt")
    return ids
