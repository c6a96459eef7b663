"""Between the Responses protocol and an answer under way: a ResponsesRequest → a response, whole or as events, and stored.

An answer is stored before its end is told. Of one that is broken off, what a client has seen as a stream is kept, marked
incomplete; what it has not seen is not, so that it can ask again. It does not know HTTP, or how an answer is drawn or chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from corral.engines.base import Finish
from corral.errors import DatabaseError, TemplateError
from corral.messages import Conversation
from corral.serving.admission import Event
from corral.serving.database import beside
from corral.serving.generation import (
    Answering,
    Served,
    begin,
    check_messages,
    check_size,
    faults,
    finish_reason,
    room,
    sampling,
    usual,
)
from corral.serving.protocol import Refused, Usage
from corral.serving.response_store import Turn, Turns
from corral.serving.responses_protocol import (
    Fault,
    Incomplete,
    ItemShown,
    OutputPartShown,
    ResponseShown,
    ResponsesRequest,
    ResponseUsage,
    conversation_of,
)
from corral.serving.tables import Item, new_id

T = TypeVar("T")

_BEATS = 4  # signs of life per lease
_STORE_SECONDS = 30  # more than a database that answers takes to fail
_log = logging.getLogger(__name__)


async def responding(served: Served, turns: Turns, owner: str, request: ResponsesRequest) -> Responding:
    """Ask a model for what a request wants, after what was said before.

    Raises:
        Refused: it cannot be answered; nothing of it is stored then.
    """
    if None not in (request.conversation, request.previous_response_id):
        what = "'previous_response_id': a response goes on from it or from 'conversation', not from both"
        raise Refused(400, what, param="previous_response_id")
    if isinstance(request.input, list):
        check_messages(served, len(request.input), param="input")
    is_stored = request.store is not False
    turn = Turn(new_id("resp"), owner, request.items, is_stored, request.conversation_id, request.previous_response_id)
    drawn = sampling(request, 0, usual(served, request))
    shown = ResponseShown.begun(turn.id, int(time.time()), served.name, request, drawn)
    hold = Hold(turns, turn)
    before = await hold.take(shown)
    try:
        conversation = conversation_of(request.instructions, [*before, *turn.inputs])
        if request.truncation == "auto":
            conversation = await _fitting(served, conversation, request.max_output_tokens)
        wanted = request.max_output_tokens
        answering = await begin(served, conversation, request, max_tokens=wanted, param="input")
    except BaseException:
        await hold.drop()
        raise
    return Responding(shown, answering, hold)


class Responding:
    """A request under way, made by `responding`: its text as it comes (`events`) or at its end (`whole`)."""

    def __init__(self, shown: ResponseShown, answering: Answering, hold: Hold) -> None:
        self._shown = shown
        self._answering = answering
        self._hold = hold
        self._item = new_id("msg")
        self._text = ""
        """What was sent."""
        self._sent = 0
        """Events."""
        self._ending: asyncio.Task[None] | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all candidates."""
        return self._answering.usage

    async def whole(self) -> ResponseShown:
        """The response, which is stored. Raises: Refused (the engine or the store failed)."""
        try:
            answer = await self._answering.whole()
            return await self._done(answer.text, answer.finish)
        except Refused as refused:
            await self._failed(refused)
            raise
        finally:
            await self._broken_off()

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events, of which the last holds the whole response."""
        try:
            yield self._event("response.created", response=self._shown)
            yield self._event("response.in_progress", response=self._shown)
            place = {"item_id": self._item, "output_index": 0, "content_index": 0}
            begun = ItemShown(id=self._item, role="assistant", status="in_progress", content=[])
            yield self._event("response.output_item.added", output_index=0, item=begun)
            yield self._event("response.content_part.added", **place, part=OutputPartShown(text=""))
            finish: Finish = "cancelled"
            async with contextlib.aclosing(self._answering.deltas()) as deltas:
                async for delta in deltas:
                    if delta.text:
                        self._text += delta.text
                        yield self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
                    finish = delta.finish or finish
            done = await self._done(self._text, finish)
            part = OutputPartShown(text=self._text)
            yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=part)
            yield self._event("response.output_item.done", output_index=0, item=done.output[0])
            yield self._event(f"response.{done.status}", response=done)
        except Refused as refused:
            yield self._event("response.failed", response=await self._failed(refused))
        finally:
            await self._broken_off()

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended."""
        self._answering.cancel()
        if not self._hold.is_over:
            # It was neither awaited nor iterated over: nobody else will let go.
            self._ending = asyncio.get_running_loop().create_task(self._broken_off())

    async def _done(self, text: str, finish: Finish) -> ResponseShown:
        is_cut = finish_reason(finish) == "length"
        item = Item(self._item, "assistant", (text,), "incomplete" if is_cut else "completed")
        self._shown = self._shown.model_copy(
            update={
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": Incomplete() if is_cut else None,
                "completed_at": None if is_cut else int(time.time()),
                "consensus": self._answering.vote,
                "usage": ResponseUsage.of(self.usage),
            }
        )
        await self._hold.end(self._shown, item, kept=True)
        return self._shown.model_copy(update={"output": [ItemShown.of(item)]})

    async def _failed(self, refused: Refused) -> ResponseShown:
        """The response as it is now; what was sent of it stays visible in it, and is in no conversation."""
        self._shown = self._shown.model_copy(
            update={
                "status": "failed",
                "error": Fault(message=refused.what),
                "incomplete_details": None,
                "usage": ResponseUsage.of(self.usage),
            }
        )
        item = self._partial()
        with contextlib.suppress(Refused):  # the store may be what failed
            await self._hold.end(self._shown, item, kept=False)
        return self._shown.model_copy(update={"output": [ItemShown.of(item)] if item else []})

    async def _broken_off(self) -> None:
        if self._hold.is_over:
            return
        self._answering.cancel()
        self._shown = self._shown.model_copy(update={"status": "cancelled", "usage": ResponseUsage.of(self.usage)})
        item = self._partial()
        with contextlib.suppress(Refused):
            await self._hold.end(self._shown, item, kept=item is not None)

    def _partial(self) -> Item | None:
        return Item(self._item, "assistant", (self._text,), "incomplete") if self._text else None

    def _event(self, type_: str, **fields: Any) -> Event:
        data: dict[str, Any] = {"type": type_, "sequence_number": self._sent}
        for name, value in fields.items():
            data[name] = value.model_dump() if isinstance(value, BaseModel) else value
        self._sent += 1
        return Event(json.dumps(data), type_)


