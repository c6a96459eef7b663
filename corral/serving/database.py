"""The database of a server: a SQLite file, or PostgreSQL by URL. Opens it, migrates it, and runs short transactions.

Modules declare their tables on `Base`; the files in `migrations/versions` create them. Calls block, so async code uses
`run_in_thread`.

In SQLite, a transaction that reads first and writes later fails if another one wrote in between. So transactions that may
write take the write lock at their start (`BEGIN IMMEDIATE`) and wait for it; those that only read never wait.

Nothing waits for ever: locks, connections and statements have the timeouts below.
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

from corral.errors import DatabaseError, require

VERSION_TABLE = "corral_version"
"""The table with the current migration. It has a name of corral's own, as other programs may use the database too."""
MIGRATIONS = Path(__file__).parent / "migrations"

AutoNumber = BigInteger().with_variant(Integer, "sqlite")
"""The type of an auto-increment primary key: SQLite increments only INTEGER."""

T = TypeVar("T")

_OPEN_SECONDS = 30  # to open a SQLite file, which another process may be migrating
_LOCK_SECONDS = 5  # for a lock or a connection
_STATEMENT_SECONDS = 20
_POSTGRES_OPTIONS = {
    # libpq's options: a connection is lost when sent data is not acknowledged, or nothing arrives, for ten seconds.
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_MIGRATION_LOCK = 0x636F7272616C  # "corral": advisory locks of PostgreSQL are numbers that all programs share
_URL_FORMS = "sqlite:////path/of/a.db, or postgresql://user:password@host/name"


class Base(DeclarativeBase):
    """The base class of all tables."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


def default_url() -> str:
    """The default database: `$CORRAL_DATABASE`, else `corral/server.db` in `$XDG_DATA_HOME` or in `~/.local/share`."""
    if url := os.environ.get("CORRAL_DATABASE"):
        return url
    xdg = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification: a relative path is invalid and is ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "share"
    return f"sqlite:///{base / 'corral' / 'server.db'}"


class Database:
    """An open, migrated database. Its methods may be called from any thread.

    Opening creates the file of a SQLite database and its folder, readable only by their owner, and migrates an older database.
    Processes that open the same database at the same time wait for each other.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:password@host:port/name`.

    Raises:
        DatabaseError: it cannot be reached or used, or another version of corral wrote it. The message contains no password.
        MissingExtraError: the driver for PostgreSQL is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse_url(url)
        self.address = self._url.set(query={}).render_as_string(hide_password=True)
        """The URL for messages, without the password."""
        with self._translate_errors(SQLAlchemyError, sqlite3.Error, OSError):
            if self._path:
                _create_file(self._path)
            self._migrate()
        self._writer_lock = threading.Lock()
        self._engines: list[Engine] = []
        self._connect()

    def with_own_connections(self) -> Database:
        """The same database with connections of its own, for calls that must not wait for others. Closed with this one."""
        other = copy.copy(self)
        other._connect()
        return other

    @contextlib.contextmanager
    def write_session(self) -> Generator[Session]:
        """A transaction that may write: committed at the end, rolled back on an exception.

        Raises:
            DatabaseError: the database cannot be reached, stays locked, or is full.
        """
        with self._translate_errors(*_UNAVAILABLE), self._one_writer(), self._new_write_session.begin() as session:
            yield session

    @contextlib.contextmanager
    def read_session(self) -> Generator[Session]:
        """A transaction that only reads. Raises: as `write_session`."""
        with self._translate_errors(*_UNAVAILABLE), self._new_read_session.begin() as session:
            yield session

    def close(self) -> None:
        """Close all connections."""
        for engine in self._engines:
            engine.dispose()

    def _connect(self) -> None:
        engine = self._create_engine(pool_timeout=_LOCK_SECONDS)
        self._engines.append(engine)
        self._new_write_session = sessionmaker(engine, expire_on_commit=False)
        self._new_read_session = sessionmaker(engine.execution_options(reading=True), expire_on_commit=False)

    @contextlib.contextmanager
    def _one_writer(self) -> Generator[None]:
        """Let one writer of this process at a time use SQLite, which makes waiting writers poll, some of them for seconds."""
        if not self._path:
            yield
            return
        if not self._writer_lock.acquire(timeout=_LOCK_SECONDS):
            raise DatabaseError("the database is locked", where=self.address, hint="another transaction does not end")
        try:
            yield
        finally:
            self._writer_lock.release()

    @property
    def _path(self) -> Path | None:
        return Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None

    def _create_engine(self, **options: Any) -> Engine:
        options["hide_parameters"] = True  # errors are logged, and parameters hold what users wrote
        is_for_migration = "poolclass" in options
        if not self._path:
            # Test connections before use: a server that was restarted has closed them.
            engine = create_engine(self._url, pool_pre_ping=True, **options)
            if not is_for_migration:
                event.listen(engine, "connect", _set_timeouts)
            return engine
        seconds = _OPEN_SECONDS if is_for_migration else _LOCK_SECONDS
        # No isolation level, else the driver starts transactions itself, for some statements only.
        engine = create_engine(self._url, connect_args={"timeout": seconds, "isolation_level": None}, **options)
        # No foreign keys during migrations: SQLite alters a table by recreating it, and dropping the old one would delete
        # the rows that refer to it.
        if not is_for_migration:
            event.listen(engine, "connect", _enable_foreign_keys)
        event.listen(engine, "begin", _begin_transaction)
        return engine

    def _migrate(self) -> None:
        engine = self._create_engine(poolclass=NullPool)
        with engine.begin() as connection:
            if not self._path:
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})
            self._refuse_unknown(connection)
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _refuse_unknown(self, connection: Connection) -> None:
        """Raises: DatabaseError (a newer corral wrote the database, or one from before the first release)."""
        known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        unknown = set(context.get_current_heads()) - known
        if unknown:
            raise DatabaseError(
                f"another version of corral wrote this database, a newer one or one from before the first release: it has "
                f"migration {max(unknown)!r}, and this version knows {', '.join(map(repr, sorted(known)))}",
                where=self.address,
                hint="use the version that wrote it, or give another database",
            )

    @contextlib.contextmanager
    def _translate_errors(self, *kinds: type[Exception]) -> Generator[None]:
        try:
            yield
        except kinds as error:
            hint = "check that the file and its folder may be written, and that the disk is not full"
            if not self._path:
                hint = "check that it is running, and host, port, user, password and name"
            raise DatabaseError(
                f"the database cannot be used: {self._driver_message(error)}", where=self.address, hint=hint
            ) from None

    def _driver_message(self, error: Exception) -> str:
        """The driver's message on one line, without the password."""
        message = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
        for secret in (self._url.password, self._url.query.get("password")):
            message = message.replace(str(secret), "***") if secret else message
        return message


_UNAVAILABLE = (OperationalError, InterfaceError, PoolTimeoutError)


async def run_in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking call in a new daemon thread and return its result.

    Unlike with a thread pool, the call never waits for others that hang, and the process can exit while it hangs.
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


def _parse_url(url: str) -> URL:
    """Raises: DatabaseError (not a URL of a supported database), MissingExtraError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not quoted: it may contain a password anywhere.
        raise DatabaseError("this is not the URL of a database", hint=f"give {_URL_FORMS}") from None
    match parsed.drivername:
        case "sqlite":
            if parsed.database in (None, "", ":memory:") or parsed.query:
                what = "a SQLite database is a file: its URL has a path, and nothing after it"
                raise DatabaseError(what, where=f"sqlite:///{parsed.database or ''}", hint=f"give {_URL_FORMS}")
            return parsed
        case "postgresql" | "postgres" | "postgresql+psycopg":
            require("psycopg", "postgres")
            options = {name: value for name, value in _POSTGRES_OPTIONS.items() if name not in parsed.query}
            return parsed.set(drivername="postgresql+psycopg").update_query_dict(options)
        case other:
            raise DatabaseError(f"{other!r} is not a kind of database corral can use", hint=f"give {_URL_FORMS}")


def _create_file(path: Path) -> None:
    """Create a SQLite file if there is none, and switch it to WAL, so that readers never wait."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # O_EXCL: closing a file that SQLite has open in this process would drop its locks.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with contextlib.closing(sqlite3.connect(path, timeout=_OPEN_SECONDS)) as connection:
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # SQLite's own timeout does not apply to this statement while another process runs the same.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _set_timeouts(connection: Any, record: object) -> None:
    """Set timeouts by statements: connection poolers may refuse them as connection options."""
    connection.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'")
    connection.execute(f"SET statement_timeout = '{_STATEMENT_SECONDS}s'")
    connection.commit()


def _enable_foreign_keys(connection: Any, record: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_transaction(connection: Connection) -> None:
    is_reading = connection.get_execution_options().get("reading")
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
