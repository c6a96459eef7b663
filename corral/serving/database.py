"""The database of a server: a SQLite file, or PostgreSQL by URL. Opened, brought up to date, used in short transactions.

It does not know what is stored: tables are declared on `Base` by the modules that use them, and made by the files in
`migrations/versions`. Calls block, so code that is async makes them `beside` itself.

SQLite gives a transaction that reads first and writes later no second chance when another wrote in between. So those that may
write take the write lock when they begin (`BEGIN IMMEDIATE`) and wait for it; those that only read wait for nobody.

Nothing waits for ever: a lock, a connection, a statement that takes longer than the seconds below is an error, and so is a
PostgreSQL that is not heard of.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Engine,
    Integer,
    MetaData,
    NullPool,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from corral.errors import DatabaseError
from corral.extras import require

VERSIONS = "corral_version"
"""The table that says which migration a database is at: under corral's own name, since others may use the database too."""
MIGRATIONS = Path(__file__).parent / "migrations"

Number = BigInteger().with_variant(Integer, "sqlite")
"""The type of a primary key that counts up: SQLite counts only what it calls INTEGER."""

T = TypeVar("T")

_OPEN_SECONDS = 30  # to open a SQLite file, which others may be bringing up to date
_LOCK_SECONDS = 5  # for what another transaction holds
_STATEMENT_SECONDS = 20
_CONNECTION = {
    # Of libpq. What was sent and is not received for ten seconds, or a connection over which nothing comes, is lost.
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_LOCK = 0x636F7272616C  # "corral": PostgreSQL's advisory locks have numbers, one space for the whole database
_FORMS = "sqlite:////path/of/a.db, or postgresql://user:password@host/name"


class Base(DeclarativeBase):
    """What all tables are declared on."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


def default_url() -> str:
    """The file of a server that is told no other: `corral/server.db` in `$XDG_DATA_HOME`, else in `~/.local/share`."""
    xdg = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "share"
    return f"sqlite:///{base / 'corral' / 'server.db'}"


class Database:
    """A database that is there and has every table. Its methods may be called from any thread.

    Opening makes the file of a SQLite database, for its owner's eyes only, with the folder it lies in; and brings an older
    database up to date. Processes that open one at the same time wait for each other.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:password@host:port/name`.

    Raises:
        DatabaseError: it cannot be reached or used, or a newer corral wrote it. It tells no password.
        MissingExtraError: the driver for PostgreSQL is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self.where = self._url.set(query={}).render_as_string(hide_password=True)
        """The address for people, without the password."""
        with self._told(SQLAlchemyError, sqlite3.Error, OSError):
            if self._path:
                _make_file(self._path)
            self._migrate()
        self._writers = threading.Lock()
        self._engines: list[Engine] = []
        self._connect()

    def apart(self) -> Database:
        """The same database over connections of its own: who uses it waits for none that others hold. Closed with this one."""
        other = copy.copy(self)
        other._connect()
        return other

    @contextlib.contextmanager
    def session(self) -> Generator[Session]:
        """A transaction that may write: committed at the end, rolled back by an exception.

        Raises:
            DatabaseError: the database cannot be reached, is locked for too long, or has no room left.
        """
        with self._told(*_AWAY), self._alone(), self._writing.begin() as session:
            yield session

    @contextlib.contextmanager
    def reading(self) -> Generator[Session]:
        """A transaction that only reads. Raises: as `session`."""
        with self._told(*_AWAY), self._reading.begin() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        for engine in self._engines:
            engine.dispose()

    def _connect(self) -> None:
        engine = self._made(pool_timeout=_LOCK_SECONDS)
        self._engines.append(engine)
        self._writing = sessionmaker(engine, expire_on_commit=False)
        self._reading = sessionmaker(engine.execution_options(reading=True), expire_on_commit=False)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        """Of the writers of this process, let one at a time to SQLite, which makes them poll: some would wait for seconds."""
        if not self._path:
            yield
            return
        if not self._writers.acquire(timeout=_LOCK_SECONDS):
            raise DatabaseError("the database is locked", where=self.where, hint="another transaction does not end")
        try:
            yield
        finally:
            self._writers.release()

    @property
    def _path(self) -> Path | None:
        return Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None

    def _made(self, **options: Any) -> Engine:
        options["hide_parameters"] = True  # they are what people wrote, and errors are logged
        is_to_change = "poolclass" in options
        if not self._path:
            # A server that was started anew has closed its connections: each is tried before it is used.
            engine = create_engine(self._url, pool_pre_ping=True, **options)
            if not is_to_change:
                event.listen(engine, "connect", _in_bounded_time)
            return engine
        seconds = _OPEN_SECONDS if is_to_change else _LOCK_SECONDS
        engine = create_engine(self._url, connect_args={"timeout": seconds}, **options)
        # While tables change, foreign keys are not followed: SQLite alters a table by making it anew, and dropping the old
        # one would take along what refers to it.
        event.listen(engine, "connect", _changing_tables if is_to_change else _following_keys)
        event.listen(engine, "begin", _begin)
        return engine

    def _migrate(self) -> None:
        engine = self._made(poolclass=NullPool)
        with engine.begin() as connection:
            if not self._path:
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _LOCK})
            self._refuse_newer(connection)
            command.upgrade(configuration(connection), "head")

    def _refuse_newer(self, connection: Connection) -> None:
        known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
        context = MigrationContext.configure(connection, opts={"version_table": VERSIONS})
        newer = set(context.get_current_heads()) - known
        if newer:
            raise DatabaseError(
                f"a newer version of corral made this database: it is at {max(newer)}, and this one knows {max(known)}",
                where=self.where,
                hint="use that version, or give another database",
            )

    @contextlib.contextmanager
    def _told(self, *kinds: type[Exception]) -> Generator[None]:
        try:
            yield
        except kinds as error:
            hint = "may the file and its folder be written, and is there room?"
            if not self._path:
                hint = "is it running, and are host, port, user, password and name right?"
            raise DatabaseError(
                f"the database cannot be used: {self._words(error)}", where=self.where, hint=hint
            ) from None

    def _words(self, error: Exception) -> str:
        """What the driver says, on one line, without the password."""
        words = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
        for secret in (self._url.password, self._url.query.get("password")):
            words = words.replace(str(secret), "***") if secret else words
        return words


_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)


async def beside(call: Callable[..., T], *arguments: Any) -> T:
    """What a call returns that blocks, from a thread of its own.

    So it waits for no other call, as it would for the threads of a pool when all of them wait for a database; and the process
    can end without it.
    """
    done: Future[T] = Future()

    def work() -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(call(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="corral-database", daemon=True).start()
    return await asyncio.wrap_future(done)


def configuration(connection: Connection) -> Config:
    """Of alembic, for the migrations of corral over this connection, whose transaction they become part of."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _parsed(url: str) -> URL:
    """Raises: DatabaseError (no URL of a database corral knows), MissingExtraError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # It may hold a password, and nobody knows where.
        raise DatabaseError("this is not the URL of a database", hint=f"give {_FORMS}") from None
    match parsed.drivername:
        case "sqlite":
            if parsed.database in (None, "", ":memory:") or parsed.query:
                what = "a SQLite database is a file: its URL has a path, and nothing after it"
                raise DatabaseError(what, where=f"sqlite:///{parsed.database or ''}", hint=f"give {_FORMS}")
            return parsed
        case "postgresql" | "postgres" | "postgresql+psycopg":
            require("psycopg", "postgres")
            told = {name: value for name, value in _CONNECTION.items() if name not in parsed.query}
            return parsed.set(drivername="postgresql+psycopg").update_query_dict(told)
        case other:
            raise DatabaseError(f"{other!r} is not a kind of database corral can use", hint=f"give {_FORMS}")


def _make_file(path: Path) -> None:
    """Make a database's file where there is none, and have it keep a log beside it (WAL), so that readers never wait."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Only a new file is opened: closing one that SQLite has open in this process would drop its locks.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with contextlib.closing(sqlite3.connect(path, timeout=_OPEN_SECONDS)) as connection:
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # For this one statement SQLite does not wait by itself while another process does the same.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _in_bounded_time(connection: Any, record: object) -> None:
    """Not as options of the connection, which poolers between here and PostgreSQL may refuse."""
    connection.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'")
    connection.execute(f"SET statement_timeout = '{_STATEMENT_SECONDS}s'")
    connection.commit()


def _changing_tables(connection: Any, record: object) -> None:
    connection.isolation_level = None  # Python's driver would begin transactions by itself, and not for every statement
    connection.execute("PRAGMA foreign_keys = OFF")


def _following_keys(connection: Any, record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection) -> None:
    is_reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