class Hold:
    """A turn, held for as long as it is answered, by coroutines that may be cancelled anywhere."""

    def __init__(self, turns: Turns, turn: Turn) -> None:
        self.is_over = False
        self._turns = turns
        self._turn = turn
        self._beat: asyncio.Task[None] | None = None

    async def take(self, shown: ResponseShown) -> list[Item]:
        """Begin. Returns: what was said before. Raises: Refused."""
        taking = asyncio.create_task(stored(self._turns.begin, self._turn, shown.body))
        try:
            before = await asyncio.shield(taking)
        except asyncio.CancelledError:
            with contextlib.suppress(Refused):
                await taking
                await self.drop()
            raise
        if self._turn.leaves_a_trace:
            self._beat = asyncio.create_task(self._live())
        return before

    async def drop(self) -> None:
        """End as if it had not been."""
        if self._over():
            with contextlib.suppress(Refused):  # then it is taken for dead before long
                await stored(self._turns.drop, self._turn)

    async def end(self, shown: ResponseShown, output: Item | None, *, kept: bool) -> None:
        """Store what came of it. Does nothing once it is over. Raises: Refused."""
        if self._over():
            await stored(partial(self._turns.end, self._turn, shown.body, output, kept=kept))

    def _over(self) -> bool:
        """End once. Returns: whether there is anything to write."""
        was_over, self.is_over = self.is_over, True
        if self._beat is not None:
            self._beat.cancel()
        return not was_over and self._turn.leaves_a_trace

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(self._turns.lease_seconds / _BEATS)
            with contextlib.suppress(Refused):
                await stored(self._turns.renew, self._turn)


async def stored(call: Callable[..., T], *arguments: Any) -> T:
    """What a call of the store returns, from a thread; it is made to its end even if nobody waits for it.

    Raises:
        Refused: what the call raises, or 503 where the database cannot be used, or does not answer.
    """
    try:
        async with asyncio.timeout(_STORE_SECONDS):
            return await asyncio.shield(asyncio.create_task(beside(call, *arguments)))
    except (DatabaseError, TimeoutError) as error:
        _log.error("%s", error.what if isinstance(error, DatabaseError) else "the database does not answer")
        what = "the store of this server cannot be used just now"
        raise Refused(503, what, code="database_unavailable", retry_seconds=1) from None


async def _fitting(served: Served, conversation: Conversation, wanted: int | None) -> Conversation:
    """A conversation without its oldest turns, as far as it takes to leave room for the answer.

    A system message stays, and so does the last question: if that does not fit alone, it is refused like any other.
    """
    if await _fits(served, conversation, wanted):
        return conversation
    messages = conversation.messages
    head = messages[:1] if messages[0].role == "system" else ()
    starts = [i for i, message in enumerate(messages) if message.role == "user"]
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if await _fits(served, Conversation((*head, *messages[starts[middle] :])), wanted):
            high = middle
        else:
            low = middle + 1
    return Conversation((*head, *messages[starts[low] :]))


async def _fits(served: Served, conversation: Conversation, wanted: int | None) -> bool:
    try:
        check_size(served, conversation, param="input")
    except Refused:
        return False
    with faults():
        try:
            ids = await served.answerer.encode_prompt(conversation)
        except TemplateError as error:
            raise Refused(400, error.what, param="input") from error
    try:
        room(served, len(ids), wanted, param="input")
    except Refused:
        return False
    return True
