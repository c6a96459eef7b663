"""Stores responses: from pending, with a lease on their conversation, to finished, discarded or lost.

A response is begun and finished, each in one transaction. In between it locks its conversation, and a second response for that
conversation is refused. Its server renews the lease every few seconds. If the server is killed, the lease ends, the
conversation is unlocked, and the response counts as lost.

Calls block. If several machines share a database, their clocks must agree within a few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, literal, or_, select, update
from sqlalchemy.orm import Session, aliased

from corral.serving.database import Database
from corral.serving.protocol import Refused
from corral.serving.tables import (
    ROW_BYTES,
    ConversationRow,
    Item,
    ItemRow,
    Page,
    ResponseRow,
    StorageLimits,
    is_valid_id,
    not_found,
    read_page,
    read_rows,
    storage_bytes,
)

_SWEEP_SECONDS = 3600
_DAY = 86400


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

    def __init__(self, database: Database, limits: StorageLimits, *, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._database = database
        # Heartbeats must not wait for connections that other calls hold.
        self._heartbeat_database = database.with_own_connections()
        self._limits = limits
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
                conversation.turn, conversation.turn_until = pending.id, self._lease_end
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
                    until=self._lease_end,
                    body=body,
                    bytes=size,
                )
                session.add(row)
            return history

    def renew_lease(self, pending: PendingResponse) -> None:
        """Extend the lease of a pending response."""
        conversations = update(ConversationRow).where(ConversationRow.turn == pending.id)
        responses = update(ResponseRow).where(ResponseRow.id == pending.id, ResponseRow.until.is_not(None))
        with self._heartbeat_database.write_session() as session:
            session.execute(conversations.values(turn_until=self._lease_end))
            session.execute(responses.values(until=self._lease_end))

    def discard(self, pending: PendingResponse) -> None:
        """Delete a pending response and unlock its conversation."""
        with self._database.write_session() as session:
            session.execute(delete(ResponseRow).where(ResponseRow.id == pending.id))
            session.execute(
                update(ConversationRow).where(ConversationRow.turn == pending.id).values(turn=None, turn_until=None)
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
                if conversation.turn != pending.id:
                    raise _locked(conversation)
                conversation.turn = conversation.turn_until = None
            row = session.scalar(select(ResponseRow).where(ResponseRow.id == pending.id))
            holder = conversation if is_kept else None
            items = [(item, False) for item in pending.inputs]
            if output is not None:
                items.append((output, True))
            if row is not None:
                row.body, row.until = body, None
                row.bytes = _response_bytes(body, () if holder else [item for item, _ in items])
            elif holder is None:
                return
            for item, is_output in items:
                _add_item(session, item, holder, response=row.number if row else None, is_output=is_output)

    def get(self, owner: str, id_: str) -> StoredResponse:
        """One response. Raises: Refused (404)."""
        with self._database.read_session() as session:
            row = _get_response_row(session, owner, id_)
            outputs = select(ItemRow).where(ItemRow.response == row.number, ItemRow.is_output)
            items = [Item.from_row(item) for item in session.scalars(outputs.order_by(ItemRow.number))]
            return StoredResponse(row.body, items, is_lost=row.until is not None and row.until < time.time())

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
        rows, _ = read_rows(
            session, query.order_by(ItemRow.number).limit(self._limits.max_items + 1), self._limits.max_bytes
        )
        items = [Item.from_row(row) for row in rows]
        check_conversation_size(len(items), sum(item.bytes for item in items), pending.inputs, self._limits)
        return items

    def _chain(self, session: Session, owner: str, previous: str) -> ColumnElement[bool]:
        """The items up to a response: its own, those of the chain before it, and those of a conversation where that begins."""
        row = _get_response_row(session, owner, previous, param="previous_response_id")
        has_answer = select(ItemRow.number).where(ItemRow.response == row.number, ItemRow.is_output).limit(1)
        if session.scalar(has_answer) is None:
            is_pending = row.until is not None and row.until > time.time()
            what = "is still being generated" if is_pending else "has no answer to continue"
            raise Refused(409 if is_pending else 400, f"the response {previous!r} {what}", param="previous_response_id")
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
        delete_responses(session, select(ResponseRow.number).where(ResponseRow.conversation.is_(None), is_old))

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


def get_conversation_row(
    session: Session, owner: str, id_: str, *, to_write: bool = False, param: str | None = None
) -> ConversationRow:
    """The row of an owner's conversation; `to_write` locks it until the transaction ends. Raises: Refused (404)."""
    query = select(ConversationRow).where(ConversationRow.id == id_, ConversationRow.owner == owner)
    row = session.scalar(query.with_for_update() if to_write else query) if is_valid_id(id_) else None
    if row is None:
        raise not_found("conversation", id_, param)
    return row


