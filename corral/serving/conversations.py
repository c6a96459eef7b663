"""The routes of stored conversations and their items. They act for the caller alone: another one's are not found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from corral.serving.clients import Client
from corral.serving.errors import server_full
from corral.serving.request_fields import report
from corral.serving.response_store import call_store
from corral.serving.responses_protocol import (
    ConversationObject,
    CreateConversation,
    CreateItems,
    DeletedObject,
    ItemObject,
    ListObject,
    PageQuery,
    UpdateConversation,
    plain_message,
)
from corral.serving.store import ConversationStore, Item, StoredConversation
from corral.serving.streams import json_response

_EXPORTS = 8  # conversations that are exported at once; a slow client holds a page of one
_EXPORTS_OF_OWNER = 2


def add_routes(router: APIRouter, conversations: ConversationStore) -> None:
    """Add `/conversations` with all routes below it."""
    _add_conversations(router, conversations)
    _add_items(router, conversations)


async def _owner(request: Request) -> str:
    """The id of the caller's key."""
    return request.state.caller.key_id


async def _client(request: Request) -> Client:
    return Client.of(request)


Owner = Annotated[str, Depends(_owner)]
Sender = Annotated[Client, Depends(_client)]
Paged = Annotated[PageQuery, Query()]


async def read_store(call: Callable[[], BaseModel]) -> Response:
    """Respond with the result of a call of the store, which may be long so it is serialised there. Raises: Refused."""
    return await call_store(lambda: json_response(call()))


def _add_conversations(router: APIRouter, conversations: ConversationStore) -> None:
    @router.post("/conversations")
    async def create(body: CreateConversation, owner: Owner, client: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        items = [message.item for message in body.items or ()]
        created = await call_store(conversations.create, owner, body.metadata or {}, items, client.id)
        response = client.introduce(json_response(ConversationObject.from_stored(created)))
        return report(body.notes, response)

    @router.get("/conversations")
    async def all_(page: Paged, owner: Owner, client: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return client.introduce(
            await read_store(
                lambda: ListObject.from_conversations(*conversations.list_page(owner, page.page, client.id))
            )
        )

    @router.get("/conversations/{conversation_id}")
    async def one(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.get, owner, conversation_id)
        return json_response(ConversationObject.from_stored(stored))

    @router.post("/conversations/{conversation_id}")
    async def update(conversation_id: str, body: UpdateConversation, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        updated = await call_store(conversations.update, owner, conversation_id, body.metadata or {})
        return report(body.notes, json_response(ConversationObject.from_stored(updated)))

    @router.delete("/conversations/{conversation_id}")
    async def delete(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        await call_store(conversations.delete, owner, conversation_id)
        return json_response(DeletedObject(id=conversation_id, object="conversation.deleted"))

    exporting: Counter[str] = Counter()

    async def count_export(owner: Owner) -> AsyncGenerator[None]:
        if (owner and exporting[owner] >= _EXPORTS_OF_OWNER) or exporting.total() >= _EXPORTS:
            raise server_full(f"{exporting.total()} conversations are being exported", retry_seconds=1)
        exporting[owner] += 1
        try:
            yield
        finally:  # after the response was sent
            exporting[owner] -= 1
            if not exporting[owner]:
                del exporting[owner]

    @router.get("/conversations/{conversation_id}/export", dependencies=[Depends(count_export)])
    async def export(conversation_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.get, owner, conversation_id)
        headers = {"content-disposition": f'attachment; filename="{stored.id}.json"'}
        return StreamingResponse(_export(conversations, owner, stored), headers=headers, media_type="application/json")


def _add_items(router: APIRouter, conversations: ConversationStore) -> None:
    path = "/conversations/{conversation_id}/items"

    @router.post(path)
    async def add(conversation_id: str, body: CreateItems, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        def add_items() -> ListObject:
            items = [message.item for message in body.items]
            conversations.add_items(owner, conversation_id, items)
            return ListObject.from_items(items)

        return report(body.notes, await read_store(add_items))

    @router.get(path)
    async def all_(conversation_id: str, page: Paged, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(
            lambda: ListObject.from_items(*conversations.list_items(owner, conversation_id, page.page))
        )

    @router.get(path + "/{item_id}")
    async def one(conversation_id: str, item_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(lambda: ItemObject.from_item(conversations.get_item(owner, conversation_id, item_id)))

    @router.delete(path + "/{item_id}")
    async def delete(conversation_id: str, item_id: str, owner: Owner) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.delete_item, owner, conversation_id, item_id)
        return json_response(ConversationObject.from_stored(stored))


async def _export(conversations: ConversationStore, owner: str, stored: StoredConversation) -> AsyncGenerator[str]:
    """A complete conversation as JSON, of which one page at a time is in memory; an extension.

    `items` is as in lists, and `messages` has the form of training data.
    """
    head = ConversationObject.from_stored(stored).model_dump() | {"object": "conversation.export"}
    yield json.dumps(head)[:-1]
    for name, form in (("items", _item_json), ("messages", plain_message)):
        pages = conversations.iterate_items(owner, stored.id)
        yield f', "{name}": ['
        separator = ""
        while (chunk := await call_store(_encode_page, pages, form)) is not None:
            if chunk:
                yield separator + chunk
                separator = ", "
        yield "]"
    yield "}"


def _encode_page(pages: Iterator[list[Item]], form: Callable[[Item], dict[str, Any]]) -> str | None:
    """The JSON of the next page, without brackets; None at the end."""
    page = next(pages, None)
    return None if page is None else ", ".join(json.dumps(form(item)) for item in page)


def _item_json(item: Item) -> dict[str, Any]:
    return ItemObject.from_item(item).model_dump()
