"""What a request comes to on a model, whichever protocol it came by: limits, prompting, sampling, a vote; an answer under way.

Every fault becomes a Refused with the status and the words OpenAI's clients expect. It does not know routes, events or the
form of answers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from corral.answering.answerer import Answer, Answerer, TextDelta, TextStream
from corral.answering.consensus import Consensus, Embed
from corral.engines.base import Finish, Sampling
from corral.errors import (
    CorralError,
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    RequestError,
    TemplateError,
)
from corral.messages import Conversation
from corral.serving.protocol import (
    Ask,
    AskConversation,
    CandidateShown,
    ConsensusWish,
    Limits,
    Refused,
    Usage,
    VoteShown,
)
from corral.serving.text_prompts import TextPrompts

_MOST_STOPS = 4
_LATER_SECONDS = 5  # after which a request that met no engine may be tried again
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """A model as clients see it."""

    answerer: Answerer
    name: str
    limits: Limits = field(default_factory=Limits)
    fingerprint: str | None = None
    """Changes when the same request and seed may give another answer."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When serving began, in seconds since 1970."""
    embed: Embed | None = None
    """For votes by cosine; without it they are refused."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.answerer.engine.features.max_length

    @cached_property
    def texts(self) -> TextPrompts:
        """For prompts without a template."""
        return TextPrompts(self.answerer.template)


class Answering:
    """An answer under way, made by `begin`: iterate over `deltas` (once), or await `whole`.

    Args:
        stream: of all choices, or of all candidates.
        consensus: chooses among the candidates.
    """

    def __init__(self, stream: TextStream, consensus: Consensus | None) -> None:
        self._stream = stream
        self._consensus = consensus
        self.vote: VoteShown | None = None
        """How the answer was chosen from several, once it was."""

    async def whole(self) -> Answer:
        """The answer. Raises: Refused (the engine failed)."""
        with faults():
            answer = await self._stream.collect(self._consensus)
        if self._consensus is not None:
            self.vote = _shown(answer)
        return answer

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Its text as it comes; with consensus the winner, as choice 0, once it is known. Raises: Refused."""
        if self._consensus is not None:
            answer = await self.whole()
            tokens = answer.tokens[answer.winner] if answer.tokens else ()
            yield TextDelta(0, answer.text, answer.finish, tokens, answer.vote)
            return
        with faults():
            async with contextlib.aclosing(aiter(self._stream)) as deltas:
                async for delta in deltas:
                    yield delta

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all candidates."""
        return usage(self._stream.prompt_tokens, self._stream.completion_tokens)

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended."""
        self._stream.cancel()


async def begin(
    served: Served, conversation: Conversation, ask: AskConversation, *, max_tokens: int | None, param: str
) -> Answering:
    """Ask a model for what a request wants, with the model's prompting and, unless the request says otherwise, its vote.

    Args:
        conversation: ends with the user.
        max_tokens: of each choice; None takes what the context and the limits leave.
        param: the field of the request that holds the conversation.

    Raises:
        Refused: the request cannot be answered.
    """
    check(served, ask, most_stops=_MOST_STOPS)
    check_length(served, max_tokens)
    check_size(served, conversation, param=param)
    consensus = _consensus(served, ask)
    answerer = served.answerer
    with faults():
        try:
            # Examples make room for the answer: for one of the usual length, where the request names none.
            kept = max_tokens or answerer.sampling.max_tokens
            ids = await answerer.encode_prompt(conversation, replace(answerer.sampling, max_tokens=kept))
        except TemplateError as error:
            raise Refused(400, error.what, param=param) from error
        left = room(served, len(ids), max_tokens, param=param)
        length = max_tokens or min(left, served.limits.default_tokens, served.limits.max_tokens)
        drawn = sampling(ask, length, usual(served, ask))
        if consensus is not None:
            # Log-probabilities break ties.
            drawn = replace(drawn, n=consensus.n, logprobs=answerer.engine.features.logprobs)
        return Answering(answerer.start(ids, drawn, list(dict.fromkeys(ask.stops))), consensus)


def _shown(answer: Answer) -> VoteShown:
    vote = answer.vote
    assert vote is not None
    return VoteShown(
        method=vote.method,
        winner=vote.winner,
        candidates=[
            CandidateShown(text=text, finish_reason=completion.finish, score=score, result=result)
            for text, completion, score, result in zip(
                answer.texts, answer.completions, vote.scores, vote.results, strict=True
            )
        ],
        cancelled=vote.cancelled,
    )


def usage(prompt: int, completion: int) -> Usage:
    """Tokens of prompt and completion, and their sum."""
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _consensus(served: Served, ask: AskConversation) -> Consensus | None:
    """What chooses the answer. Raises: Refused."""
    if "consensus" not in ask.model_fields_set:
        # Several choices are asked for to be seen, and the most likely answer is the same each time.
        asks_otherwise = (ask.n or 1) > 1 or ask.temperature == 0
        return None if asks_otherwise else served.answerer.consensus
    wish = ask.consensus
    if wish is None:
        return None
    _check_wish(served, ask, wish)
    default = served.answerer.consensus or Consensus(wish.method, embed=served.embed)
    return replace(default, method=wish.method, n=wish.n, stop=wish.stop, embed=served.embed)


def _check_wish(served: Served, ask: AskConversation, wish: ConsensusWish) -> None:
    by_meaning = "cosine needs embeddings, and this server was started without them"
    rules = (
        ((ask.n or 1) > 1, "n", "a vote gives one answer: say how many are drawn in 'consensus'"),
        (ask.temperature == 0, "temperature", "0 draws the same answer each time, so there is nothing to vote on"),
        (wish.n > served.limits.n, "consensus.n", f"at most {served.limits.n} candidates are drawn"),
        (wish.method == "cosine" and served.embed is None, "consensus.method", by_meaning),
    )
    _refuse_if_broken(rules)


