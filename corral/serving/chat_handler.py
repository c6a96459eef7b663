"""Between the chat protocol and an answer under way: a ChatRequest → a ChatCompletion, or the events of a stream.

It does not know HTTP (who is connected, how events are sent, that there are routes), nor how an answer is drawn or chosen.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from corral.answering.answerer import Answer, TextDelta, Token
from corral.messages import Conversation, Role
from corral.serving.admission import Event
from corral.serving.chat_protocol import (
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Logprobs,
    Message,
    TokenLogprob,
)
from corral.serving.generation import Answering, Served, begin, finish_reason
from corral.serving.protocol import Refused, Usage, VoteShown

DONE = Event("[DONE]")
"""The event that ends a stream."""

_FIRST = {"role": "assistant", "content": ""}


async def asked(served: Served, request: ChatRequest) -> Asked:
    """Ask a model for what a request wants. Raises: Refused (it cannot be answered)."""
    if None not in (request.max_tokens, request.max_completion_tokens):
        what = "'max_tokens': set either it or 'max_completion_tokens'"
        raise Refused(400, what, param="max_tokens")
    conversation = _conversation(request.messages)
    wanted = request.max_completion_tokens or request.max_tokens
    answering = await begin(served, conversation, request, max_tokens=wanted, param="messages")
    return Asked(served, request, answering)


class Asked:
    """A request under way, made by `asked`: its text as it comes (`events`) or at its end (`whole`)."""

    def __init__(self, served: Served, request: ChatRequest, answering: Answering) -> None:
        self._served = served
        self._request = request
        self._answering = answering
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def whole(self) -> ChatCompletion:
        """The answer; with a vote, its winner as the one choice. Raises: Refused (the engine failed)."""
        answer = await self._answering.whole()
        places = range(len(answer.texts)) if answer.vote is None else [answer.winner]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=[self._choice(answer, place, index) for index, place in enumerate(places)],
            usage=self.usage,
            consensus=self._answering.vote,
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events: chunks as JSON, and `DONE`. A fault is the last event, with nothing after it."""
        try:
            for i in range(self._request.n or 1):
                yield self._chunk(ChunkChoice(index=i, delta=_FIRST, logprobs=None, finish_reason=None))
            async with contextlib.aclosing(self._answering.deltas()) as deltas:
                async for delta in deltas:
                    for choice in self._choices(delta):
                        yield self._chunk(choice, vote=self._answering.vote if choice.finish_reason else None)
            if self._request.wants_usage:
                yield self._chunk(usage=self.usage)
            yield DONE
        except Refused as refused:
            yield Event(refused.body().model_dump_json())

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all choices or candidates."""
        return self._answering.usage

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended."""
        self._answering.cancel()

    def _choice(self, answer: Answer, place: int, index: int) -> Choice:
        tokens = answer.tokens[place] if answer.tokens and self._request.logprobs else None
        return Choice(
            index=index,
            message=Message(content=answer.texts[place]),
            logprobs=None if tokens is None else self._logprobs(tokens),
            finish_reason=finish_reason(answer.completions[place].finish),
        )

    def _choices(self, delta: TextDelta) -> list[ChunkChoice]:
        found: list[ChunkChoice] = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens) if self._request.logprobs else None
            text = {"content": delta.text}
            found.append(ChunkChoice(index=delta.choice, delta=text, logprobs=logprobs, finish_reason=None))
        if delta.finish is not None:
            reason = finish_reason(delta.finish)
            found.append(ChunkChoice(index=delta.choice, delta={}, logprobs=None, finish_reason=reason))
        return found

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None, vote: VoteShown | None = None) -> Event:
        chunk = Chunk(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=list(choices),
            usage=usage,
            consensus=vote,
        )
        # OpenAI sends `usage` (null in all chunks but the last) only to those who asked for it.
        return Event(chunk.model_dump_json(exclude=None if self._request.wants_usage else {"usage"}))

    def _logprobs(self, tokens: Sequence[Token]) -> Logprobs:
        tokenizer = self._served.answerer.template.tokenizer
        return Logprobs(
            content=[
                TokenLogprob(
                    token=t.data.decode("utf-8", "replace") or str(tokenizer.convert_ids_to_tokens(t.id)),
                    bytes=list(t.data) or None,
                    logprob=t.logprob,
                )
                for t in tokens
            ]
        )


def _conversation(messages: Sequence[ChatMessage]) -> Conversation:
    turns: list[tuple[Role, str]] = []
    for i, message in enumerate(messages):
        role: Role = "system" if message.role == "developer" else message.role
        if role == "system" and i > 0:
            param = f"messages[{i}].role"
            raise Refused(400, f"{param!r}: there is one system message at most, and it comes first", param=param)
        turns.append((role, message.text))
    if messages[-1].role != "user":
        raise Refused(400, "'messages': the last one must be the user's", param="messages")
    return Conversation.from_turns(*turns)
