"""Keys: made and shown once, kept as a hash, with a name, what they may use, and what they have used.

A key is `corral_ID_SECRET`. The id is public (lists, conversations and counts go by it), the secret is 256 random bits. What
is kept is its SHA-256. Salt and slow hashes make up for passwords that can be guessed; nobody guesses 256 random bits, and a
hash that takes long would be paid for with each request. It does not know requests: when a key is asked for, and what happens
to who has none.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import BigInteger, ForeignKey, Index, String, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column

from corral.errors import InputError
from corral.serving.database import Base, Database

_KEY = re.compile(r"corral_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"(?![0-9a-f]{12}\Z)[^\W_][\w.@+-]{0,63}")  # none that could be the id of another key


class KeyRow(Base):
    """A key. It stays when it is revoked, as conversations and counts belong to it."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[int] = mapped_column(BigInteger)
    expires: Mapped[int | None] = mapped_column(BigInteger)
    revoked: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    at_once: Mapped[int | None] = mapped_column(BigInteger)

    __table_args__ = (
        # A name stands for one key at a time; a revoked one's can be given anew.
        Index(
            "ux_keys_name",
            "name",
            unique=True,
            sqlite_where=text("revoked IS NULL"),
            postgresql_where=text("revoked IS NULL"),
        ),
    )


class UsageRow(Base):
    """What a key used on one day (UTC)."""

    __tablename__ = "key_usage"

    key: Mapped[str] = mapped_column(String(12), ForeignKey("keys.id"), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a key may use; None: as much as the server gives."""

    requests_per_minute: int | None = None
    """In any 60 seconds, of each server process."""
    tokens_per_day: int | None = None
    """Of prompts and answers, per day (UTC), of all server processes on one database."""
    at_once: int | None = None
    """Requests under way or waiting, of each server process."""


class Used(NamedTuple):
    """What a key used on one day."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Used) -> Used:
        """Both together."""
        return Used(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept. Times are in seconds since 1970."""

    id: str
    name: str
    digest: str
    """SHA-256 of the whole key, in hexadecimal."""
    created: int
    expires: int | None
    revoked: int | None
    quota: Quota

    @property
    def works(self) -> bool:
        """Whether it opens the door now."""
        return self.revoked is None and (self.expires is None or time.time() < self.expires)

    def opens_with(self, secret: str) -> bool:
        """Whether this is the key, compared in a time that does not depend on where they differ."""
        return hmac.compare_digest(self.digest, digest(secret))


class Keys:
    """The keys of a database. Its calls block, and wait for no connection that something else holds."""

    def __init__(self, database: Database) -> None:
        self._database = database.apart()

    def add(self, name: str, quota: Quota | None = None, *, expires: int | None = None) -> tuple[Key, str]:
        """Make a key.

        Args:
            name: for people; no key that works has it.
            expires: when it ends, in seconds since 1970.

        Returns: the key, and what its owner sends: it is not kept and cannot be shown again.

        Raises:
            InputError: the name is in use, or is none.
            DatabaseError: see `Database.session`.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot be the name of a key",
                hint="use up to 64 letters, digits and . _ - @ +, beginning with a letter or digit; not 12 hex digits",
            )
        quota = quota or Quota()
        id_ = secrets.token_hex(6)
        secret = f"corral_{id_}_{secrets.token_urlsafe(32)}"
        row = KeyRow(
            id=id_,
            name=name,
            digest=digest(secret),
            created=int(time.time()),
            expires=expires,
            requests_per_minute=quota.requests_per_minute,
            tokens_per_day=quota.tokens_per_day,
            at_once=quota.at_once,
        )
        try:
            with self._database.session() as session:
                session.add(row)
        except IntegrityError:
            raise InputError(
                f"there is a key named {name!r}", hint=f"take another name, or first: corral keys revoke {name}"
            ) from None
        return _key(row), secret

    def all(self) -> list[Key]:
        """All keys, with those that work no more, oldest first. Raises: DatabaseError."""
        with self._database.reading() as session:
            return [_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]

    def revoke(self, name: str) -> Key:
        """Take a key back; running servers know it within seconds.

        Args:
            name: its name, or its id.

        Raises:
            InputError: no key that was not revoked has it.
            DatabaseError: see `Database.session`.
        """
        with self._database.session() as session:
            is_it = (KeyRow.name == name) | (KeyRow.id == name)
            row = session.scalars(select(KeyRow).where(is_it, KeyRow.revoked.is_(None))).first()
            if row is None:
                names = session.scalars(select(KeyRow.name).where(KeyRow.revoked.is_(None)).order_by(KeyRow.name)).all()
                raise InputError(
                    f"there is no key named {name!r}",
                    hint=f"these are: {', '.join(names)}" if names else "there are none",
                )
            row.revoked = int(time.time())
            session.flush()
            return _key(row)

    def used(self, day: str) -> dict[str, Used]:
        """What each key used on a day, by key id. Raises: DatabaseError."""
        with self._database.reading() as session:
            rows = session.scalars(select(UsageRow).where(UsageRow.day == day))
            return {row.key: Used(row.requests, row.prompt_tokens, row.completion_tokens) for row in rows}

    def count(self, day: str, used: Mapping[str, Used]) -> None:
        """Add to what keys used on a day, by key id. Raises: DatabaseError."""
        with self._database.session() as session:
            # In one order everywhere, so that two processes never wait for each other's rows.
            for key in sorted(used):
                _count(session, key, day, used[key])


def _count(session: Session, key: str, day: str, used: Used) -> None:
    more = (
        update(UsageRow)
        .where(UsageRow.key == key, UsageRow.day == day)
        .values(
            requests=UsageRow.requests + used.requests,
            prompt_tokens=UsageRow.prompt_tokens + used.prompt_tokens,
            completion_tokens=UsageRow.completion_tokens + used.completion_tokens,
        )
        .returning(UsageRow.key)
    )
    options = {"synchronize_session": False}
    if session.execute(more, execution_options=options).first() is not None:
        return
    try:
        with session.begin_nested():
            session.add(UsageRow(key=key, day=day, **used._asdict()))
    except IntegrityError:  # another process was first
        session.execute(more, execution_options=options)


def key_id(secret: str) -> str | None:
    """The id within what a client sent, if it has the form of a key."""
    match = _KEY.fullmatch(secret)
    return match and match[1]


def digest(secret: str) -> str:
    """The hash that is kept of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def today() -> str:
    """The day (UTC) that usage counts for, as 2026-12-31."""
    return datetime.now(UTC).date().isoformat()


def _key(row: KeyRow) -> Key:
    quota = Quota(row.requests_per_minute, row.tokens_per_day, row.at_once)
    return Key(row.id, row.name, row.digest, row.created, row.expires, row.revoked, quota)
