"""OpenAI's text completion protocol: text or token ids in, their continuation out, without a template.

It works on ids: every id from the engine is sent on at once, with its log-probability and the text that it completes. It
includes the extensions of vLLM that make it exact for programs: token ids in the response, and ids that end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, PlainValidator
from pydantic_core import PydanticCustomError

from corral.answering.answerer import StopStringCutter
from corral.engines.base import Delta, Finish, Generation
from corral.errors import TemplateError
from corral.serving.accounts import Reserve, reserve_any
from corral.serving.generation import (
    build_sampling,
    check_characters,
    check_max_tokens,
    check_request,
    check_rules,
    count_usage,
    finish_reason,
    tokens_left,
    translate_errors,
)
from corral.serving.models import ServedModel
from corral.serving.prompt_logprobs import GreedySteps, TokenLikelihood, max_step_tokens, score_prompt
from corral.serving.protocol import (
    DEFAULT_LIMITS,
    MAX_ID,
    MAX_STOPS,
    GenerationRequest,
    MustBeNull,
    MustBeZero,
    Refused,
    Usage,
    unsupported_except,
)
from corral.serving.streams import DONE, Event, error_event

_DEFAULT_TOKENS = 16  # OpenAI's
_CHARACTERS_PER_TOKEN = 4  # rough cost of formatting one, to decide whether to use a thread
_IMPOSSIBLE_LOGPROB = -9999.0  # as vLLM; JSON has no infinity
MAX_STOP_IDS = 128


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """Accept one text, several texts, the ids of one prompt or of several, and return a list of prompts."""
    if isinstance(value, str):
        return [value]
    # Not a pydantic union: that would record an error for each of a million ids.
    kinds: set[type] = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        return [value]
    if kinds in ({str}, {list}) and len(value) > DEFAULT_LIMITS.prompts:
        raise PydanticCustomError("too_long", "at most {most} prompts are served", {"most": DEFAULT_LIMITS.prompts})
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
        return value
    raise PydanticCustomError("prompt", "must be text, a list of texts, a list of token ids, or a list of such lists")


# For the OpenAPI document.
_PromptForm: TypeAlias = str | list[str] | list[int] | list[list[int]]
Prompts: TypeAlias = Annotated[Any, PlainValidator(_parse_prompts, json_schema_input_type=_PromptForm)]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`.

    Extensions, named as vLLM's: `return_token_ids`, `stop_token_ids`, `ignore_eos`, `add_special_tokens`, `top_k`.
    """

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_ID)]] | None = Field(
        None, max_length=MAX_STOP_IDS, fail_fast=True
    )
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None

    # Unsupported, except for values that change nothing.
    best_of: Annotated[Any, unsupported_except(None, 1)] = None
    suffix: MustBeNull = None
    min_p: MustBeZero = None
    repetition_penalty: Annotated[Any, unsupported_except(None, 1)] = None
    skip_special_tokens: Annotated[Any, unsupported_except(None, True)] = None

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102 (see GenerationRequest)
        return self.logprobs is not None


class TextLogprobs(BaseModel):
    """The tokens of a choice, one entry each. A token that is not valid UTF-8 is written as `bytes:\\xe2\\x80`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """null for the first token of a prompt; -9999 for a token of probability 0."""
    top_logprobs: list[dict[str, float] | None] | None = None
    """With `logprobs: 1`, for each position: the token itself and the most likely token; null where that is not known."""
    text_offset: list[int] = []
    """Where each token begins in the text, in characters."""


class TextChoice(BaseModel):
    """A continuation, or in a stream the new part of one."""

    index: int
    """Numbers the choices of the first prompt, then those of the second, and so on."""
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    """The generated ids, with `return_token_ids`."""
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`; in a stream, in the first chunk of each choice."""


