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

from sqlalchemy import ColumnElement, and_, delete, func, literal, or_, select, update
from sqlalchemy.orm import Session, aliased

from corral.errors import DatabaseError
from corral.serving.database import Database, run_in_thread
from corral.serving.errors import Refused, database_unavailable
from corral.serving.store import (
    ROW_BYTES,
    ConversationRow,
    Item,
    ItemRow,
    Page,
    ResponseRow,
    StorageLimits,
    add_item,
    check_conversation_size,
    check_total_size,
    check_unlocked,
    delete_responses,
    get_conversation_row,
    is_valid_id,
    locked,
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
_DAY = 86400
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

    @property
    def is_written(self) -> bool:
        """Whether anything is written to the database."""
        return self.stored or self.conversation is not None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response from the database."""

    body: dict[str, Any]
    outputs: list[Item]
    is_lost: bool
    """Its lease ended before it was finished: its server died."""


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
            conversation = None
            if pending.conversation is not None:
                conversation = get_conversation_row(
                    session, pending.owner, pending.conversation, to_write=True, param="conversation"
                )
                check_unlocked(conversation)
                check_conversation_size(conversation.items, conversation.bytes, pending.inputs, self._limits)
                check_total_size(session, pending.owner, pending.inputs, self._limits)
                conversation.lease_owner, conversation.lease_until = pending.id, self._lease_end
            history = self._history(session, pending)
            if pending.stored:
                size = _response_bytes(body, () if conversation else pending.inputs)
                self._evict_oldest(session, pending.owner, size)
                row = ResponseRow(
                    id=pending.id,
                    owner=pending.owner,
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
        conversations = update(ConversationRow).where(ConversationRow.lease_owner.in_(responses))
        pending = update(ResponseRow).where(ResponseRow.id.in_(responses), ResponseRow.lease_until.is_not(None))
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
            session.execute(delete(ResponseRow).where(ResponseRow.id == pending.id))
            session.execute(
                update(ConversationRow)
                .where(ConversationRow.lease_owner == pending.id)
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
            conversation = None
            if pending.conversation is not None:
                conversation = get_conversation_row(
                    session, pending.owner, pending.conversation, to_write=True, param="conversation"
                )
                if conversation.lease_owner != pending.id:
                    raise locked(conversation)
                conversation.lease_owner = conversation.lease_until = None
            row = session.scalar(select(ResponseRow).where(ResponseRow.id == pending.id))
            holder = conversation if is_kept else None
            items = [(item, False) for item in pending.inputs]
            if output is not None:
                items.append((output, True))
            if row is not None:
                row.body, row.lease_until = body, None
                row.bytes = _response_bytes(body, () if holder else [item for item, _ in items])
            elif holder is None:
                return
            for item, is_output in items:
                add_item(session, item, holder, response=row.number if row else None, is_output=is_output)

    def get(self, owner: str, id_: str) -> StoredResponse:
        """One response. Raises: Refused (404)."""
        with self._database.read_session() as session:
            row = _get_response_row(session, owner, id_)
            outputs = select(ItemRow).where(ItemRow.response == row.number, ItemRow.is_output)
            items = [Item.from_row(item) for item in session.scalars(outputs.order_by(ItemRow.number))]
            return StoredResponse(
                row.body, items, is_lost=row.lease_until is not None and row.lease_until < time.time()
            )

    def list_inputs(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """Return (the response's inputs, whether there are more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.read_session() as session:
            number = _get_response_row(session, owner, id_).number
            query = select(ItemRow).where(ItemRow.response == number, ~ItemRow.is_output)
            rows, has_more = read_page(session, query, ItemRow, page)
            return [Item.from_row(row) for row in rows], has_more

    def delete(self, owner: str, id_: str) -> None:
        """Delete a response; its items stay in its conversation, if it has one. Raises: Refused (404)."""
        with self._database.write_session() as session:
            row = _get_response_row(session, owner, id_)
            delete_responses(session, select(ResponseRow.number).where(ResponseRow.number == row.number))

    @property
    def _lease_end(self) -> float:
        return time.time() + self.lease_seconds

    def _history(self, session: Session, pending: PendingResponse) -> list[Item]:
        if pending.conversation is not None:
            number = get_conversation_row(session, pending.owner, pending.conversation, param="conversation").number
            query = select(ItemRow).where(ItemRow.conversation == number)
        elif pending.previous is not None:
            query = select(ItemRow).where(self._chain(session, pending.owner, pending.previous))
        else:
            if pending.is_written:
                check_conversation_size(0, 0, pending.inputs, self._limits)
            return []
        # A read counts each row as well as its text, so that this bound leaves out none of a conversation within the limits.
        most_rows = self._limits.max_items + 1
        most_bytes = self._limits.max_bytes + ROW_BYTES * most_rows
        rows, _ = read_rows(session, query.order_by(ItemRow.number).limit(most_rows), most_bytes)
        items = [Item.from_row(row) for row in rows]
        check_conversation_size(len(items), sum(item.bytes for item in items), pending.inputs, self._limits)
        return items

    def _chain(self, session: Session, owner: str, previous: str) -> ColumnElement[bool]:
        """The items up to a response: its own, those of the chain before it, and those of a conversation where that begins."""
        row = _get_response_row(session, owner, previous, param="previous_response_id")
        has_answer = select(ItemRow.number).where(ItemRow.response == row.number, ItemRow.is_output).limit(1)
        if session.scalar(has_answer) is None:
            seconds = (row.lease_until or 0) - time.time()
            if seconds > 0:
                what = f"the response {previous!r} is still being generated: wait for it, or cancel it"
                raise Refused(409, what, param="previous_response_id", code="response_pending", retry_seconds=seconds)
            what = f"the response {previous!r} has no answer to continue"
            raise Refused(400, what, param="previous_response_id")
        columns = (ResponseRow.number, ResponseRow.previous, ResponseRow.conversation)
        chain = select(*columns, literal(0).label("depth")).where(ResponseRow.number == row.number).cte(recursive=True)
        older = aliased(ResponseRow)
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
            return ItemRow.response.in_([link.number for link in links])
        last = select(func.max(ItemRow.number)).where(ItemRow.response == first.number).scalar_subquery()
        in_conversation = and_(ItemRow.conversation == first.conversation, ItemRow.number <= last)
        return or_(ItemRow.response.in_([link.number for link in links]), in_conversation)

    def _delete_expired(self, session: Session) -> None:
        if time.monotonic() - self._last_sweep < _SWEEP_SECONDS and self._last_sweep:
            return
        self._last_sweep = time.monotonic()
        is_old = ResponseRow.created_at < time.time() - self._limits.response_days * _DAY
        expired = select(ResponseRow.number).where(ResponseRow.conversation.is_(None), is_old)
        delete_responses(session, expired.order_by(ResponseRow.number).limit(_SWEEP_ROWS))

    def _evict_oldest(self, session: Session, owner: str, size: int) -> None:
        """Delete the oldest responses of an owner until a new one fits. Raises: Refused (it alone is too large)."""
        if size > self._limits.max_responses_bytes:
            raise Refused(
                400, f"a response takes at most {self._limits.max_responses_bytes} bytes", code="response_too_large"
            )
        mine = ResponseRow.owner == owner
        while True:
            count, held = session.execute(select(func.count(), func.sum(ResponseRow.bytes)).where(mine)).one()
            if count < self._limits.max_responses and (held or 0) + size <= self._limits.max_responses_bytes:
                return
            # More than necessary, so that not every request has to delete some.
            oldest = select(ResponseRow.number).where(mine).order_by(ResponseRow.number).limit(1 + count // 10)
            delete_responses(session, oldest)


def _response_bytes(body: dict[str, Any], items: Sequence[Item]) -> int:
    """Bytes that a response takes of its owner's share."""
    return len(json.dumps(body)) + ROW_BYTES + storage_bytes(items)


def _get_response_row(session: Session, owner: str, id_: str, param: str | None = None) -> ResponseRow:
    query = select(ResponseRow).where(ResponseRow.id == id_, ResponseRow.owner == owner)
    row = session.scalar(query) if is_valid_id(id_) else None
    if row is None:
        raise not_found("response", id_, param)
    return row


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
