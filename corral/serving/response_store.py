"""Stores responses: from pending, with a lease on their conversation, to finished, discarded or lost.

A response is begun and finished, each in one transaction. In between it locks its conversation, and a second response for that
conversation is refused. Its server renews its leases every few seconds. If the server is killed, the lease ends, the
conversation is unlocked, and the response counts as lost.

Calls block. If several machines share a database, their clocks must agree within a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, delete, func, literal, select, update
from sqlalchemy.orm import Session, aliased

from corral.errors import DatabaseError
from corral.serving.database import Database, run_in_thread
from corral.serving.errors import Refused, database_unavailable
from corral.serving.store import (
    HOUR,
    ROW_BYTES,
    Item,
    Page,
    StorageLimits,
    StoredConversation,
    StoredResponse,
    add_items,
    delete_responses,
    get_conversation,
    get_row,
    make_room,
    make_room_in,
    not_found,
    read_page,
    read_rows,
    storage_bytes,
)

T = TypeVar("T")

LEASE_SECONDS = 10
"""How long a pending response counts as alive without a heartbeat, which may wait five seconds for a locked database."""
_HEARTBEATS_PER_LEASE = 5
_STORE_SECONDS = 30  # timeout of a call of the store; the database's own timeouts are shorter
_SWEEP_SECONDS = 600
_SWEEP_ROWS = 1000  # at most, so that no request waits long for the deletion of old responses
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PendingResponse:
    """A response that is being generated. At most one of `conversation` and `previous` is given."""

    id: str
    owner: str
    inputs: tuple[Item, ...]
    stored: bool
    """Whether the response can be retrieved later. Items of a conversation are stored in any case."""
    conversation: str | None = None
    previous: str | None = None
    """The id of the response that this one continues."""
    client: str = ""
    """Which of the owner's clients sends it; a conversation's belong to the client that began that."""

    @property
    def is_written(self) -> bool:
        """Whether anything is written to the database."""
        return self.stored or self.conversation is not None


class ResponseStore:
    """All responses of a database.

    Args:
        lease_seconds: time after which a pending response without a heartbeat counts as lost.
    """

    def __init__(
        self, database: Database, limits: StorageLimits | None = None, *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.lease_seconds = lease_seconds
        self._database = database
        # Heartbeats must not wait for connections that other calls hold.
        self._heartbeat_database = database.with_own_connections()
        self._limits = limits or StorageLimits()
        self._held: set[str] = set()
        self._heartbeats: asyncio.Task[None] | None = None
        self._last_sweep = 0.0

    def begin(self, pending: PendingResponse, body: dict[str, Any]) -> list[Item]:
        """Lock the conversation and store the pending response.

        Args:
            body: the response's JSON so far.

        Returns: the items before this response, in order.

        Raises:
            Refused: 404: no such conversation or previous response; 409: another response is pending there; 400: a storage
                limit.
        """
        if not pending.is_written:
            with self._database.read_session() as session:
                return self._history(session, pending)
        with self._database.write_session() as session:
            self._delete_expired(session)
            conversation = _lock_conversation(session, pending)
            if conversation is not None:
                conversation.check_unlocked()
                make_room_in(session, conversation, pending.inputs, self._limits)
                conversation.lease_owner, conversation.lease_until = pending.id, self._lease_end
            history = self._history(session, pending, conversation)
            if pending.stored:
                size = _response_bytes(body, () if conversation else pending.inputs)
                self._make_room(session, pending.owner, size)
                row = StoredResponse(
                    id=pending.id,
                    owner=pending.owner,
                    client=conversation.client if conversation else pending.client,
                    conversation=conversation.number if conversation else None,
                    previous=pending.previous,
                    created_at=int(time.time()),
                    lease_until=self._lease_end,
                    body=body,
                    bytes=size,
                )
                session.add(row)
            return history

    def renew_leases(self, responses: Collection[str]) -> None:
        """Extend the leases of pending responses, by their ids."""
        conversations = update(StoredConversation).where(StoredConversation.lease_owner.in_(responses))
        pending = update(StoredResponse).where(
            StoredResponse.id.in_(responses), StoredResponse.lease_until.is_not(None)
        )
        with self._heartbeat_database.write_session() as session:
            session.execute(conversations.values(lease_until=self._lease_end))
            session.execute(pending.values(lease_until=self._lease_end))

    def keep_lease(self, response: str) -> None:
        """Renew the lease of a response until `drop_lease`. Called in the event loop, which renews all leases at once."""
        self._held.add(response)
        if self._heartbeats is None:
            self._heartbeats = asyncio.create_task(self._send_heartbeats())

    def drop_lease(self, response: str) -> None:
        """Renew it no longer."""
        self._held.discard(response)
        if not self._held and self._heartbeats is not None:
            self._heartbeats.cancel()
            self._heartbeats = None

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self.lease_seconds / _HEARTBEATS_PER_LEASE)
            with contextlib.suppress(Refused):
                await call_store(self.renew_leases, [*self._held])

    def discard(self, pending: PendingResponse) -> None:
        """Delete a pending response and unlock its conversation."""
        with self._database.write_session() as session:
            session.execute(delete(StoredResponse).where(StoredResponse.id == pending.id))
            session.execute(
                update(StoredConversation)
                .where(StoredConversation.lease_owner == pending.id)
                .values(lease_owner=None, lease_until=None)
            )

    def finish(self, pending: PendingResponse, body: dict[str, Any], output: Item | None, *, is_kept: bool) -> None:
        """Store a finished response and unlock its conversation.

        Args:
            body: the response's JSON.
            output: the answer, if there is any.
            is_kept: whether inputs and answer become part of the conversation.

        Raises:
            Refused: 404: the conversation was deleted; 409: the lease had ended, and another response holds the conversation.
                Nothing is stored then.
        """
        with self._database.write_session() as session:
            conversation = _lock_conversation(session, pending)
            if conversation is not None:
                if conversation.lease_owner != pending.id:
                    raise conversation.locked()
                conversation.lease_owner = conversation.lease_until = None
            # Locked, as another transaction may delete it to make room.
            row = session.scalar(select(StoredResponse).where(StoredResponse.id == pending.id).with_for_update())
            holder = conversation if is_kept else None
            items = [*pending.inputs]
            if output is not None:
                output.is_output = True
                items.append(output)
            if row is not None:
                row.body, row.lease_until = body, None
                row.bytes = _response_bytes(body, () if holder else items)
            elif holder is None:
                return
            add_items(session, items, holder, row.number if row else None)

    def get(self, owner: str, id_: str) -> tuple[StoredResponse, list[Item]]:
        """One response, with its output. Raises: Refused (404)."""
        with self._database.read_session() as session:
            row = _get_response(session, owner, id_)
            outputs = select(Item).where(Item.response == row.number, Item.is_output).order_by(Item.number)
            return row, list(session.scalars(outputs))

    def list_inputs(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """Return (the response's inputs, whether there are more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.read_session() as session:
            number = _get_response(session, owner, id_).number
            return read_page(session, Item, (Item.response == number) & ~Item.is_output, page)

    def delete(self, owner: str, id_: str) -> None:
        """Delete a response; its items stay in its conversation, if it has one. Raises: Refused (404)."""
        with self._database.write_session() as session:
            delete_responses(session, [_get_response(session, owner, id_).number])

    @property
    def _lease_end(self) -> float:
        return time.time() + self.lease_seconds

    def _history(
        self, session: Session, pending: PendingResponse, conversation: StoredConversation | None = None
    ) -> list[Item]:
        if conversation is not None:
            is_before = Item.conversation == conversation.number
        elif pending.previous is not None:
            is_before = self._chain(session, pending.owner, pending.previous)
        else:
            if pending.is_written:
                self._limits.check_conversation(0, 0, pending.inputs)
            return []
        # A read counts each row as well as its text, so that this bound leaves out none of a conversation within the limits.
        most_rows = self._limits.max_items + 1
        most_bytes = self._limits.max_bytes + ROW_BYTES * most_rows
        query = select(Item).where(is_before).order_by(Item.number).limit(most_rows)
        items, _ = read_rows(session, query, most_bytes)
        self._limits.check_conversation(len(items), sum(item.bytes for item in items), pending.inputs)
        return items

    def _chain(self, session: Session, owner: str, previous: str) -> ColumnElement[bool]:
        """The items up to a response: its own, those of the chain before it, and those of a conversation where that begins."""
        row = _get_response(session, owner, previous, param="previous_response_id")
        has_answer = select(Item.number).where(Item.response == row.number, Item.is_output).limit(1)
        if session.scalar(has_answer) is None:
            seconds = (row.lease_until or 0) - time.time()
            if seconds > 0:
                what = f"the response {previous!r} is still being generated: wait for it, or cancel it"
                raise Refused(409, what, param="previous_response_id", code="response_pending", retry_seconds=seconds)
            what = f"the response {previous!r} has no answer to continue"
            raise Refused(400, what, param="previous_response_id")
        columns = (StoredResponse.number, StoredResponse.previous, StoredResponse.conversation)
        chain = (
            select(*columns, literal(0).label("depth")).where(StoredResponse.number == row.number).cte(recursive=True)
        )
        older = aliased(StoredResponse)
        chain = chain.union_all(
            select(older.number, older.previous, older.conversation, chain.c.depth + 1)
            .join(chain, older.id == chain.c.previous)
            .where(older.owner == owner, chain.c.conversation.is_(None), chain.c.depth < self._limits.max_items)
        )
        links = session.execute(select(chain.c.number, chain.c.previous, chain.c.conversation, chain.c.depth)).all()
        first = max(links, key=lambda link: link.depth)
        if first.conversation is None:
            if first.previous is not None:
                raise not_found("response", first.previous, "previous_response_id")
            return Item.response.in_([link.number for link in links])
        last = select(func.max(Item.number)).where(Item.response == first.number).scalar_subquery()
        in_conversation = (Item.conversation == first.conversation) & (Item.number <= last)
        return Item.response.in_([link.number for link in links]) | in_conversation

    def _delete_expired(self, session: Session) -> None:
        if time.monotonic() - self._last_sweep < _SWEEP_SECONDS and self._last_sweep:
            return
        self._last_sweep = time.monotonic()
        is_old = StoredResponse.created_at < time.time() - self._limits.response_days * 24 * HOUR
        expired = select(StoredResponse.number).where(StoredResponse.conversation.is_(None), is_old)
        delete_responses(session, expired.order_by(StoredResponse.number).limit(_SWEEP_ROWS))

    def _make_room(self, session: Session, owner: str, size: int) -> None:
        """Delete older responses of an owner until a new one fits. Raises: Refused (it alone is too large)."""
        limits = self._limits
        if size > limits.max_responses_bytes:
            what = f"a response takes at most {limits.max_responses_bytes} bytes"
            raise Refused(400, what, code="response_too_large")
        rows, bytes_ = (1, limits.max_responses), (size, limits.max_responses_bytes)
        make_room(session, StoredResponse, owner, rows=rows, size=bytes_)


def _response_bytes(body: dict[str, Any], items: Sequence[Item]) -> int:
    """Bytes that a response takes of its owner's room."""
    return len(json.dumps(body)) + ROW_BYTES + storage_bytes(items)


def _lock_conversation(session: Session, pending: PendingResponse) -> StoredConversation | None:
    if pending.conversation is None:
        return None
    return get_conversation(session, pending.owner, pending.conversation, to_write=True, param="conversation")


def _get_response(session: Session, owner: str, id_: str, param: str | None = None) -> StoredResponse:
    return get_row(session, StoredResponse, id_, StoredResponse.owner == owner, param=param)


class Lease:
    """Holds a pending response and its conversation while it is answered, by coroutines that may be cancelled anywhere."""

    def __init__(self, store: ResponseStore, pending: PendingResponse) -> None:
        self.is_closed = False
        self._store = store
        self._pending = pending

    async def acquire(self, body: dict[str, Any]) -> list[Item]:
        """Begin the pending response. Returns: the items before it. Raises: Refused."""
        begin_task = asyncio.create_task(call_store(self._store.begin, self._pending, body))
        try:
            history = await asyncio.shield(begin_task)
        except asyncio.CancelledError:
            with contextlib.suppress(Refused):
                await begin_task
                await self.discard()
            raise
        if self._pending.is_written:
            self._store.keep_lease(self._pending.id)
        return history

    async def discard(self) -> None:
        """Delete the pending response, unless the lease is closed."""
        if self._close():
            with contextlib.suppress(Refused):  # then the lease expires
                await call_store(self._store.discard, self._pending)

    async def finish(self, body: dict[str, Any], output: Item | None, *, is_kept: bool) -> None:
        """Store the finished response, unless the lease is closed. Raises: Refused."""
        if self._close():
            await call_store(partial(self._store.finish, self._pending, body, output, is_kept=is_kept))

    def _close(self) -> bool:
        """Returns: whether there is something to write: the lease was open, and the response is stored."""
        was_closed, self.is_closed = self.is_closed, True
        self._store.drop_lease(self._pending.id)
        return not was_closed and self._pending.is_written


async def call_store(call: Callable[..., T], *arguments: Any) -> T:
    """Run a call of the store in a thread and return its result; the call is completed even if this is cancelled.

    Raises:
        Refused: from the call; or 503: the database cannot be used, or does not answer.
    """
    try:
        async with asyncio.timeout(_STORE_SECONDS):
            return await asyncio.shield(asyncio.create_task(run_in_thread(call, *arguments)))
    except (DatabaseError, TimeoutError) as error:
        _log.error("%s", error.what if isinstance(error, DatabaseError) else "the database does not answer")
        raise database_unavailable() from None