def check(served: Served, request: Ask, *, most_stops: int) -> None:
    """Hold what is asked against the model and the limits. Raises: Refused."""
    limits = served.limits
    lengths = [len(stop) for stop in request.stops]
    can_logprobs = served.answerer.engine.features.logprobs
    stops = f"at most {most_stops} strings of 1 to {limits.stop_characters} characters"
    rules = (
        ((request.n or 1) > limits.n, "n", f"at most {limits.n} choices are served"),
        (len(lengths) > most_stops, "stop", stops),
        (any(not 1 <= length <= limits.stop_characters for length in lengths), "stop", stops),
        (request.stream_options is not None and not request.stream, "stream_options", "needs 'stream': true"),
        (request.wants_logprobs and not can_logprobs, "logprobs", "the engine of this server gives none"),
    )
    _refuse_if_broken(rules)


def check_length(served: Served, wanted: int | None) -> None:
    """Hold the length of the answer that is asked for against the limits. Raises: Refused."""
    most = served.limits.max_tokens
    _refuse_if_broken((((wanted or 0) > most, "max_tokens", f"at most {most} tokens are drawn for one choice"),))


def check_size(served: Served, conversation: Conversation, *, param: str) -> None:
    """Hold a conversation against the limits before it is made a prompt, which takes longer. Raises: Refused."""
    check_messages(served, len(conversation.messages), param=param)
    check_characters(served, conversation.characters, param=param)


def check_messages(served: Served, count: int, *, param: str) -> None:
    """Raises: Refused (there are more than the limit)."""
    most = served.limits.messages
    _refuse_if_broken(((count > most, param, f"at most {most} messages are served, and there are {count}"),))


def check_characters(served: Served, count: int, *, param: str) -> None:
    """Raises: Refused (a prompt has more than the limit)."""
    most = served.limits.prompt_characters
    if count > most:
        what = f"{param!r}: at most {most} characters of a prompt are served, and it has {count}"
        raise Refused(400, what, param=param, code="context_length_exceeded")


def _refuse_if_broken(rules: tuple[tuple[bool, str, str], ...]) -> None:
    for is_broken, param, what in rules:
        if is_broken:
            raise Refused(400, f"{param!r}: {what}", param=param)


def room(served: Served, prompt_tokens: int, wanted: int | None, *, param: str) -> int:
    """Tokens that a prompt leaves for its answer. Raises: Refused (none, or fewer than wanted; a prompt over the limit)."""
    left = served.context - prompt_tokens
    if (1 if wanted is None else wanted) > left:
        asked = f" and {wanted} were asked for" if wanted else ", which leaves none for an answer"
        what = f"the context of this model is {served.context} tokens: {param!r} takes {prompt_tokens}{asked}"
        raise Refused(400, what, param=param, code="context_length_exceeded")
    most = served.limits.prompt_tokens
    if prompt_tokens > most:
        what = f"{param!r}: at most {most} tokens of a prompt are served, and it has {prompt_tokens}"
        raise Refused(400, what, param=param, code="context_length_exceeded")
    return left


class Odds(NamedTuple):
    """How likely tokens are drawn. The defaults are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0


_OPENAIS = Odds()


def usual(served: Served, ask: AskConversation) -> Odds:
    """How a model's answers are drawn where a request does not say: as it was evaluated. Raises: Refused (as `begin`)."""
    consensus = _consensus(served, ask)
    if consensus is not None:
        return Odds(consensus.temperature, consensus.top_p)
    own = served.answerer.sampling
    # Several answers of a model that takes the most likely token each time would be one.
    return Odds(own.temperature, own.top_p) if own.temperature or (ask.n or 1) == 1 else _OPENAIS


def sampling(request: Ask, max_tokens: int, usually: Odds = _OPENAIS) -> Sampling:
    """How a request wants its answers drawn, or how they usually are."""
    return Sampling(
        max_tokens=max_tokens,
        n=request.n or 1,
        temperature=usually.temperature if request.temperature is None else request.temperature,
        top_p=usually.top_p if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        seed=request.seed,
        logprobs=request.wants_logprobs,
    )


def finish_reason(finish: Finish) -> Literal["stop", "length"]:
    """The reason as OpenAI names it. Raises: Refused (the engine cancelled the answer)."""
    if finish == "cancelled":
        raise _unavailable("the answer was cut off by the engine")
    return finish


def _unavailable(what: str, retry_seconds: float | None = None) -> Refused:
    later = _LATER_SECONDS if retry_seconds is None else max(1, math.ceil(retry_seconds))
    return Refused(503, what, code="engine_unavailable", retry_seconds=later)


def _kind(error: CorralError) -> str:
    """What may be logged of an error: what an endpoint says may quote the prompt."""
    status = f" {error.status}" if isinstance(error, EngineError) and error.status else ""
    return f"{type(error).__name__}{status}" + (f" at {error.where}" if error.where else "")


@contextlib.contextmanager
def faults() -> Generator[None]:
    """Errors of corral → Refused. What is no CorralError passes: it is a fault in the server."""
    try:
        yield
    except Refused:
        raise
    except RequestError as error:
        raise Refused(400, error.what) from error
    except EngineUnavailableError as error:
        _log.warning("no engine computes: %s", _kind(error))
        raise _unavailable("nothing computes this model just now", error.retry_seconds) from error
    except EngineClosedError as error:
        raise _unavailable("the engine of this server is closed") from error
    except CorralError as error:
        _log.error("the engine failed: %s", _kind(error))
        raise Refused(500, "the engine failed on this request", code="engine_failed") from error
