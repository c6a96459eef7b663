"""API keys in the database: created and shown once, stored as a hash, with a name, a quota and usage per day.

A key is `corral_ID_SECRET`. The id is public: lists, conversations and usage refer to it. The secret is 256 random bits, and
its SHA-256 is stored. Salt and slow hashes protect passwords that can be guessed; 256 random bits cannot, and a slow hash
would delay every request.
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

_KEY_FORMAT = re.compile(r"corral_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME_FORMAT = re.compile(r"(?![0-9a-f]{12}\Z)[^\W_][\w.@+-]{0,63}")  # not 12 hex digits, as an id is


class KeyRow(Base):
    """A key. Revoked ones stay, because conversations and usage refer to them."""

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
        # Names of active keys are unique; the name of a revoked key may be used again.
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
    """What a key may use; None means no limit of its own."""

    requests_per_minute: int | None = None
    """In any 60 seconds; counted by each server process for itself."""
    tokens_per_day: int | None = None
    """Of prompts and answers, per day (UTC); counted over all server processes on one database."""
    at_once: int | None = None
    """Running and waiting requests; counted by each server process for itself."""


class KeyUsage(NamedTuple):
    """What a key used on one day."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: KeyUsage) -> KeyUsage:
        """The sum of both."""
        return KeyUsage(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class Key:
    """A stored key. Times are in seconds since 1970."""

    id: str
    name: str
    digest: str
    """SHA-256 of the whole key, in hexadecimal."""
    created: int
    expires: int | None
    revoked: int | None
    quota: Quota

    @property
    def is_active(self) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or time.time() < self.expires)

    def matches(self, secret: str) -> bool:
        """Whether `secret` is this key; compared in constant time."""
        return hmac.compare_digest(self.digest, hash_key(secret))


class KeyStore:
    """The keys of a database. Its methods block, but use connections of their own, so that other calls do not delay them."""

    def __init__(self, database: Database) -> None:
        self._database = database.with_own_connections()

    def add(self, name: str, quota: Quota | None = None, *, expires: int | None = None) -> tuple[Key, str]:
        """Create a key.

        Args:
            name: for people; unique among keys that are not revoked.
            expires: in seconds since 1970.

        Returns: the key, and the secret that its owner sends, which is not stored and cannot be shown again.

        Raises:
            InputError: the name is in use or invalid.
            DatabaseError: see `Database.write_session`.
        """
        if not _NAME_FORMAT.fullmatch(name):
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
            digest=hash_key(secret),
            created=int(time.time()),
            expires=expires,
            requests_per_minute=quota.requests_per_minute,
            tokens_per_day=quota.tokens_per_day,
            at_once=quota.at_once,
        )
        try:
            with self._database.write_session() as session:
                session.add(row)
        except IntegrityError:
            raise InputError(
                f"there is a key named {name!r}", hint=f"take another name, or first: corral keys revoke {name}"
            ) from None
        return _from_row(row), secret

    def all(self) -> list[Key]:
        """All keys, including revoked and expired ones, oldest first. Raises: DatabaseError."""
        with self._database.read_session() as session:
            return [_from_row(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]

    def revoke(self, name: str) -> Key:
        """Revoke a key; running servers notice within seconds.

        Args:
            name: the key's name or id.

        Raises:
            InputError: there is no such key, or it was revoked before.
            DatabaseError: see `Database.write_session`.
        """
        with self._database.write_session() as session:
            is_match = (KeyRow.name == name) | (KeyRow.id == name)
            row = session.scalars(select(KeyRow).where(is_match, KeyRow.revoked.is_(None))).first()
            if row is None:
                names = session.scalars(select(KeyRow.name).where(KeyRow.revoked.is_(None)).order_by(KeyRow.name)).all()
                raise InputError(
                    f"there is no key named {name!r}",
                    hint=f"these are: {', '.join(names)}" if names else "there are none",
                )
            row.revoked = int(time.time())
            session.flush()
            return _from_row(row)

    def usage_on(self, day: str) -> dict[str, KeyUsage]:
        """The usage of a day, by key id. Raises: DatabaseError."""
        with self._database.read_session() as session:
            rows = session.scalars(select(UsageRow).where(UsageRow.day == day))
            return {row.key: KeyUsage(row.requests, row.prompt_tokens, row.completion_tokens) for row in rows}

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        """Add to the usage of a day, by key id. Raises: DatabaseError."""
        with self._database.write_session() as session:
            # Sorted, so that two processes lock rows in the same order and cannot deadlock.
            for key in sorted(usage):
                _add_usage(session, key, day, usage[key])


def _add_usage(session: Session, key: str, day: str, usage: KeyUsage) -> None:
    statement = (
        update(UsageRow)
        .where(UsageRow.key == key, UsageRow.day == day)
        .values(
            requests=UsageRow.requests + usage.requests,
            prompt_tokens=UsageRow.prompt_tokens + usage.prompt_tokens,
            completion_tokens=UsageRow.completion_tokens + usage.completion_tokens,
        )
        .returning(UsageRow.key)
    )
    options = {"synchronize_session": False}
    if session.execute(statement, execution_options=options).first() is not None:
        return
    try:
        with session.begin_nested():
            session.add(UsageRow(key=key, day=day, **usage._asdict()))
    except IntegrityError:  # another process inserted the row first
        session.execute(statement, execution_options=options)


def parse_key_id(secret: str) -> str | None:
    """The id in a string of the form of a key, else None."""
    match = _KEY_FORMAT.fullmatch(secret)
    return match and match[1]


def hash_key(secret: str) -> str:
    """The hash that is stored of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def today() -> str:
    """Today's date (UTC), as 2026-12-31; usage is counted per such day."""
    return datetime.now(UTC).date().isoformat()


def _from_row(row: KeyRow) -> Key:
    quota = Quota(row.requests_per_minute, row.tokens_per_day, row.at_once)
    return Key(row.id, row.name, row.digest, row.created, row.expires, row.revoked, quota)
