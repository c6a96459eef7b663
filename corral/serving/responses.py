"""The Responses API: answers a ResponsesRequest with a response or its events, and stores it.

A response is stored before the client is told that it is complete. If a stream is cancelled, the text that was sent is kept,
marked incomplete; without a stream nothing is kept, so that the client can ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from corral.answering.answerer import Answerer, Token
from corral.engines.base import Finish
from corral.errors import TemplateError
from corral.messages import Conversation, Role
from corral.serving import conversations
from corral.serving.accounts import Reserve, reserve_any
from corral.serving.admission import Admission
from corral.serving.chat import token_logprob
from corral.serving.conversation_store import ConversationStore
from corral.serving.conversations import Paged, Sender, read_store
from corral.serving.database import Database
from corral.serving.errors import Refused
from corral.serving.generation import (
    RunningAnswer,
    arrange_system,
    build_sampling,
    check_conversation,
    check_message_count,
    choice_count,
    finish_reason,
    sampling_defaults,
    start_answer,
    tokens_left,
    translate_errors,
)
from corral.serving.models import ServedModel, ServedModels
from corral.serving.protocol import Usage, json_list, json_with
from corral.serving.request_fields import report
from corral.serving.response_store import LEASE_SECONDS, Lease, PendingResponse, ResponseStore, call_store
from corral.serving.responses_protocol import (
    DeletedObject,
    ItemObject,
    ListObject,
    OutputTextPart,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    failure,
    plain_role,
)
from corral.serving.store import Item, new_id
from corral.serving.streams import Event, json_response
from corral.template import Template


async def start_response(
    served: ServedModel,
    store: ResponseStore,
    owner: str,
    request: ResponsesRequest,
    reserve: Reserve = reserve_any,
    *,
    client: str = "",
) -> ResponsesHandler:
    """Start to answer a request, with the history of its conversation or previous response.

    Raises:
        Refused: it cannot be answered; nothing is stored.
    """
    if None not in (request.conversation, request.previous_response_id):
        what = "'previous_response_id': give either it or 'conversation'"
        raise Refused(400, what, param="previous_response_id")
    if isinstance(request.input, list):
        check_message_count(served, len(request.input), param="input")
    is_stored = request.store is not False
    place = request.conversation_id, request.previous_response_id
    pending = PendingResponse(new_id("resp"), owner, request.items, is_stored, *place, client)
    sampling = build_sampling(request, 0, sampling_defaults(served, request))
    response = ResponseObject.from_request(pending.id, int(time.time()), served.name, request, sampling)
    lease = Lease(store, pending)
    history = await lease.acquire(response.stored_body)
    try:
        conversation = _build_conversation(request.instructions, history, pending.inputs)
        if request.truncation == "auto":
            conversation = await _truncate_to_fit(served, conversation, request.max_output_tokens)
        answer = await start_answer(
            served, conversation, request, reserve, max_tokens=request.max_output_tokens, param="input"
        )
    except BaseException:
        await lease.discard()
        raise
    return ResponsesHandler(response, answer, lease, served.answerer if request.wants_logprobs else None)


def _build_conversation(instructions: str | None, history: Sequence[Item], inputs: Sequence[Item]) -> Conversation:
    """The conversation to answer; an assistant's message at the end of the input is continued.

    Raises: Refused (there is nothing to answer).
    """
    items = (*history, *inputs)
    turns: list[tuple[Role, str]] = [(plain_role(item.role), item.text) for item in items]
    if instructions:
        turns.insert(0, ("system", instructions))
    if not turns or (items and not inputs and items[-1].role == "assistant"):
        why = "the last message is the model's own" if turns else "there is no message, and there are no 'instructions'"
        raise Refused(400, f"'input': there is nothing to answer: {why}", param="input")
    return Conversation.from_turns(*turns)


class ResponsesHandler:
    """A Responses request that is being answered, from `start_response`; see `RequestHandler`.

    Log-probabilities come with the text as it is streamed, or else with the response; its last events repeat the text alone.

    Args:
        logprobs: names the tokens of log-probabilities; None: there are none.
    """

    def __init__(
        self, response: ResponseObject, answer: RunningAnswer, lease: Lease, logprobs: Answerer | None
    ) -> None:
        self._response = response
        self._answer = answer
        self._lease = lease
        self._logprobs = logprobs
        self._item_id = new_id("msg")
        self._text = ""
        """The text sent so far."""
        self._events_sent = 0
        self._cleanup_task: asyncio.Task[None] | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all candidates."""
        return self._answer.usage

    async def result(self) -> ResponseObject | str:
        """The complete, stored response; with log-probabilities its JSON. Raises: Refused (the engine or store failed)."""
        try:
            answer = await self._answer.result()
            done = await self._complete(answer.text, answer.finish)
            if self._logprobs is None or not answer.tokens:
                return done
            return await asyncio.to_thread(_with_logprobs, done, self._logprobs.template, answer.tokens[answer.winner])
        except Refused as refused:
            await self._fail(refused)
            raise
        finally:
            await self._cancel_unfinished()

    async def events(self) -> AsyncGenerator[Event, None]:
        """OpenAI's events; the last one contains the complete response. Raises: Refused (the engine or the store failed)."""
        try:
            yield self._event("response.created", response=self._response)
            yield self._event("response.in_progress", response=self._response)
            position = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
            item = ItemObject(id=self._item_id, role="assistant", status="in_progress", content=[])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **position, part=OutputTextPart(text=""))
            finish: Finish = "cancelled"
            async with contextlib.aclosing(self._answer.deltas()) as deltas:
                async for delta in deltas:
                    if delta.text or (self._logprobs and delta.tokens):
                        self._text += delta.text
                        logprobs = self._delta_logprobs(delta.tokens)
                        yield self._event("response.output_text.delta", **position, delta=delta.text, logprobs=logprobs)
                    finish = delta.finish or finish
            done = await self._complete(self._text, finish)
            part = OutputTextPart(text=self._text)
            yield self._event("response.output_text.done", **position, text=self._text, logprobs=[])
            yield self._event("response.content_part.done", **position, part=part)
            yield self._event("response.output_item.done", output_index=0, item=done.output[0])
            yield self._event(f"response.{done.status}", response=done)
        except Refused as refused:
            await self._fail(refused)
            raise
        finally:
            await self._cancel_unfinished()

    def error_event(self, refused: Refused) -> Event:
        """The failed response; or an error, if the request ended early: then what was sent is stored as cancelled."""
        if self._response.status == "failed":
            return self._event("response.failed", response=self._response)
        detail = refused.body().error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def cancel(self) -> None:
        """Stop the work and release the lease; does nothing if that is done."""
        self._answer.cancel()
        if not self._lease.is_closed:
            # Neither `result` nor `events` was run, so they did not release it.
            self._cleanup_task = asyncio.get_running_loop().create_task(self._cancel_unfinished())

    async def _complete(self, text: str, finish: Finish) -> ResponseObject:
        is_cut = finish_reason(finish) == "length"
        status = "incomplete" if is_cut else "completed"
        item = Item.new("assistant", [text], status, self._item_id)
        self._update(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            consensus=self._answer.consensus_result,
        )
        await self._lease.finish(self._response.stored_body, item, is_kept=True)
        return self._response.model_copy(update={"output": [ItemObject.of(item)]})

    async def _fail(self, refused: Refused) -> None:
        """Store the response as failed. Text that was sent stays in it, but not in the conversation."""
        self._update(**failure(refused.what))
        item = self._partial_item()
        with contextlib.suppress(Refused):  # the store may be what failed
            await self._lease.finish(self._response.stored_body, item, is_kept=False)
        self._response = self._response.model_copy(update={"output": [ItemObject.of(item)] if item else []})

    async def _cancel_unfinished(self) -> None:
        if self._lease.is_closed:
            return
        self._answer.cancel()
        self._update(status="cancelled")
        item = self._partial_item()
        with contextlib.suppress(Refused):
            await self._lease.finish(self._response.stored_body, item, is_kept=item is not None)

    def _update(self, **changes: Any) -> None:
        usage = ResponseUsage.of(self.usage)
        self._response = self._response.model_copy(update={**changes, "usage": usage})

    def _partial_item(self) -> Item | None:
        return Item.new("assistant", [self._text], "incomplete", self._item_id) if self._text else None

    def _delta_logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        if self._logprobs is None:
            return []
        return [token_logprob(self._logprobs.template, token).model_dump() for token in tokens]

    def _event(self, type_: str, **fields: Any) -> Event:
        data: dict[str, Any] = {"type": type_, "sequence_number": self._events_sent}
        for name, value in fields.items():
            data[name] = value.model_dump() if isinstance(value, BaseModel) else value
        self._events_sent += 1
        return Event(json.dumps(data), type_)


