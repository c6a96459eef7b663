"""The routes of stored conversations and of responses: HTTP ↔ the store and `responding`.

All of them act for the caller alone: what belongs to another key is missing. It does not know where things are stored, or how
an answer comes to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from corral.serving.admission import Door
from corral.serving.conversation_store import Conversations
from corral.serving.http_responses import json_reply
from corral.serving.protocol import Refused
from corral.serving.responses_handler import responding, stored
from corral.serving.responses_protocol import (
    ConversationShown,
    CreateConversation,
    CreateItems,
    DeletedShown,
    ExportShown,
    ItemShown,
    ListShown,
    PageQuery,
    ResponseShown,
    ResponsesRequest,
    UpdateConversation,
)
from corral.serving.served_models import Models


def routes(models: Models, conversations: Conversations, door: Door) -> APIRouter:
    """`/v1/responses` and `/v1/conversations`, with all that is under them."""
    router = APIRouter(prefix="/v1")
    _add_responses(router, models, conversations, door)
    _add_conversations(router, conversations, door)
    _add_items(router, conversations, door)
    return router


async def _plain(request: Request) -> None:
    """A route whose address has no parameters."""
    for name in request.query_params:
        raise Refused(400, f"{name!r} is not a parameter of this route", param=name, code="unknown_parameter")


Paged = Annotated[PageQuery, Query()]


async def _told(call: Callable[[], BaseModel]) -> Response:
    """What a call of the store comes to. It is shaped where it was read, in a thread: items may be long. Raises: Refused."""
    return await stored(lambda: json_reply(call()))


def _add_responses(router: APIRouter, models: Models, conversations: Conversations, door: Door) -> None:
    turns = conversations.turns

    @router.post("/responses", dependencies=[Depends(_plain)])
    async def respond(body: ResponsesRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        served = models.find(body.model)
        return await door.answer(
            request,
            lambda: responding(served, turns, caller.key, body),
            stream=bool(body.stream),
            model=served.name,
        )

    @router.get("/responses/{response_id}", dependencies=[Depends(_plain)])
    async def response(response_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        return await _told(lambda: ResponseShown.of(turns.response(caller.key, response_id)))

    @router.delete("/responses/{response_id}", dependencies=[Depends(_plain)])
    async def delete(response_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        await stored(turns.delete, caller.key, response_id)
        return json_reply(DeletedShown(id=response_id, object="response.deleted"))

    @router.get("/responses/{response_id}/input_items")
    async def inputs(response_id: str, page: Paged, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        return await _told(lambda: ListShown.of_items(*turns.inputs(caller.key, response_id, page.page)))


def _add_conversations(router: APIRouter, conversations: Conversations, door: Door) -> None:
    @router.post("/conversations", dependencies=[Depends(_plain)])
    async def create(body: CreateConversation, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        items = [message.item for message in body.items or ()]
        made = await stored(conversations.create, caller.key, body.metadata or {}, items)
        return json_reply(ConversationShown.of(made))

    @router.get("/conversations")
    async def all_(page: Paged, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        found, has_more = await stored(conversations.all, caller.key, page.page)
        return json_reply(ListShown.of([ConversationShown.of(each) for each in found], has_more=has_more))

    @router.get("/conversations/{conversation_id}", dependencies=[Depends(_plain)])
    async def one(conversation_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        return json_reply(ConversationShown.of(await stored(conversations.get, caller.key, conversation_id)))

    @router.post("/conversations/{conversation_id}", dependencies=[Depends(_plain)])
    async def update(conversation_id: str, body: UpdateConversation, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        changed = await stored(conversations.update, caller.key, conversation_id, body.metadata or {})
        return json_reply(ConversationShown.of(changed))

    @router.delete("/conversations/{conversation_id}", dependencies=[Depends(_plain)])
    async def delete(conversation_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        await stored(conversations.delete, caller.key, conversation_id)
        return json_reply(DeletedShown(id=conversation_id, object="conversation.deleted"))

    @router.get("/conversations/{conversation_id}/export", dependencies=[Depends(_plain)])
    async def export(conversation_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        reply = await _told(lambda: ExportShown.of(*conversations.export(caller.key, conversation_id)))
        reply.headers["content-disposition"] = f'attachment; filename="{conversation_id}.json"'
        return reply


def _add_items(router: APIRouter, conversations: Conversations, door: Door) -> None:
    path = "/conversations/{conversation_id}/items"

    @router.post(path, dependencies=[Depends(_plain)])
    async def add(conversation_id: str, body: CreateItems, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)

        def added() -> ListShown:
            items = [message.item for message in body.items]
            conversations.add(caller.key, conversation_id, items)
            return ListShown.of_items(items)

        return await _told(added)

    @router.get(path)
    async def all_(conversation_id: str, page: Paged, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        return await _told(lambda: ListShown.of_items(*conversations.items(caller.key, conversation_id, page.page)))

    @router.get(path + "/{item_id}", dependencies=[Depends(_plain)])
    async def one(conversation_id: str, item_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        return await _told(lambda: ItemShown.of(conversations.item(caller.key, conversation_id, item_id)))

    @router.delete(path + "/{item_id}", dependencies=[Depends(_plain)])
    async def delete(conversation_id: str, item_id: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        caller = await door.caller(request)
        changed = await stored(conversations.delete_item, caller.key, conversation_id, item_id)
        return json_reply(ConversationShown.of(changed))
