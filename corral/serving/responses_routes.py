"""The routes of responses and stored conversations. They act for the caller alone: another key's data is not found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from corral.serving.admission import Admission
from corral.serving.conversation_store import ConversationStore
from corral.serving.models import ServedModels
from corral.serving.protocol import Refused
from corral.serving.responses_handler import call_store, start_response
from corral.serving.responses_protocol import (
    ConversationObject,
    CreateConversation,
    CreateItems,
    DeletedObject,
    ExportObject,
    ItemObject,
    ListObject,
    PageQuery,
    ResponseObject,
    ResponsesRequest,
    UpdateConversation,
)
from corral.serving.streams import json_response


def build_router(models: ServedModels, conversations: ConversationStore, admission: Admission) -> APIRouter:
    """`/v1/responses` and `/v1/conversations`, with all routes below them."""
    router = APIRouter(prefix="/v1")
    _add_responses(router, models, conversations, admission)
    _add_conversations(router, conversations)
    _add_items(router, conversations)
    return router


async def _owner(request: Request) -> str:
    """The id of the caller's key."""
    return request.state.caller.key_id


async def _refuse_query(request: Request) -> None:
    """Refuse any query parameter."""
    for name in request.query_params:
        raise Refused(400, f"{name!r} is not a parameter of this route", param=name, code="unknown_parameter")


Owner = Annotated[str, Depends(_owner)]
Paged = Annotated[PageQuery, Query()]
NO_QUERY = [Depends(_refuse_query)]


async def _read_store(call: Callable[[], BaseModel]) -> Response:
    """Respond with the result of a call of the store, which may be long so it is serialised there. Raises: Refused."""
    return await call_store(lambda: json_response(call()))


def _add_responses(
    router: APIRouter, models: ServedModels, conversations: ConversationStore, admission: Admission
) -> None:
    responses = conversations.responses

    @router.post("/responses", dependencies=NO_QUERY)
    async def respond(body: ResponsesRequest, owner: Owner, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.get(body.model)
        return await admission.handle(
            request,
            lambda: start_response(served, responses, owner, body),
            stream=bool(body.stream),
            model=served.name,
        )

    @router.get("/responses/{response_id}", dependencies=NO_QUERY)
    async def response(response_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _read_store(lambda: ResponseObject.from_stored(responses.get(owner, response_id)))

    @router.delete("/responses/{response_id}", dependencies=NO_QUERY)
    async def delete(response_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        await call_store(responses.delete, owner, response_id)
        return json_response(DeletedObject(id=response_id, object="response.deleted"))

    @router.get("/responses/{response_id}/input_items")
    async def inputs(response_id: str, page: Paged, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _read_store(lambda: ListObject.from_items(*responses.list_inputs(owner, response_id, page.page)))


def _add_conversations(router: APIRouter, conversations: ConversationStore) -> None:
    @router.post("/conversations", dependencies=NO_QUERY)
    async def create(body: CreateConversation, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        items = [message.item for message in body.items or ()]
        created = await call_store(conversations.create, owner, body.metadata or {}, items)
        return json_response(ConversationObject.from_stored(created))

    @router.get("/conversations")
    async def all_(page: Paged, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored, has_more = await call_store(conversations.list_page, owner, page.page)
        objects = [ConversationObject.from_stored(each) for each in stored]
        return json_response(ListObject.from_objects(objects, has_more=has_more))

    @router.get("/conversations/{conversation_id}", dependencies=NO_QUERY)
    async def one(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.get, owner, conversation_id)
        return json_response(ConversationObject.from_stored(stored))

    @router.post("/conversations/{conversation_id}", dependencies=NO_QUERY)
    async def update(conversation_id: str, body: UpdateConversation, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        updated = await call_store(conversations.update, owner, conversation_id, body.metadata or {})
        return json_response(ConversationObject.from_stored(updated))

    @router.delete("/conversations/{conversation_id}", dependencies=NO_QUERY)
    async def delete(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        await call_store(conversations.delete, owner, conversation_id)
        return json_response(DeletedObject(id=conversation_id, object="conversation.deleted"))

    @router.get("/conversations/{conversation_id}/export", dependencies=NO_QUERY)
    async def export(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        exported = await _read_store(lambda: ExportObject.from_stored(*conversations.export(owner, conversation_id)))
        exported.headers["content-disposition"] = f'attachment; filename="{conversation_id}.json"'
        return exported


def _add_items(router: APIRouter, conversations: ConversationStore) -> None:
    path = "/conversations/{conversation_id}/items"

    @router.post(path, dependencies=NO_QUERY)
    async def add(conversation_id: str, body: CreateItems, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        def add_items() -> ListObject:
            items = [message.item for message in body.items]
            conversations.add_items(owner, conversation_id, items)
            return ListObject.from_items(items)

        return await _read_store(add_items)

    @router.get(path)
    async def all_(conversation_id: str, page: Paged, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _read_store(
            lambda: ListObject.from_items(*conversations.list_items(owner, conversation_id, page.page))
        )

    @router.get(path + "/{item_id}", dependencies=NO_QUERY)
    async def one(conversation_id: str, item_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _read_store(lambda: ItemObject.from_item(conversations.get_item(owner, conversation_id, item_id)))

    @router.delete(path + "/{item_id}", dependencies=NO_QUERY)
    async def delete(conversation_id: str, item_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.delete_item, owner, conversation_id, item_id)
        return json_response(ConversationObject.from_stored(stored))
