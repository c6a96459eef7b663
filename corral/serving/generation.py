"""From a request of any protocol to a running answer: limits, prompting, sampling and consensus.

Errors of corral become `Refused`, with the status and code that OpenAI's clients expect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Generator, Iterable
from dataclasses import replace
from typing import Literal, NamedTuple

from corral.answering.answerer import Answer, TextDelta, TextStream
from corral.answering.consensus import Consensus
from corral.engines.base import OPTIONAL_SAMPLING, Finish, Sampling
from corral.errors import (
    CorralError,
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    RequestError,
    TemplateError,
)
from corral.messages import Conversation, Message
from corral.serving.accounts import Reserve
from corral.serving.errors import engine_unavailable
from corral.serving.models import ServedModel
from corral.serving.protocol import (
    MAX_STOPS,
    ConsensusCandidate,
    ConsensusOptions,
    ConsensusResult,
    ConversationRequest,
    GenerationRequest,
    Refused,
    RequestLimits,
    Usage,
)
from corral.serving.request_fields import RequestBody
from corral.template import Template

IMPOSSIBLE_LOGPROB = -9999.0
"""Of a token of probability 0, as vLLM writes it: JSON has no infinity."""
_TOKENS_AT_ONCE = 16  # of a chosen answer's log-probabilities, in one event
_log = logging.getLogger(__name__)


class RunningAnswer:
    """An answer being generated, from `start_answer`: iterate over `deltas` once, or await `result`.

    Args:
        stream: the text of all choices, or of all candidates.
        consensus: chooses one of the candidates; None: all choices are returned.
        shows_logprobs: whether the deltas of a chosen answer carry its tokens.
    """

    def __init__(self, stream: TextStream, consensus: Consensus | None, *, shows_logprobs: bool) -> None:
        self._stream = stream
        self._consensus = consensus
        self._shows_logprobs = shows_logprobs
        self.consensus_result: ConsensusResult | None = None
        """How the answer was chosen, once it is."""

    async def result(self) -> Answer:
        """The complete answer. Raises: Refused (the engine failed)."""
        with translate_errors():
            answer = await self._stream.collect(self._consensus)
        if self._consensus is not None:
            self.consensus_result = _consensus_result(answer)
        return answer

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """The text as it is generated; with consensus the chosen answer, as choice 0, once it is known. Raises: Refused."""
        if self._consensus is not None:
            answer = await self.result()
            tokens = answer.tokens[answer.winner] if answer.tokens and self._shows_logprobs else ()
            for start in range(0, max(1, len(tokens)), _TOKENS_AT_ONCE):
                if start:
                    await asyncio.sleep(0)  # the log-probabilities of a long answer take seconds to format
                part = tokens[start : start + _TOKENS_AT_ONCE]
                is_last = start + _TOKENS_AT_ONCE >= len(tokens)
                text, finish = "" if start else answer.text, answer.finish if is_last else None
                yield TextDelta(0, text, finish, part, answer.vote if is_last else None)
            return
        with translate_errors():
            async with contextlib.aclosing(aiter(self._stream)) as deltas:
                async for delta in deltas:
                    yield delta

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all choices or candidates."""
        return count_usage(self._stream.prompt_tokens, self._stream.completion_tokens)

    def cancel(self) -> None:
        """Stop the work; does nothing if it is done."""
        self._stream.cancel()


