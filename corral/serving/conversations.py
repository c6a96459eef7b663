"""The routes of stored conversations and their items. They act for the sender alone: another one's are not found.

With keys, the sender is the owner of a key. Without, the id of a conversation or response is 128 random bits: who has it may
read, continue, change and delete what it names. Only the list of conversations tells ids, so a list shows a client what it
began. A client's first request is answered with a token: browsers keep it as a cookie, which scripts cannot read and other
sites cannot send; programs may send it back in the header `x-corral-client`. A program that does not is a new client each
time, and works with ids. What is stored is also counted by client (`corral.serving.store.make_room`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from corral.serving.conversation_store import ConversationStore
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
from corral.serving.store import Item, StoredConversation
from corral.serving.streams import json_response

CLIENT_HEADER = "x-corral-client"
_COOKIE = "corral_client"
_COOKIE_SECONDS = 400 * 86400  # as long as browsers keep any cookie
_TOKEN = re.compile(r"[0-9a-f]{32}")
_EXPORTS = 8  # conversations that are exported at once; a slow client holds a page of one
_EXPORTS_OF_CLIENT = 2


def add_routes(router: APIRouter, conversations: ConversationStore) -> None:
    """Add `/conversations` with all routes below it."""
    _add_conversations(router, conversations)
    _add_items(router, conversations)


class Client(NamedTuple):
    """A browser or program that sends a request."""

    owner: str
    """The id of its key, to which all belongs that is stored; empty without keys."""
    id: str
    """A hash of its token; empty with a key."""
    new_token: str | None
    """The token, if it had none."""
    path: str
    """The path below which a browser sends the token."""

    @classmethod
    async def of(cls, request: Request) -> Client:
        """The client that sent a request, by its key, header or cookie, in this order."""
        path = f"{request.scope.get('root_path', '')}/v1"
        if owner := request.state.caller.key_id:
            return cls(owner, "", None, path)
        token = request.headers.get(CLIENT_HEADER) or request.cookies.get(_COOKIE) or ""
        new = None if _TOKEN.fullmatch(token) else secrets.token_hex(16)
        return cls("", hashlib.sha256((new or token).encode()).hexdigest()[:32], new, path)

    def introduce(self, response: Response) -> Response:
        """Give a new client its token. Returns: the response."""
        if self.new_token is not None:
            response.headers[CLIENT_HEADER] = self.new_token
            response.set_cookie(
                _COOKIE, self.new_token, max_age=_COOKIE_SECONDS, path=self.path, httponly=True, samesite="lax"
            )
        return response


Sender = Annotated[Client, Depends(Client.of)]
Paged = Annotated[PageQuery, Query()]


def _conversation(stored: StoredConversation) -> Response:
    return json_response(ConversationObject.of(stored))


async def read_store(call: Callable[[], BaseModel]) -> Response:
    """Respond with the result of a call of the store, which may be long so it is serialised there. Raises: Refused."""
    return await call_store(lambda: json_response(call()))


def _add_conversations(router: APIRouter, conversations: ConversationStore) -> None:
    @router.post("/conversations")
    async def create(body: CreateConversation, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        items = [message.item for message in body.items or ()]
        created = await call_store(conversations.create, sender.owner, body.metadata or {}, items, sender.id)
        return report(body.notes, sender.introduce(_conversation(created)))

    @router.get("/conversations")
    async def all_(page: Paged, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        listed = await read_store(lambda: ListObject.of(*conversations.list_page(sender.owner, page.page, sender.id)))
        return sender.introduce(listed)

    @router.get("/conversations/{conversation_id}")
    async def one(conversation_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _conversation(await call_store(conversations.get, sender.owner, conversation_id))

    @router.post("/conversations/{conversation_id}")
    async def update(conversation_id: str, body: UpdateConversation, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        updated = await call_store(conversations.update, sender.owner, conversation_id, body.metadata or {})
        return report(body.notes, _conversation(updated))

    @router.delete("/conversations/{conversation_id}")
    async def delete(conversation_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        await call_store(conversations.delete, sender.owner, conversation_id)
        return json_response(DeletedObject(id=conversation_id, object="conversation.deleted"))

    exporting: Counter[tuple[str, str]] = Counter()

    async def count_export(sender: Sender) -> AsyncGenerator[None]:
        who = sender.owner, sender.id
        if exporting[who] >= _EXPORTS_OF_CLIENT or exporting.total() >= _EXPORTS:
            raise server_full(f"{exporting.total()} conversations are being exported", retry_seconds=1)
        exporting[who] += 1
        try:
            yield
        finally:  # after the response was sent
            exporting[who] -= 1
            if not exporting[who]:
                del exporting[who]

    @router.get("/conversations/{conversation_id}/export", dependencies=[Depends(count_export)])
    async def export(conversation_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        stored = await call_store(conversations.get, sender.owner, conversation_id)
        headers = {"content-disposition": f'attachment; filename="{stored.id}.json"'}
        return StreamingResponse(
            _export(conversations, sender.owner, stored), headers=headers, media_type="application/json"
        )


def _add_items(router: APIRouter, conversations: ConversationStore) -> None:
    path = "/conversations/{conversation_id}/items"

    @router.post(path)
    async def add(conversation_id: str, body: CreateItems, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        def add_items() -> ListObject:
            items = [message.item for message in body.items]
            conversations.add_items(sender.owner, conversation_id, items)
            return ListObject.of(items)

        return report(body.notes, await read_store(add_items))

    @router.get(path)
    async def all_(conversation_id: str, page: Paged, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(
            lambda: ListObject.of(*conversations.list_items(sender.owner, conversation_id, page.page))
        )

    @router.get(path + "/{item_id}")
    async def one(conversation_id: str, item_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await read_store(lambda: ItemObject.of(conversations.get_item(sender.owner, conversation_id, item_id)))

    @router.delete(path + "/{item_id}")
    async def delete(conversation_id: str, item_id: str, sender: Sender) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _conversation(await call_store(conversations.delete_item, sender.owner, conversation_id, item_id))


async def _export(conversations: ConversationStore, owner: str, stored: StoredConversation) -> AsyncGenerator[str]:
    """A complete conversation as JSON, of which one page at a time is in memory; an extension.

    `items` is as in lists, and `messages` has the form of training data.
    """
    head = ConversationObject.of(stored).model_dump() | {"object": "conversation.export"}
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
    return ItemObject.of(item).model_dump()
