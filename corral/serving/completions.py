"""OpenAI's text completion protocol: text or token ids in, their continuation out, without a template.

It works on ids: every id from the engine is sent on at once, with its log-probability and the text that it completes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from corral.engines.base import OPTIONAL_SAMPLING, Generation, Sampling, TokenScore
from corral.errors import TemplateError
from corral.serving.accounts import Reserve, reserve_any
from corral.serving.generation import (
    build_sampling,
    check_characters,
    check_logprobs,
    check_request,
    check_rules,
    choose_length,
    count_usage,
    tokens_left,
    translate_errors,
    with_length,
)
from corral.serving.models import ServedModel
from corral.serving.protocol import Refused, Usage, json_list, json_with
from corral.serving.streams import DONE, Event, error_event
from corral.serving.text_choices import (
    ChoiceBuilder,
    CompletionRequest,
    TextChoice,
    TextCompletion,
    append,
    encode_choice,
)

_DEFAULT_TOKENS = 16  # OpenAI's
_CHARACTERS_PER_TOKEN = 4  # rough cost of formatting one, to decide whether to use a thread


async def start_completions(
    served: ServedModel, request: CompletionRequest, reserve: Reserve = reserve_any
) -> CompletionsHandler:
    """Start to answer a request. Raises: Refused."""
    _check_request(served, request)
    lengths = [len(prompt) for prompt in request.prompt if isinstance(prompt, str)]
    check_characters(served, max(lengths, default=0), param="prompt")
    prompts = await served.answerer.run_in_thread_if_long(sum(lengths), _tokenize_all, served, request)
    return CompletionsHandler(served, request, prompts, reserve)


class CompletionsHandler:
    """A completion request that is being answered, from `start_completions`; see `RequestHandler`.

    The model's prompting and consensus do not apply.

    Args:
        request: checked against the model and the limits, except for its number of tokens.
        prompts: its prompts as ids.
        reserve: sets aside what the answers may use of the caller's quota.

    Raises:
        Refused: too many tokens, or the engine takes no work.
    """

    def __init__(
        self, served: ServedModel, request: CompletionRequest, prompts: Sequence[list[int]], reserve: Reserve
    ) -> None:
        self._served = served
        self._request = request
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompts = prompts
        stop_ids = () if request.ignore_eos else served.answerer.template.stop_ids
        stop_ids = tuple(dict.fromkeys((*(request.stop_token_ids or ()), *stop_ids)))
        # A client that asks for the one next token with its log-prob, as lm-eval does, needs it even if it ends the text.
        self._shown_stop_ids = stop_ids if request.wants_logprobs and request.max_tokens == 1 else ()
        self._generations: list[Generation] = []
        with translate_errors():
            self._submit(() if self._shown_stop_ids else stop_ids, reserve)
        n, is_greedy = request.n or 1, _takes_most_likely(build_sampling(request, 1))
        self._choices = [
            ChoiceBuilder(at * n + i, served.answerer.template, request, ids, self._shown_stop_ids, is_greedy)
            for at, ids in enumerate(self._prompts)
            for i in range(n)
        ]

    async def result(self) -> str:
        """The complete response as JSON. Raises: Refused (the engine failed)."""
        joined: dict[int, TextChoice] = {}
        with translate_errors():
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if piece.index in joined:
                        append(joined[piece.index], piece)
                    else:
                        joined[piece.index] = piece
        choices = [joined[i] for i in sorted(joined)]
        entries = sum(len(c.logprobs.tokens) for c in choices if c.logprobs) * (1 + self._request.top_logprob_count)
        characters = sum(map(_characters, choices)) + entries * _CHARACTERS_PER_TOKEN
        return await self._served.answerer.run_in_thread_if_long(characters, self._encode, choices)

    def _encode(self, choices: Sequence[TextChoice]) -> str:
        return json_with(self._completion([], self.usage), choices=json_list(map(encode_choice, choices)))

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks as JSON, then `DONE`. Raises: Refused (the answer failed)."""
        # As OpenAI, send `usage` (null in all chunks but the last) only if the client asked for it.
        hidden = None if self._request.wants_usage else {"usage"}
        with translate_errors():
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    encode = partial(self._completion([piece]).model_dump_json, exclude=hidden)
                    yield Event(await self._served.answerer.run_in_thread_if_long(_characters(piece), encode))
        if self._request.wants_usage:
            yield Event(self._completion([], self.usage).model_dump_json())
        yield DONE

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all prompts and choices."""
        return count_usage(sum(map(len, self._prompts)), sum(choice.token_count for choice in self._choices))

    def error_event(self, refused: Refused) -> Event:
        """The error as the last event."""
        return error_event(refused)

    def cancel(self) -> None:
        """Stop the work; does nothing if it is done."""
        for generation in self._generations:
            generation.cancel()

    def _submit(self, stop_ids: tuple[int, ...], reserve: Reserve) -> None:
        request, engine = self._request, self._served.answerer.engine
        lengths: list[int] = []
        for ids in self._prompts:
            needed = min(1, 1 if request.max_tokens is None else request.max_tokens)
            left = tokens_left(self._served, len(ids), needed, param="prompt")
            lengths.append(choose_length(self._served, request, request.max_tokens, left, _DEFAULT_TOKENS))
            if request.echo and request.wants_logprobs:
                engine.check_score(ids, 1)
        self._check_tokens(sum(lengths))
        most = reserve(
            sum(map(len, self._prompts)),
            max(lengths),
            (request.n or 1) * len(lengths),
            may_shorten=request.max_tokens is None,
        )
        if request.max_tokens == 0:
            return
        try:
            for ids, length in zip(self._prompts, lengths, strict=True):
                sampling = replace(_sampling(self._served, request, min(length, most)), stop_ids=stop_ids)
                self._generations.append(engine.submit(ids, sampling))
        except BaseException:
            self.cancel()
            raise

    def _check_tokens(self, answer_tokens: int) -> None:
        """Check the tokens of the whole request, given those of one answer to each prompt. Raises: Refused."""
        n, most = self._request.n or 1, self._served.limits.tokens
        prompt_copies = n if self._request.echo or self._request.return_token_ids else 1
        tokens = prompt_copies * sum(map(len, self._prompts)) + n * answer_tokens
        what = f"at most {most} tokens are served in one request; its prompts and answers may have {tokens}"
        check_rules([(tokens > most, "prompt", what)])
        check_logprobs(self._served, self._request, tokens if self._request.echo else n * answer_tokens)

    async def _pieces(self) -> AsyncGenerator[TextChoice, None]:
        """Parts of all choices as they are ready; those of one choice in order."""
        queue: asyncio.Queue[TextChoice | BaseException | None] = asyncio.Queue()

        async def run(prompt: Coroutine[Any, Any, None]) -> None:
            try:
                await prompt
                queue.put_nowait(None)
            except BaseException as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(run(self._run_prompt(i, queue))) for i in range(len(self._prompts))]
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_prompt(self, index: int, queue: asyncio.Queue[Any]) -> None:
        """Put all parts of one prompt's choices into the queue."""
        request, n = self._request, self._request.n or 1
        choices = self._choices[index * n : (index + 1) * n]
        if request.echo or request.return_token_ids:
            ids = self._prompts[index]
            scores = await self._score_prompt(ids) if request.echo else []
            size = _CHARACTERS_PER_TOKEN * len(ids)
            for choice in choices:
                part = await self._served.answerer.run_in_thread_if_long(
                    size, choice.prompt_part, request.prompt[index], ids, scores
                )
                queue.put_nowait(part)
                await asyncio.sleep(0)  # short prompts are formatted on the event loop: let other requests run
        if not self._generations:
            return
        generation = self._generations[index]
        async with contextlib.aclosing(aiter(generation)) as deltas:
            async for delta in deltas:
                choice = choices[delta.choice]
                if choice.finish is not None:
                    continue  # generated before the engine was told to cancel
                piece = choice.add(delta)
                if choice.finish is not None and delta.finish is None:
                    generation.cancel(delta.choice)
                queue.put_nowait(piece)
                if all(each.finish is not None for each in choices):
                    return

    async def _score_prompt(self, ids: Sequence[int]) -> list[TokenScore | None]:
        """One score for each id of a prompt, None for the first; empty if none were requested."""
        engine, top = self._served.answerer.engine, self._request.logprobs
        if top is None:
            return []
        if top == 0:
            return [None, *(TokenScore(logprob, ()) for logprob in await engine.score(ids))]
        return [None, *await engine.score_top(ids, 1, top)]

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=choices,
            usage=usage,
        )