async def start_answer(
    served: ServedModel,
    conversation: Conversation,
    request: ConversationRequest,
    reserve: Reserve,
    *,
    max_tokens: int | None,
    param: str,
) -> RunningAnswer:
    """Start to answer a conversation, with the model's prompting and, unless the request says otherwise, its consensus.

    Args:
        conversation: an assistant's message at its end is continued.
        reserve: sets aside what the answer may use of the caller's quota.
        max_tokens: of each choice; None: as many as the context, the limits and the quota leave.
        param: the field of the request that holds the conversation.

    Raises:
        Refused: the request cannot be answered.
    """
    consensus = _choose_consensus(served, request)
    sampling = build_sampling(request, 1, sampling_defaults(served, request))
    if consensus is not None:
        # Log-probabilities break ties.
        sampling = replace(sampling, n=consensus.n, logprobs=served.answerer.engine.features.logprobs)
    check_request(served, request, sampling)
    check_conversation(served, conversation, param=param)
    answerer = served.answerer
    # Few-shot examples are dropped to leave room for the answer, of the model's usual length if none is given that fits.
    fits = max_tokens is not None and max_tokens < served.context
    reserved = max_tokens if max_tokens is not None and fits else answerer.sampling.max_tokens
    with translate_errors():
        try:
            conversation = arrange_system(answerer.template, conversation)
            prompt = await answerer.encode_prompt(conversation, replace(answerer.sampling, max_tokens=reserved))
        except TemplateError as error:
            raise Refused(400, error.what, param=param) from error
        left = tokens_left(served, len(prompt.ids), None, param=param)
        length = choose_length(served, request, max_tokens, left, served.limits.default_tokens)
        check_logprobs(served, request, sampling.n * length)
        length = reserve(len(prompt.ids), length, sampling.n, may_shorten=max_tokens is None)
        stream = answerer.start(prompt, with_length(sampling, length), request.stops)
        return RunningAnswer(stream, consensus, shows_logprobs=request.wants_logprobs)


def arrange_system(template: Template, conversation: Conversation) -> Conversation:
    """The conversation with system messages where its template renders them.

    They stay where they are if the template renders several, and later ones. Else all their texts become one message at the
    start, with an empty line between them. If there is nothing but system messages, and the template needs a user's message,
    they become that.
    """
    messages = conversation.messages
    systems = [message for message in messages if message.role == "system"]
    others = tuple(message for message in messages if message.role != "system")
    text = "\n\n".join(message.content for message in systems)
    if systems and not others and not template.renders_system_alone:
        return Conversation((Message("user", text),))
    is_usual = messages[: len(systems)] == tuple(systems) and len(systems) <= 1
    if is_usual or template.renders_any_system:
        return conversation
    return Conversation((Message("system", text), *others))


def _consensus_result(answer: Answer) -> ConsensusResult:
    vote = answer.vote
    assert vote is not None
    return ConsensusResult(
        method=vote.method,
        winner=vote.winner,
        candidates=[
            ConsensusCandidate(text=text, finish_reason=completion.finish, score=score, result=result)
            for text, completion, score, result in zip(
                answer.texts, answer.completions, vote.scores, vote.results, strict=True
            )
        ],
        cancelled=vote.cancelled,
    )


def count_usage(prompt: int, completion: int) -> Usage:
    """Counts of prompt and completion tokens, and their sum."""
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def choice_count(served: ServedModel, request: ConversationRequest) -> int:
    """How many choices or candidates a request generates at once, at most as many as one may have. Raises: Refused."""
    consensus = _choose_consensus(served, request)
    return min(served.limits.n, request.n or 1) if consensus is None else consensus.n


def _choose_consensus(served: ServedModel, request: ConversationRequest) -> Consensus | None:
    """The consensus that applies to a request. Raises: Refused."""
    if "consensus" not in request.model_fields_set:
        # With n > 1 the client wants all answers; at temperature 0 all candidates are the same.
        is_excluded = (request.n or 1) > 1 or request.temperature == 0
        return None if is_excluded else served.answerer.consensus
    options = request.consensus
    if options is None:
        return None
    _check_consensus(served, request, options)
    default = served.answerer.consensus or Consensus(options.method, embed=served.embed)
    return replace(default, method=options.method, n=options.n, stop=options.stop, embed=served.embed)


def _check_consensus(served: ServedModel, request: ConversationRequest, options: ConsensusOptions) -> None:
    no_embeddings = "cosine needs embeddings, and this server was started without them"
    rules = (
        ((request.n or 1) > 1, "n", "a vote gives one answer: set the number of candidates in 'consensus'"),
        (request.temperature == 0, "temperature", "0 draws the same answer each time, so there is nothing to vote on"),
        (options.n > served.limits.n, "consensus.n", f"at most {served.limits.n} candidates are generated"),
        (options.method == "cosine" and served.embed is None, "consensus.method", no_embeddings),
    )
    check_rules(rules)