def _with_logprobs(response: ResponseObject, template: Template, tokens: Sequence[Token]) -> str:
    """The JSON of a response with the log-probabilities of its answer."""
    item = response.output[0]
    logprobs = json_list(token_logprob(template, token).model_dump_json() for token in tokens)
    content = json_list([json_with(item.content[0], logprobs=logprobs)])
    return json_with(response, output=json_list([json_with(item, content=content)]))


async def _truncate_to_fit(served: ServedModel, conversation: Conversation, max_tokens: int | None) -> Conversation:
    """Drop as many of the oldest turns as necessary to leave room for the answer.

    Leading system messages and the last question stay, even if they do not fit.
    """
    if max_tokens is not None:
        max_tokens = min(max_tokens, served.limits.max_tokens)
        max_tokens = max_tokens if max_tokens < served.context else None
    if await _fits(served, conversation, max_tokens):
        return conversation
    messages = conversation.messages
    head = tuple(itertools.takewhile(lambda message: message.role == "system", messages))
    starts = [i for i, message in enumerate(messages) if message.role == "user"]
    if not starts:
        return conversation
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if await _fits(served, Conversation((*head, *messages[starts[middle] :])), max_tokens):
            high = middle
        else:
            low = middle + 1
    return Conversation((*head, *messages[starts[low] :]))