def _sampling(served: ServedModel, request: CompletionRequest, max_tokens: int) -> Sampling:
    """The sampling of a request; an engine without `top_logprobs` still gives the most likely token of greedy answers."""
    sampling = with_length(build_sampling(request, 1), max_tokens)
    if sampling.top_logprobs == 1 and "top_logprobs" not in served.answerer.engine.features.honours:
        sampling = replace(sampling, top_logprobs=0)
    return sampling


def _takes_most_likely(sampling: Sampling) -> bool:
    """Whether each generated id is the model's most likely one."""
    fields = (name for name in OPTIONAL_SAMPLING if name != "top_logprobs")
    return sampling.temperature == 0 and all(getattr(sampling, name) == OPTIONAL_SAMPLING[name] for name in fields)


def _check_request(served: ServedModel, request: CompletionRequest) -> None:
    """Check a request against the model and the limits. Raises: Refused."""
    check_request(served, request, _sampling(served, request, 1))
    most, choices = served.limits.prompts, served.limits.choices
    engine, n = served.answerer.engine, request.n or 1
    scores = bool(request.echo) and request.wants_logprobs
    cannot = f"the engine of this model, {engine.name!r}, gives none for a prompt"
    no_tops = scores and bool(request.logprobs) and not engine.features.score_top
    rules = (
        (len(request.prompt) > most, "prompt", f"at most {most} prompts are served"),
        (len(request.prompt) * n > choices, "n", f"at most {choices} choices of all prompts are served"),
        (
            request.best_of not in (None, 1, n),
            "best_of",
            "the best of several answers is not chosen here: leave it out",
        ),
        (request.max_tokens == 0 and not request.echo, "max_tokens", "0 leaves nothing to answer without 'echo': true"),
        (scores and not engine.features.score, "logprobs", cannot),
        (no_tops, "logprobs", f"{cannot} but those of its own tokens: ask for 'logprobs': 0"),
    )
    check_rules(rules)


def _tokenize_all(served: ServedModel, request: CompletionRequest) -> list[list[int]]:
    """All prompts as ids. Raises: Refused."""
    return [_tokenize(served, request, prompt) for prompt in request.prompt]


def _tokenize(served: ServedModel, request: CompletionRequest, prompt: str | list[int]) -> list[int]:
    begins = request.add_special_tokens is not False
    try:
        ids = prompt if isinstance(prompt, list) else served.plain_text.ids(prompt, begin=begins)
    except TemplateError as error:
        raise Refused(400, f"'prompt': {error.what}", param="prompt") from error
    vocabulary = served.answerer.engine.features.vocabulary
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        what = f"'prompt': it must have tokens, with ids from 0 to {vocabulary - 1}"
        raise Refused(400, what, param="prompt")
    return ids


def _characters(choice: TextChoice) -> int:
    """Rough cost of formatting a choice, without log-probabilities."""
    ids = len(choice.token_ids or ()) + len(choice.prompt_token_ids or ())
    return len(choice.text) + _CHARACTERS_PER_TOKEN * ids