def check_known_fields(limits: RequestLimits, request: RequestBody) -> None:
    """Raises: Refused (the server is strict, and the request has a field that its type does not declare)."""
    unknown = request.notes.unknown
    if limits.strict and unknown is not None:
        what = f"{unknown!r} is not a field this server knows"
        raise Refused(400, what, param=unknown, code="unknown_parameter")


def check_request(served: ServedModel, request: GenerationRequest, sampling: Sampling) -> None:
    """Check the fields that all protocols share against the model, its engine and the limits. Raises: Refused."""
    limits, engine = served.limits, served.answerer.engine
    check_known_fields(limits, request)
    lengths = [len(stop) for stop in request.stops]
    stops = f"at most {MAX_STOPS} strings of at most {limits.stop_characters} characters"
    needs_stream = request.stream_options is not None and not request.stream
    vocabulary = engine.features.vocabulary
    context = f"the context of this model is {served.context} tokens"
    rules = [
        ((request.n or 1) > limits.n, "n", f"at most {limits.n} choices are served"),
        (max(lengths, default=0) > limits.stop_characters, "stop", stops),
        (needs_stream and limits.strict, "stream_options", "needs 'stream': true"),
        (sampling.logprobs and not engine.features.logprobs, "logprobs", "the engine of this server gives none"),
        (sampling.top_logprobs > 0 and not sampling.logprobs, "top_logprobs", "needs 'logprobs': true"),
        ((request.num_ctx or 0) > served.context, "num_ctx", context),
        (
            any(id_ >= vocabulary for id_, _ in sampling.logit_bias),
            "logit_bias",
            f"token ids are from 0 to {vocabulary - 1}",
        ),
    ]
    for name, neutral in OPTIONAL_SAMPLING.items():
        is_lacking = getattr(sampling, name) != neutral and name not in engine.features.honours
        field = "logprobs" if name == "top_logprobs" and name not in type(request).model_fields else name
        rules.append((is_lacking, field, f"the engine of this model, {engine.name!r}, does not support it"))
    check_rules(rules)
    if needs_stream:
        request.notes.add_ignored("stream_options")


def check_logprobs(served: ServedModel, request: GenerationRequest, tokens: int) -> None:
    """Check how many log-probabilities may be returned for so many tokens. Raises: Refused."""
    most, count = served.limits.logprobs, tokens * (1 + request.top_logprob_count)
    what = f"at most {most} are returned at once, and this request may have {count}: ask for fewer choices or tokens"
    check_rules([(request.wants_logprobs and count > most, "logprobs", what)])


def choose_length(
    served: ServedModel, request: GenerationRequest, max_tokens: int | None, left: int, default: int
) -> int:
    """The tokens of an answer: as many as requested, if the context (`left`) and the limits have room for them.

    Raises: Refused (a strict server, and they have not).
    """
    most = min(left, served.limits.max_tokens)
    if max_tokens is None:
        return min(most, default)
    if max_tokens <= most:
        return max_tokens
    if served.limits.strict:
        what = f"'max_tokens': there is room for {most} tokens, and {max_tokens} were asked for"
        raise Refused(400, what, param="max_tokens", code="context_length_exceeded")
    request.notes.max_tokens = min(most, request.notes.max_tokens or most)
    return most


def check_conversation(served: ServedModel, conversation: Conversation, *, param: str) -> None:
    """Check a conversation's size before it is rendered, which takes longer. Raises: Refused."""
    check_message_count(served, len(conversation.messages), param=param)
    check_characters(served, conversation.characters, param=param)


def check_message_count(served: ServedModel, count: int, *, param: str) -> None:
    """Raises: Refused (there are too many messages)."""
    most = served.limits.messages
    check_rules(((count > most, param, f"at most {most} messages are served, and there are {count}"),))


def check_characters(served: ServedModel, count: int, *, param: str) -> None:
    """Raises: Refused (a prompt has too many characters)."""
    most = served.limits.prompt_characters
    if count > most:
        what = f"{param!r}: at most {most} characters of a prompt are served, and it has {count}"
        raise Refused(400, what, param=param, code="context_length_exceeded")