async def _fits(served: ServedModel, conversation: Conversation, max_tokens: int | None) -> bool:
    try:
        check_conversation(served, conversation, param="input")
    except Refused:
        return False
    with translate_errors():
        try:
            prompt = await served.answerer.encode_prompt(arrange_system(served.answerer.template, conversation))
        except TemplateError as error:
            raise Refused(400, error.what, param="input") from error
    try:
        tokens_left(served, len(prompt.ids), max_tokens, param="input")
    except Refused:
        return False
    return True


def build_router(
    models: ServedModels, database: Database, admission: Admission, *, lease_seconds: float = LEASE_SECONDS
) -> APIRouter:
    """`/v1/responses` and `/v1/conversations`, with all routes below them. They act for the caller alone.

    Args:
        lease_seconds: how long a conversation stays locked after a server died while it answered.
    """
    router = APIRouter(prefix="/v1")
    _add_responses(router, models, ResponseStore(database, lease_seconds=lease_seconds), admission)
    conversations.add_routes(router, ConversationStore(database))
    return router


async def _refuse_stream(request: Request) -> None:
    """What is stored is not streamed; other query parameters change nothing."""
    if request.query_params.get("stream", "false").lower() not in ("false", "0"):
        raise Refused(400, "'stream': what is stored is not streamed", param="stream", code="unsupported_parameter")


def _add_responses(router: APIRouter, models: ServedModels, responses: ResponseStore, admission: Admission) -> None:
    @router.post("/responses")
    async def respond(body: ResponsesRequest, sender: Sender, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.get(body.model)
        response = await admission.handle(
            request,
            lambda reserve: start_response(served, responses, sender.owner, body, reserve, client=sender.id),
            stream=bool(body.stream),
            model=served.name,
            choices=choice_count(served, body),
            hold=models.use(served),
        )
        return report(body.notes, sender.introduce(response))

    @router.get("/responses/{response_id}", dependencies=[Depends(_refuse_stream)])
    async def response(response_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(lambda: ResponseObject.from_stored(*responses.get(sender.owner, response_id)))

    @router.delete("/responses/{response_id}")
    async def delete(response_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        await call_store(responses.delete, sender.owner, response_id)
        return json_response(DeletedObject(id=response_id, object="response.deleted"))

    @router.get("/responses/{response_id}/input_items")
    async def inputs(response_id: str, page: Paged, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(lambda: ListObject.of(*responses.list_inputs(sender.owner, response_id, page.page)))
