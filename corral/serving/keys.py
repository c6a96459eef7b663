"""API keys: created and shown once, stored as a hash, with a name, a quota and usage per day; or read from a file.

A stored key is `corral_ID_SECRET`. The id is public: lists, conversations and usage refer to it. The secret is 256 random
bits, and its SHA-256 is stored. Salt and slow hashes protect passwords that can be guessed; 256 random bits cannot, and a slow
hash would delay every request.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, String, delete, false, literal, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, MappedAsDataclass, mapped_column

from corral.errors import InputError
from corral.serving.database import Base, Database

ENVIRONMENT = "CORRAL_API_KEYS"
"""The environment variable that holds keys of a server, as a file of `SecretKeys` does."""
_NAME_FORMAT = re.compile(r"(?![0-9a-f]{12}\Z)[^\W_][\w.@+-]{0,63}")  # not 12 hex digits, as an id is
_LINE_FORMAT = re.compile(r"(?P<name>[^=\s]+)=(?P<secret>[!-~]{20,512})(?P<admin>\s+admin)?")
_FILE_BYTES = 2**20
_INSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_log = logging.getLogger(__name__)
_SECRET_PREFIX = "secret-"  # of ids of `SecretKeys`: no stored key has such an id, so none shares its conversations


@dataclass(frozen=True, slots=True)
class Quota:
    """What a key may use; None means no limit of its own."""

    requests_per_minute: int | None = None
    """In any 60 seconds; counted by each server process for itself."""
    tokens_per_day: int | None = None
    """Of prompts and answers, per day (UTC); counted over all server processes on one database."""
    at_once: int | None = None
    """Running and waiting requests; counted by each server process for itself."""


NO_LIMITS = Quota()


class Key(MappedAsDataclass, Base):
    """A key. Revoked ones stay until they are deleted, because conversations and usage refer to them.

    Times are in seconds since 1970.
    """

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    """`hash_key` of what its owner sends."""
    created: Mapped[int] = mapped_column(BigInteger, default=0)
    expires: Mapped[int | None] = mapped_column(BigInteger, default=None)
    revoked: Mapped[int | None] = mapped_column(BigInteger, default=None)
    is_admin: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)
    """Whether it may read metrics and change what is served."""
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger, default=None)
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger, default=None)
    at_once: Mapped[int | None] = mapped_column(BigInteger, default=None)

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

    @property
    def quota(self) -> Quota:
        """What it may use."""
        return Quota(self.requests_per_minute, self.tokens_per_day, self.at_once)

    @property
    def is_active(self) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked is None and not self.is_expired

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() >= self.expires


class UsageRow(Base):
    """What a key used on one day (UTC)."""

    __tablename__ = "key_usage"

    key: Mapped[str] = mapped_column(String(12), ForeignKey("keys.id"), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


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


class KeyStore:
    """The keys of a database. Its methods block, but use connections of their own, so that other calls do not delay them."""

    def __init__(self, database: Database) -> None:
        self._database = database.with_own_connections()

    def add(
        self, name: str, quota: Quota | None = None, *, expires: int | None = None, is_admin: bool = False
    ) -> tuple[Key, str]:
        """Create a key.

        Args:
            name: for people; unique among keys that are not revoked.
            expires: in seconds since 1970.

        Returns: the key, and the secret that its owner sends, which is not stored and cannot be shown again.

        Raises:
            InputError: the name is in use or invalid.
            DatabaseError: see `Database.write_session`.
        """
        _check_name(name)
        id_ = secrets.token_hex(6)
        secret = f"corral_{id_}_{secrets.token_urlsafe(32)}"
        limits = asdict(quota or NO_LIMITS)
        key = Key(id_, name, hash_key(secret), int(time.time()), expires, is_admin=is_admin, **limits)
        try:
            with self._database.write_session() as session:
                session.add(key)
        except IntegrityError:
            raise InputError(
                f"there is a key named {name!r}", hint=f"take another name, or first: corral keys revoke {name}"
            ) from None
        return key, secret

    def all(self) -> list[Key]:
        """All keys, including revoked and expired ones, oldest first. Raises: DatabaseError."""
        with self._database.read_session() as session:
            return list(session.scalars(select(Key).order_by(Key.created, Key.id)))

    def revoke(self, name: str) -> Key:
        """Revoke a key; running servers notice within seconds.

        Args:
            name: the key's name or id.

        Raises:
            InputError: there is no such key, or it was revoked before.
            DatabaseError: see `Database.write_session`.
        """
        with self._database.write_session() as session:
            is_match = (Key.name == name) | (Key.id == name)
            row = session.scalars(select(Key).where(is_match, Key.revoked.is_(None))).first()
            if row is None:
                names = session.scalars(select(Key.name).where(Key.revoked.is_(None)).order_by(Key.name)).all()
                raise InputError(
                    f"there is no key named {name!r}",
                    hint=f"these are: {', '.join(names)}" if names else "there are none",
                )
            row.revoked = int(time.time())
            return row

    def find_inactive(self, name: str) -> Key:
        """The revoked or expired key of this name or id.

        Raises:
            InputError: there is none, there are several of this name, or the key still works.
            DatabaseError: see `Database.read_session`.
        """
        matches = [key for key in self.all() if name in (key.name, key.id)]
        inactive = [key for key in matches if not key.is_active]
        if len(inactive) == 1:
            return inactive[0]
        if inactive:
            hint = f"name one by its id: {', '.join(key.id for key in inactive)}"
            raise InputError(f"{len(inactive)} revoked keys are named {name!r}", hint=hint)
        if matches:
            raise InputError(f"the key {name!r} still works", hint=f"first: corral keys revoke {name}")
        raise InputError(f"there is no key named {name!r}", hint="corral keys list shows all")

    def delete(self, key: Key) -> None:
        """Delete a key and its usage, but not its conversations. Raises: DatabaseError."""
        with self._database.write_session() as session:
            session.execute(delete(UsageRow).where(UsageRow.key == key.id))
            session.execute(delete(Key).where(Key.id == key.id))

    def usage_on(self, day: str) -> dict[str, KeyUsage]:
        """The usage of a day, by key id. Raises: DatabaseError."""
        with self._database.read_session() as session:
            rows = session.scalars(select(UsageRow).where(UsageRow.day == day))
            return {row.key: KeyUsage(row.requests, row.prompt_tokens, row.completion_tokens) for row in rows}

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        """Add to the usage of a day, by key id; that of keys not in the database is dropped. Raises: DatabaseError."""
        with self._database.write_session() as session:
            new = _INSERTS[session.get_bind().dialect.name](UsageRow)
            # Sorted, so that two processes lock rows in the same order and cannot deadlock.
            for key in sorted(usage):
                numbers = (literal(number, BigInteger) for number in usage[key])
                known = select(Key.id, literal(day), *numbers).where(Key.id == key)
                row = new.from_select(["key", "day", *KeyUsage._fields], known)
                sums = {name: UsageRow.__table__.c[name] + row.excluded[name] for name in KeyUsage._fields}
                session.execute(row.on_conflict_do_update(index_elements=["key", "day"], set_=sums))


class SecretKeys:
    """Keys that an operator keeps elsewhere, for example in a Kubernetes secret, beside those of a database if there is one.

    Each line is `NAME=SECRET`, or `NAME=SECRET admin`; empty lines and those that begin with `#` are skipped. The file is read
    again about once a second, so that a changed secret holds within seconds. If it then has a bad line or cannot be read, its
    last good keys stay valid, and the error is logged once for each change: a slip in one line locks out nobody. An empty file
    holds no key. A key's conversations belong to its name, so it keeps them when its secret changes. These keys have no quota,
    and their usage is not stored.

    Args:
        file: with the lines.
        lines: in place of a file.
        store: the keys of a database.

    Raises: InputError (a bad line).
    """

    def __init__(self, file: Path | None = None, lines: str = "", store: KeyStore | None = None) -> None:
        self._file = file
        self._of_lines = _parse_secrets(lines, f"environment variable {ENVIRONMENT}")
        self._of_file: list[Key] | None = None
        """As last read."""
        self._logged: tuple[int, ...] = ()
        """The version of the file with the last error that was logged."""
        self._store = store

    def all(self) -> list[Key]:
        """All keys. Raises: InputError (the first time: the file cannot be read, or has a bad line), DatabaseError."""
        of_file = [] if self._file is None else self._read(self._file)
        return [*self._of_lines, *of_file, *(self._store.all() if self._store else ())]

    def _read(self, file: Path) -> list[Key]:
        version = _version(file)
        try:
            self._of_file = _parse_secrets(_read_file(file), str(file))
            self._logged = ()
        except InputError as error:
            if self._of_file is None:
                raise
            if version != self._logged:
                self._logged = version
                what = "%s (%s); the keys read before stay valid: %s"
                _log.error(what, error.what, error.where, error.hint)
        return self._of_file

    def usage_on(self, day: str) -> Mapping[str, KeyUsage]:
        """The usage of a day of the stored keys. Raises: DatabaseError."""
        return self._store.usage_on(day) if self._store else {}

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        """Add to the usage of a day of the stored keys. Raises: DatabaseError."""
        if self._store:
            self._store.add_usage(day, usage)


KeySource: TypeAlias = KeyStore | SecretKeys
"""Where a server reads its keys. The methods block, and may be called from any thread."""


def open_keys(database: Database | None, file: Path | None = None) -> KeySource | None:
    """The keys of a server, with those of the environment and of a file. Returns: None if there is no source of any."""
    store = None if database is None else KeyStore(database)
    lines = os.environ.get(ENVIRONMENT, "")
    return SecretKeys(file, lines, store) if file or lines.strip() else store


def _parse_secrets(lines: str, where: str) -> list[Key]:
    """Raises: InputError, which names the line and never quotes it."""
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place, match = f"{where}, line {number}", _LINE_FORMAT.fullmatch(line.strip())
        if match is None:
            hint = "write NAME=SECRET, or NAME=SECRET admin; the secret has 20 to 512 printable characters and no space"
            raise InputError("this line holds no key", where=place, hint=hint)
        name = match["name"]
        _check_name(name, place)
        if name in keys:
            raise InputError(f"{name!r} has two keys", where=place, hint="remove one, or rename it")
        id_ = _SECRET_PREFIX + hashlib.sha256(name.encode()).hexdigest()[:24]
        keys[name] = Key(id_, name, hash_key(match["secret"]), is_admin=match["admin"] is not None)
    return list(keys.values())


def _version(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does."""
    try:
        status = path.stat()
    except OSError:
        return (0,)
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_file(path: Path) -> str:
    """Raises: InputError."""
    hint = "it has lines NAME=SECRET; check that this user may read it"
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES + 1)
        if len(data) > _FILE_BYTES:
            raise InputError(f"a file of keys has at most {_FILE_BYTES} bytes", where=str(path), hint=hint)
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"the keys cannot be read: {what}", where=str(path), hint=hint) from None


def _check_name(name: str, where: str | None = None) -> None:
    """Raises: InputError."""
    if not _NAME_FORMAT.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a key",
            where=where,
            hint="use up to 64 letters, digits and . _ - @ +, beginning with a letter or digit; not 12 hex digits",
        )


def hash_key(secret: str) -> str:
    """The hash by which a key is known, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def today() -> str:
    """Today's date (UTC), as 2026-12-31; usage is counted per such day."""
    return datetime.now(UTC).date().isoformat()