def check_rules(rules: Iterable[tuple[bool, str, str]]) -> None:
    """Refuse a request by the first broken rule of (is broken, field, message). Raises: Refused."""
    for is_broken, param, what in rules:
        if is_broken:
            raise Refused(400, f"{param!r}: {what}", param=param)


def tokens_left(served: ServedModel, prompt_tokens: int, max_tokens: int | None, *, param: str) -> int:
    """Tokens that the context has left after a prompt. Raises: Refused (fewer than `max_tokens`, or none; a long prompt)."""
    left = served.context - prompt_tokens
    if (1 if max_tokens is None else max_tokens) > left:
        need = f" and {max_tokens} were asked for" if max_tokens else ", which leaves none for an answer"
        what = f"the context of this model is {served.context} tokens: {param!r} takes {prompt_tokens}{need}"
        raise Refused(400, what, param=param, code="context_length_exceeded")
    most = served.limits.prompt_tokens
    if prompt_tokens > most:
        what = f"{param!r}: at most {most} tokens of a prompt are served, and it has {prompt_tokens}"
        raise Refused(400, what, param=param, code="context_length_exceeded")
    return left


class SamplingDefaults(NamedTuple):
    """Sampling of a request that does not say. The field defaults are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0


_OPENAI_DEFAULTS = SamplingDefaults()


def sampling_defaults(served: ServedModel, request: ConversationRequest) -> SamplingDefaults:
    """The sampling with which the model was evaluated. Raises: Refused (as `start_answer`)."""
    consensus = _choose_consensus(served, request)
    if consensus is not None:
        return SamplingDefaults(consensus.temperature, consensus.top_p)
    own = served.answerer.sampling
    # With greedy decoding, n answers would be the same.
    return (
        SamplingDefaults(own.temperature, own.top_p) if own.temperature or (request.n or 1) == 1 else _OPENAI_DEFAULTS
    )


def build_sampling(
    request: GenerationRequest, max_tokens: int, defaults: SamplingDefaults = _OPENAI_DEFAULTS
) -> Sampling:
    """The sampling of a request."""
    return Sampling(
        max_tokens=max_tokens,
        n=request.n or 1,
        temperature=defaults.temperature if request.temperature is None else request.temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=request.logit_bias or (),
        min_tokens=request.min_tokens or 0,
        seed=None if request.seed == -1 else request.seed,  # as text-generation UIs write it
        stop_ids=tuple(request.stop_token_ids or ()),
        logprobs=request.wants_logprobs,
        top_logprobs=request.top_logprob_count,
    )


def with_length(sampling: Sampling, max_tokens: int) -> Sampling:
    """The sampling of an answer of at most so many tokens."""
    return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))


def finish_reason(finish: Finish) -> Literal["stop", "length"]:
    """OpenAI's name of the finish reason. Raises: Refused (the engine cancelled the answer)."""
    if finish == "cancelled":
        raise engine_unavailable("the answer was cut off by the engine")
    return finish


def _loggable(error: CorralError) -> str:
    """Type, status and place of an error for the log, without its message, which may quote the prompt."""
    status = f" {error.status}" if isinstance(error, EngineError) and error.status else ""
    return f"{type(error).__name__}{status}" + (f" at {error.where}" if error.where else "")


@contextlib.contextmanager
def translate_errors() -> Generator[None]:
    """Turn errors of corral into Refused; other exceptions pass, as they are bugs in the server."""
    try:
        yield
    except Refused:
        raise
    except RequestError as error:
        raise Refused(400, error.what) from error
    except EngineUnavailableError as error:
        _log.warning("no engine is available: %s", _loggable(error))
        raise engine_unavailable("no engine of this model is available now", error.retry_seconds) from error
    except EngineClosedError as error:
        raise engine_unavailable("the engine of this server is closed") from error
    except CorralError as error:
        _log.error("the engine failed: %s", _loggable(error))
        raise Refused(500, "the engine failed on this request", code="engine_failed") from error