def check_unlocked(row: ConversationRow) -> None:
    """Raises: Refused (409: a response is pending in the conversation)."""
    if row.turn is not None and (row.turn_until or 0) > time.time():
        raise _locked(row)


def check_conversation_size(items: int, size: int, new: Sequence[Item], limits: StorageLimits) -> None:
    """Raises: Refused (with the new items, a conversation would have too many items or bytes)."""
    if items + len(new) > limits.max_items or size + sum(item.bytes for item in new) > limits.max_bytes:
        what = (
            f"a conversation holds at most {limits.max_items} items and {limits.max_bytes} bytes of text: start another"
        )
        raise Refused(400, what, code="conversation_full")


def check_total_size(session: Session, owner: str, new: Sequence[Item], limits: StorageLimits) -> None:
    """Raises: Refused (with the new items, all conversations of the owner would be too large)."""
    sums = select(func.count(), func.sum(ConversationRow.items), func.sum(ConversationRow.bytes))
    count, items, size = session.execute(sums.where(ConversationRow.owner == owner)).one()
    if (size or 0) + (count + (items or 0)) * ROW_BYTES + storage_bytes(new) > limits.max_total_bytes:
        what = f"conversations hold at most {limits.max_total_bytes} bytes together: delete some"
        raise Refused(400, what, code="storage_full")


def add_items(session: Session, row: ConversationRow, items: Sequence[Item], limits: StorageLimits) -> None:
    """Add items to a conversation. Raises: Refused (a storage limit)."""
    check_conversation_size(row.items, row.bytes, items, limits)
    check_total_size(session, row.owner, items, limits)
    for item in items:
        _add_item(session, item, row, response=None, is_output=False)


def _response_bytes(body: dict[str, Any], items: Sequence[Item]) -> int:
    """Bytes that a response takes of its owner's share."""
    return len(json.dumps(body)) + ROW_BYTES + storage_bytes(items)


def delete_responses(session: Session, responses: Select[int]) -> None:
    """Delete responses by their numbers; their items stay in their conversations."""
    session.execute(delete(ItemRow).where(ItemRow.response.in_(responses), ItemRow.conversation.is_(None)))
    session.execute(delete(ResponseRow).where(ResponseRow.number.in_(responses)))


def _add_item(
    session: Session, item: Item, conversation: ConversationRow | None, *, response: int | None, is_output: bool
) -> None:
    number = None
    if conversation is not None:
        number = conversation.number
        conversation.items += 1
        conversation.bytes += item.bytes
    session.add(item.to_row(conversation=number, response=response, is_output=is_output))
    session.flush()  # one by one, because their numbers are their order


def _locked(row: ConversationRow) -> Refused:
    what = f"an answer is being generated in the conversation {row.id!r}: wait for it, or cancel it"
    return Refused(409, what, param="conversation", code="conversation_locked")


def _get_response_row(session: Session, owner: str, id_: str, param: str | None = None) -> ResponseRow:
    query = select(ResponseRow).where(ResponseRow.id == id_, ResponseRow.owner == owner)
    row = session.scalar(query) if is_valid_id(id_) else None
    if row is None:
        raise not_found("response", id_, param)
    return row