class TextCompletion(BaseModel):
    """A response, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage | None = None


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
        self._steps = GreedySteps(served.answerer.engine)
        stop_ids = () if request.ignore_eos else served.answerer.template.stop_ids
        stop_ids = tuple(dict.fromkeys((*(request.stop_token_ids or ()), *stop_ids)))
        # A client that asks for the one next token with its log-prob, as lm-eval does, needs it even if it ends the text.
        self._shown_stop_ids = stop_ids if request.wants_logprobs and request.max_tokens == 1 else ()
        self._generations: list[Generation] = []
        with translate_errors():
            self._submit(() if self._shown_stop_ids else stop_ids, reserve)
        n = request.n or 1
        stops = list(dict.fromkeys(request.stops))
        self._choices = [
            _ChoiceBuilder(prompt_index * n + i, served, request, ids, self._shown_stop_ids, stops)
            for prompt_index, ids in enumerate(self._prompts)
            for i in range(n)
        ]

    async def result(self) -> TextCompletion:
        """The complete response. Raises: Refused (the engine failed)."""
        joined: dict[int, TextChoice] = {}
        with translate_errors():
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if piece.index in joined:
                        _append(joined[piece.index], piece)
                    else:
                        joined[piece.index] = piece
        return self._completion([joined[i] for i in sorted(joined)], self.usage)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks as JSON, then `DONE`. Raises: Refused (the answer failed)."""
        # As OpenAI, send `usage` (null in all chunks but the last) only if the client asked for it.
        hidden = None if self._request.wants_usage else {"usage"}
        with translate_errors():
            async with contextlib.aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    yield Event(self._completion([piece]).model_dump_json(exclude=hidden))
        if self._request.wants_usage:
            yield Event(self._completion([], self.usage).model_dump_json())
        yield DONE

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all prompts and choices; the steps that find the most likely tokens count as prompt tokens."""
        prompt_tokens = sum(map(len, self._prompts)) + self._steps.tokens
        return count_usage(prompt_tokens, sum(choice.token_count for choice in self._choices))

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
            left = tokens_left(self._served, len(ids), request.max_tokens, param="prompt")
            default = min(left, _DEFAULT_TOKENS, self._served.limits.max_tokens)
            lengths.append(default if request.max_tokens is None else request.max_tokens)
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
                sampling = replace(build_sampling(request, min(length, most)), stop_ids=stop_ids)
                self._generations.append(engine.submit(ids, sampling))
        except BaseException:
            self.cancel()
            raise

    def _check_tokens(self, answer_tokens: int) -> None:
        """Check the tokens of the whole request, given those of one answer to each prompt. Raises: Refused."""
        n, most = self._request.n or 1, self._served.limits.tokens
        prompt_copies = n if self._request.echo else 1
        tokens = prompt_copies * sum(map(len, self._prompts)) + n * answer_tokens
        if tokens > most:
            what = (
                f"'prompt': at most {most} tokens are served in one request; its prompts and answers may have {tokens}"
            )
            raise Refused(400, what, param="prompt")
        if not (self._request.echo and self._request.logprobs):
            return
        steps, most = sum(max_step_tokens(len(ids)) for ids in self._prompts), self._served.limits.step_tokens
        if steps > most:
            what = (
                f"'logprobs': finding the most likely tokens of these prompts may take {steps} tokens, and at most {most} are "
                "served in one request: send fewer or shorter prompts, or 'logprobs': 0, which costs one pass"
            )
            raise Refused(400, what, param="logprobs")

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
            likelihoods = await self._score_prompt(ids) if request.echo else []
            size = _CHARACTERS_PER_TOKEN * len(ids)
            for choice in choices:
                part = await self._served.answerer.run_in_thread_if_long(
                    size, choice.prompt_part, request.prompt[index], ids, likelihoods
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

    async def _score_prompt(self, ids: Sequence[int]) -> list[TokenLikelihood | None]:
        """One likelihood for each id of a prompt, None for the first; empty if none were requested."""
        if self._request.logprobs is None:
            return []
        steps = self._steps if self._request.logprobs > 0 else None
        return [None, *await score_prompt(self._served.answerer.engine, ids, steps)]

    def _completion(self, choices: list[TextChoice], usage: Usage | None = None) -> TextCompletion:
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=choices,
            usage=usage,
        )


class _ChoiceBuilder:
    """Builds one choice from the engine's ids."""

    def __init__(
        self,
        index: int,
        served: ServedModel,
        request: CompletionRequest,
        prompt: Sequence[int],
        shown_stop_ids: Sequence[int],
        stops: Sequence[str],
    ) -> None:
        self.finish: Finish | None = None
        self.token_count = 0
        """Generated tokens, without an end token."""
        self._index = index
        self._request = request
        self._shown_stop_ids = shown_stop_ids
        self._template = served.answerer.template
        self._cutter = StopStringCutter(stops)
        # The decoder starts after the prompt, which may end within a character, and keeps the space of a first word.
        self._decoder = self._template.stream_decoder()
        if not request.echo:
            self._decoder.push(prompt)
        self._offset = 0
        """Characters so far, for `text_offset`."""

    def prompt_part(
        self, prompt: str | list[int], ids: Sequence[int], likelihoods: Sequence[TokenLikelihood | None]
    ) -> TextChoice:
        """The part that describes the prompt: its text, log-probabilities and ids, as far as they were requested."""
        text = ""
        logprobs = TextLogprobs()
        if self._request.echo:
            for position, id_ in enumerate(ids):
                if likelihoods:
                    self._add_logprob(logprobs, id_, likelihoods[position])
                new = self._decoder.push((id_,))
                self._offset += len(new)
                text += new
        ends_here = self._request.max_tokens == 0
        with_ids = self._request.return_token_ids
        return TextChoice(
            index=self._index,
            text=prompt if self._request.echo and isinstance(prompt, str) else text,
            logprobs=self._requested_logprobs(logprobs),
            finish_reason="length" if ends_here else None,
            token_ids=[] if with_ids else None,
            prompt_token_ids=list(ids) if with_ids else None,
        )

    def add(self, delta: Delta) -> TextChoice:
        """The part for new ids. Raises: Refused (the engine cancelled the choice)."""
        text = ""
        logprobs = TextLogprobs()
        ids: list[int] = []
        self.finish = delta.finish
        for position, id_ in enumerate(delta.ids):
            ids.append(id_)
            if delta.logprobs is not None:
                logprob = delta.logprobs[position]
                best = (id_, logprob) if self._request.temperature == 0 else None
                self._add_logprob(logprobs, id_, TokenLikelihood(logprob, best))
            if id_ in self._shown_stop_ids:
                self.finish = "stop"
                break
            self.token_count += 1
            new = self._decoder.push((id_,))
            self._offset += len(new)
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
            logprobs=self._requested_logprobs(logprobs),
            finish_reason=None if self.finish is None else finish_reason(self.finish),
            token_ids=ids if self._request.return_token_ids else None,
        )

    def _requested_logprobs(self, logprobs: TextLogprobs) -> TextLogprobs | None:
        return logprobs if self._request.wants_logprobs else None

    def _add_logprob(self, logprobs: TextLogprobs, id_: int, likelihood: TokenLikelihood | None) -> None:
        name = self._token_name(id_)
        logprob = None if likelihood is None else max(likelihood.logprob, _IMPOSSIBLE_LOGPROB)
        logprobs.tokens.append(name)
        logprobs.token_logprobs.append(logprob)
        logprobs.text_offset.append(self._offset)
        if not self._request.logprobs:
            return
        top = None
        if likelihood is not None and likelihood.best is not None and logprob is not None:
            # Two ids may have the same name: keep the greater value.
            top = {name: logprob}
            best_name = self._token_name(likelihood.best[0])
            top[best_name] = max(top.get(best_name, _IMPOSSIBLE_LOGPROB), likelihood.best[1])
        if logprobs.top_logprobs is None:
            logprobs.top_logprobs = []
        logprobs.top_logprobs.append(top)

    def _token_name(self, id_: int) -> str:
        data = self._template.token_bytes[id_]
        if not data:
            return self._template.tokenizer.backend_tokenizer.id_to_token(id_) or f"token_id:{id_}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _append(choice: TextChoice, piece: TextChoice) -> None:
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


def _check_request(served: ServedModel, request: CompletionRequest) -> None:
    """Check a request against the model and the limits. Raises: Refused."""
    check_request(served, request, most_stops=MAX_STOPS)
    check_max_tokens(served, request.max_tokens)
    most, choices = served.limits.prompts, served.limits.choices
    can_score = served.answerer.engine.features.score
    scores = bool(request.echo) and request.wants_logprobs
    at_most_one = "0 or 1: besides the token itself, only the most likely one is returned"
    rules = (
        (len(request.prompt) > most, "prompt", f"at most {most} prompts are served"),
        (len(request.prompt) * (request.n or 1) > choices, "n", f"at most {choices} choices of all prompts are served"),
        ((request.logprobs or 0) > 1, "logprobs", at_most_one),
        (request.max_tokens == 0 and not request.echo, "max_tokens", "0 leaves nothing to answer without 'echo': true"),
        (scores and not can_score, "logprobs", "the engine of this server gives none for a prompt"),
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
