"""Stored responses, and the turns they come from: what was said before, and what becomes of an answer, whole or not.

A turn is begun and ended, each in one transaction; in between it holds its conversation, so that two turns of one conversation
never mix: the second is refused. Who holds one says every few seconds that it lives (`renew`). A process that was killed does
not, so what it held is free again soon, and of its answer nothing is stored but that it was asked for.

Calls block. It does not know models, HTTP, or what the body of a response says. Where several machines share a database, their
clocks must agree within a few seconds.
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
    Caps,
    ConversationRow,
    Item,
    ItemRow,
    Page,
    ResponseRow,
    bytes_of,
    is_id,
    missing,
    page_of,
    some_of,
)

_SWEEP_SECONDS = 3600
_DAY = 86400


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, and where it belongs. At most one of `conversation` and `previous` is given."""

    id: str
    """Of the response."""
    owner: str
    inputs: tuple[Item, ...]
    stored: bool
    """Whether the response can be had later. What is said in a conversation is stored with that in any case."""
    conversation: str | None = None
    previous: str | None = None
    """The response that this one goes on from."""

    @property
    def leaves_a_trace(self) -> bool:
        """Whether anything of it is written."""
        return self.stored or self.conversation is not None


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was stored."""

    body: dict[str, Any]
    outputs: list[Item]
    is_lost: bool
    """Its maker died before it was done."""


class Turns:
    """All responses of a server.

    Args:
        caps: how much is stored.
        lease_seconds: for how long a turn is taken to live without a sign of it.
    """

    def __init__(self, database: Database, caps: Caps, *, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._database = database
        self._signs = database.apart()  # of life: they must come though all other connections are waited for
        self._caps = caps
        self._swept = 0.0

    def begin(self, turn: Turn, body: dict[str, Any]) -> list[Item]:
        """Take hold of a turn's conversation, and store that its response is being made.

        Args:
            body: of the response, as far as it is known.

        Returns: what was said before, in order.

        Raises:
            Refused: conversation or previous response are missing (404), an answer is being made there (409), or it is over
                a cap.
        """
        if not turn.leaves_a_trace:
            with self._database.reading() as session:
                return self._before(session, turn)
        with self._database.session() as session:
            self._forget_old(session)
            conversation = None
            if turn.conversation is not None:
                conversation = owned(session, turn.owner, turn.conversation, to_write=True, param="conversation")
                check_free(conversation)
                check_caps(conversation.items, conversation.bytes, turn.inputs, self._caps)
                check_total(session, turn.owner, turn.inputs, self._caps)
                conversation.turn, conversation.turn_until = turn.id, self._until
            before = self._before(session, turn)
            if turn.stored:
                size = _size(body, () if conversation else turn.inputs)
                self._make_room(session, turn.owner, size)
                row = ResponseRow(
                    id=turn.id,
                    owner=turn.owner,
                    conversation=conversation.number if conversation else None,
                    previous=turn.previous,
                    created_at=int(time.time()),
                    until=self._until,
                    body=body,
                    bytes=size,
                )
                session.add(row)
            return before

    def renew(self, turn: Turn) -> None:
        """Say that a turn is still being answered."""
        conversations = update(ConversationRow).where(ConversationRow.turn == turn.id)
        responses = update(ResponseRow).where(ResponseRow.id == turn.id, ResponseRow.until.is_not(None))
        with self._signs.session() as session:
            session.execute(conversations.values(turn_until=self._until))
            session.execute(responses.values(until=self._until))

    def drop(self, turn: Turn) -> None:
        """End a turn as if it had not been."""
        with self._database.session() as session:
            session.execute(delete(ResponseRow).where(ResponseRow.id == turn.id))
            session.execute(
                update(ConversationRow).where(ConversationRow.turn == turn.id).values(turn=None, turn_until=None)
            )

    def end(self, turn: Turn, body: dict[str, Any], output: Item | None, *, kept: bool) -> None:
        """Store what a turn came to and let its conversation go.

        Args:
            body: of the response.
            output: the answer, if there is any.
            kept: whether question and answer become part of the conversation.

        Raises:
            Refused: the conversation was deleted meanwhile (404), or another turn holds it, as this one was taken for dead
                (409). Nothing is stored then.
        """
        with self._database.session() as session:
            conversation = None
            if turn.conversation is not None:
                conversation = owned(session, turn.owner, turn.conversation, to_write=True, param="conversation")
                if conversation.turn != turn.id:
                    raise _held(conversation)
                conversation.turn = conversation.turn_until = None
            row = session.scalar(select(ResponseRow).where(ResponseRow.id == turn.id))
            holder = conversation if kept else None
            said = [(item, False) for item in turn.inputs]
            if output is not None:
                said.append((output, True))
            if row is not None:
                row.body, row.until = body, None
                row.bytes = _size(body, () if holder else [item for item, _ in said])
            elif holder is None:
                return
            for item, is_output in said:
                _write(session, item, holder, response=row.number if row else None, is_output=is_output)

    def response(self, owner: str, id_: str) -> StoredResponse:
        """One response. Raises: Refused (404)."""
        with self._database.reading() as session:
            row = _response(session, owner, id_)
            outputs = select(ItemRow).where(ItemRow.response == row.number, ItemRow.is_output)
            items = [Item.of(item) for item in session.scalars(outputs.order_by(ItemRow.number))]
            return StoredResponse(row.body, items, is_lost=row.until is not None and row.until < time.time())

    def inputs(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """(what a response was asked with, whether there is more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.reading() as session:
            number = _response(session, owner, id_).number
            query = select(ItemRow).where(ItemRow.response == number, ~ItemRow.is_output)
            rows, has_more = page_of(session, query, ItemRow, page)
            return [Item.of(row) for row in rows], has_more

    def delete(self, owner: str, id_: str) -> None:
        """Delete a response; what it says stays in its conversation, if it has one. Raises: Refused (404)."""
        with self._database.session() as session:
            row = _response(session, owner, id_)
            forget(session, select(ResponseRow.number).where(ResponseRow.number == row.number))

    @property
    def _until(self) -> float:
        return time.time() + self.lease_seconds

    def _before(self, session: Session, turn: Turn) -> list[Item]:
        if turn.conversation is not None:
            number = owned(session, turn.owner, turn.conversation, param="conversation").number
            query = select(ItemRow).where(ItemRow.conversation == number)
        elif turn.previous is not None:
            query = select(ItemRow).where(self._chain(session, turn.owner, turn.previous))
        else:
            if turn.leaves_a_trace:
                check_caps(0, 0, turn.inputs, self._caps)
            return []
        rows, _ = some_of(session, query.order_by(ItemRow.number).limit(self._caps.items + 1), self._caps.bytes)
        items = [Item.of(row) for row in rows]
        check_caps(len(items), sum(item.bytes for item in items), turn.inputs, self._caps)
        return items

    def _chain(self, session: Session, owner: str, previous: str) -> ColumnElement[bool]:
        """Which items a response goes back to: its own, and those of the ones before it, or of its conversation till then."""
        row = _response(session, owner, previous, param="previous_response_id")
        has_answer = select(ItemRow.number).where(ItemRow.response == row.number, ItemRow.is_output).limit(1)
        if session.scalar(has_answer) is None:
            is_under_way = row.until is not None and row.until > time.time()
            what = "is still being made" if is_under_way else "has no answer to go on from"
            raise Refused(
                409 if is_under_way else 400, f"the response {previous!r} {what}", param="previous_response_id"
            )
        columns = (ResponseRow.number, ResponseRow.previous, ResponseRow.conversation)
        chain = select(*columns, literal(0).label("depth")).where(ResponseRow.number == row.number).cte(recursive=True)
        older = aliased(ResponseRow)
        chain = chain.union_all(
            select(older.number, older.previous, older.conversation, chain.c.depth + 1)
            .join(chain, older.id == chain.c.previous)
            .where(older.owner == owner, chain.c.conversation.is_(None), chain.c.depth < self._caps.items)
        )
        links = session.execute(select(chain.c.number, chain.c.previous, chain.c.conversation, chain.c.depth)).all()
        first = max(links, key=lambda link: link.depth)
        if first.conversation is None:
            if first.previous is not None:
                raise missing("response", first.previous, "previous_response_id")
            return ItemRow.response.in_([link.number for link in links])
        till = select(func.max(ItemRow.number)).where(ItemRow.response == first.number).scalar_subquery()
        in_conversation = and_(ItemRow.conversation == first.conversation, ItemRow.number <= till)
        return or_(ItemRow.response.in_([link.number for link in links]), in_conversation)

    def _forget_old(self, session: Session) -> None:
        if time.monotonic() - self._swept < _SWEEP_SECONDS and self._swept:
            return
        self._swept = time.monotonic()
        is_old = ResponseRow.created_at < time.time() - self._caps.days * _DAY
        forget(session, select(ResponseRow.number).where(ResponseRow.conversation.is_(None), is_old))

    def _make_room(self, session: Session, owner: str, size: int) -> None:
        """Forget the oldest responses of an owner until one more has room. Raises: Refused (it alone is too large)."""
        if size > self._caps.responses_bytes:
            raise Refused(
                400, f"a response takes at most {self._caps.responses_bytes} bytes", code="response_too_large"
            )
        mine = ResponseRow.owner == owner
        while True:
            count, held = session.execute(select(func.count(), func.sum(ResponseRow.bytes)).where(mine)).one()
            if count < self._caps.responses and (held or 0) + size <= self._caps.responses_bytes:
                return
            # Some more than need be, so that not every turn has to.
            oldest = select(ResponseRow.number).where(mine).order_by(ResponseRow.number).limit(1 + count // 10)
            forget(session, oldest)


def owned(
    session: Session, owner: str, id_: str, *, to_write: bool = False, param: str | None = None
) -> ConversationRow:
    """A conversation of this owner; with `to_write`, no other transaction writes it until this one ends. Raises: Refused."""
    query = select(ConversationRow).where(ConversationRow.id == id_, ConversationRow.owner == owner)
    row = session.scalar(query.with_for_update() if to_write else query) if is_id(id_) else None
    if row is None:
        raise missing("conversation", id_, param)
    return row


def check_free(row: ConversationRow) -> None:
    """Nothing is added to a conversation while an answer is being made for it. Raises: Refused (409)."""
    if row.turn is not None and (row.turn_until or 0) > time.time():
        raise _held(row)


def check_caps(items: int, size: int, new: Sequence[Item], caps: Caps) -> None:
    """Raises: Refused (with the new ones there would be too many items, or too many bytes)."""
    if items + len(new) > caps.items or size + sum(item.bytes for item in new) > caps.bytes:
        what = f"a conversation holds at most {caps.items} items and {caps.bytes} bytes of text: begin another"
        raise Refused(400, what, code="conversation_full")


def check_total(session: Session, owner: str, new: Sequence[Item], caps: Caps) -> None:
    """Raises: Refused (with the new ones there would be too much in all conversations of this owner together)."""
    sums = select(func.count(), func.sum(ConversationRow.items), func.sum(ConversationRow.bytes))
    count, items, size = session.execute(sums.where(ConversationRow.owner == owner)).one()
    if (size or 0) + (count + (items or 0)) * ROW_BYTES + bytes_of(new) > caps.total:
        what = f"conversations hold at most {caps.total} bytes together: delete some"
        raise Refused(400, what, code="storage_full")


def add(session: Session, row: ConversationRow, items: Sequence[Item], caps: Caps) -> None:
    """Add items to a conversation. Raises: Refused (over a cap)."""
    check_caps(row.items, row.bytes, items, caps)
    check_total(session, row.owner, items, caps)
    for item in items:
        _write(session, item, row, response=None, is_output=False)


def _size(body: dict[str, Any], items: Sequence[Item]) -> int:
    """What a response takes of its owner's share."""
    return len(json.dumps(body)) + ROW_BYTES + bytes_of(items)


def forget(session: Session, responses: Select[int]) -> None:
    """Delete responses by their numbers; what they say stays in their conversations."""
    session.execute(delete(ItemRow).where(ItemRow.response.in_(responses), ItemRow.conversation.is_(None)))
    session.execute(delete(ResponseRow).where(ResponseRow.number.in_(responses)))


def _write(
    session: Session, item: Item, conversation: ConversationRow | None, *, response: int | None, is_output: bool
) -> None:
    number = None
    if conversation is not None:
        number = conversation.number
        conversation.items += 1
        conversation.bytes += item.bytes
    session.add(item.row(conversation=number, response=response, is_output=is_output))
    session.flush()  # one by one, since their numbers are their order


def _held(row: ConversationRow) -> Refused:
    what = f"an answer is being made in the conversation {row.id!r}: wait for it, or stop it"
    return Refused(409, what, param="conversation", code="conversation_locked")


def _response(session: Session, owner: str, id_: str, param: str | None = None) -> ResponseRow:
    query = select(ResponseRow).where(ResponseRow.id == id_, ResponseRow.owner == owner)
    row = session.scalar(query) if is_id(id_) else None
    if row is None:
        raise missing("response", id_, param)
    return row
