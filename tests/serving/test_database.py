"""A server's database: for its owner alone, with the declared tables, opened by several at once, refused clearly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, make_url, text

from corral.errors import DatabaseError, MissingExtraError
from corral.serving import database as module
from corral.serving import keys, store
from corral.serving.database import VERSION_TABLE, Base, Database, default_url, run_in_thread
from corral.serving.store import StoredConversation
from tests.conftest import unprivileged
from tests.serving.postgres import PostgreSQL

TABLES = {store.StoredConversation.__tablename__, keys.Key.__tablename__}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'server.db'}"


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of databases that are opened from now on, for a lock or a connection."""
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)


def open_error(url: str) -> DatabaseError:
    with pytest.raises(DatabaseError) as caught:
        Database(url)
    return caught.value


def differences(url: str) -> list[Any]:
    """Between what the migrations make and what the code declares."""
    with create_engine(make_url(url)).connect() as connection:
        assert set(inspect(connection).get_table_names()) > TABLES
        return compare_metadata(
            MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}), Base.metadata
        )


def conversation(owner: str = "k", number: int = 0) -> StoredConversation:
    return StoredConversation(id=f"conv_{number:032x}", owner=owner, created_at=1, labels={})


def test_a_new_file_and_its_folder_are_readable_only_by_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    database = Database(f"sqlite:///{folder / 'server.db'}")
    with database.write_session() as session:
        session.add(conversation())
    files = sorted(folder.iterdir())
    assert len(files) == 3, "the file, its log, and the log's index"
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    database.close()


def test_the_default_is_a_file_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    Database(default_url()).close()
    assert (tmp_path / "data" / "corral" / "server.db").is_file()
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/.local/share/corral/server.db"


def test_the_migrated_schema_equals_the_declared_tables(url: str) -> None:
    Database(url).close()
    assert differences(url) == []


@pytest.mark.parametrize("version", ["9999", "0003"], ids=["newer", "from before the first release"])
def test_a_database_of_another_version_is_refused_by_name_and_unchanged(version: str, url: str) -> None:
    Database(url).close()
    with contextlib.closing(sqlite3.connect(make_url(url).database or "")) as connection, connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")
    error = open_error(url)
    assert "another version" in error.what
    assert repr(version) in error.what
    assert "server.db" in str(error.where)
    assert "another database" in str(error.hint)
    with contextlib.closing(sqlite3.connect(make_url(url).database or "")) as connection:
        assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall() == [(version,)]


def open_in_processes(url: str, count: int, go: Path) -> list[str]:
    """What processes say that all open a database as soon as there is a file `go`."""
    code = (
        "import sys, time, pathlib\n"
        "from corral.serving.database import Database\n"
        "print('ready', flush=True)\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        "Database(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, url, str(go)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    go.touch()
    return [child.communicate()[1] for child in children]


def test_processes_that_open_a_new_database_at_once_wait_for_each_other(url: str, tmp_path: Path) -> None:
    assert open_in_processes(url, 4, tmp_path / "go") == [""] * 4
    assert differences(url) == []


BAD: dict[str, tuple[str, str]] = {
    "no URL": ("not a url: secret", "not the URL"),
    "a port that is none": ("postgresql://me:secret@localhost:port/db", "not the URL"),
    "another kind": ("mysql://me:secret@localhost/db", "'mysql'"),
    "in memory": ("sqlite://", "is a file"),
    "in memory, by name": ("sqlite:///:memory:", "is a file"),
    "with more behind": ("sqlite:///a.db?mode=secret", "is a file"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_database_url_is_refused_without_its_password(case: str) -> None:
    url, words = BAD[case]
    error = open_error(url)
    assert words in error.what
    assert error.hint
    assert "postgresql://" in error.hint
    assert "secret" not in str(error)


def test_a_file_that_is_not_a_database_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, and no database at all. " * 100)
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder"):
        error = open_error(f"sqlite:///{tmp_path / name}")
        assert "database" in error.what
        assert name in str(error.where)
    assert (tmp_path / "notes.txt").read_text().startswith("these are notes")


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    with unprivileged(tmp_path):
        error = open_error(f"sqlite:///{tmp_path / 'new' / 'server.db'}")
    assert "ermission" in error.what
    assert "written" in str(error.hint)


def test_an_unreachable_server_is_an_error_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    # The second password is a word that the driver says by chance.
    for url in (f"postgresql://me:secret@{address}/db", f"postgresql://{address}/db?user=me&password=failed"):
        error = open_error(url)
        assert "refused" in error.what
        assert f"{address}/db" in str(error.where)
        assert "secret" not in str(error)
        assert "failed" not in str(error) or "secret" in url


def test_a_missing_driver_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match="psycopg") as caught:
        Database("postgresql://localhost/db")
    assert caught.value.hint == 'pip install "corral[postgres]"'


def test_a_failed_transaction_is_rolled_back(sqlite: Database) -> None:
    def fail() -> None:
        with sqlite.write_session() as session:
            session.add(conversation())
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with sqlite.write_session() as session:
        assert session.query(StoredConversation).count() == 0


def test_writers_wait_for_each_other_and_readers_do_not_wait(sqlite: Database) -> None:
    with sqlite.write_session() as session:
        session.add(conversation())

    def count() -> None:
        for _ in range(25):
            with sqlite.write_session() as session:
                row = session.query(StoredConversation).one()
                row.items += 1

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite.write_session() as writer:
        writer.query(StoredConversation).one().items += 1
        writer.flush()
        with sqlite.read_session() as reader:
            assert reader.query(StoredConversation).one().items == 75, "what was committed, at once"


@pytest.mark.usefixtures("short_waits")
def test_writing_a_file_locked_by_another_program_fails_and_reading_works(url: str, sqlite: Database) -> None:
    with contextlib.closing(sqlite3.connect(make_url(url).database or "", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for each in (sqlite, sqlite.with_own_connections()):
            with pytest.raises(DatabaseError, match="locked"), each.write_session() as session:
                session.execute(text("SELECT 1"))
            with each.read_session() as session:
                assert session.query(StoredConversation).count() == 0


@pytest.mark.usefixtures("short_waits")
def test_waiting_for_a_transaction_of_the_same_process_times_out(sqlite: Database) -> None:
    with sqlite.write_session():
        since = time.monotonic()
        with pytest.raises(DatabaseError, match="locked"), sqlite.write_session():
            pass
        assert time.monotonic() - since < 15


@pytest.mark.usefixtures("short_waits")
def test_a_separate_pool_has_connections_when_all_others_are_in_use(sqlite: Database) -> None:
    apart = sqlite.with_own_connections()

    def count(pool: Database) -> int:
        with pool.read_session() as session:
            return session.query(StoredConversation).count()

    with contextlib.ExitStack() as taken:
        for _ in range(15):
            taken.enter_context(sqlite.read_session()).execute(text("SELECT 1"))
        with pytest.raises(DatabaseError):
            count(sqlite)
        assert count(apart) == 0
    assert count(sqlite) == 0


async def test_run_in_thread_starts_at_once_and_raises_the_calls_exception() -> None:
    meet = threading.Barrier(40)
    async with asyncio.timeout(30):  # else they would wait for each other's threads
        assert sorted(await asyncio.gather(*(run_in_thread(meet.wait) for _ in range(40)))) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 1, 0)


def test_a_process_ends_while_a_database_call_hangs() -> None:
    code = (
        "import asyncio, threading\n"
        "from corral.serving.database import run_in_thread\n"
        "async def work():\n"
        "    asyncio.create_task(run_in_thread(threading.Event().wait))\n"
        "    await asyncio.sleep(0.1)\n"
        "asyncio.run(work())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_full_disk_is_reported_as_an_error(sqlite: Database) -> None:
    def fill() -> None:
        with sqlite.write_session() as session:
            session.execute(text("PRAGMA max_page_count = 1"))
            session.add_all(conversation(number=number) for number in range(2000))

    with pytest.raises(DatabaseError, match="full"):
        fill()
    with sqlite.read_session() as session:
        assert session.query(StoredConversation).count() == 0


@pytest.mark.full
def test_postgresql_is_migrated_like_sqlite(postgres: PostgreSQL, tmp_path: Path) -> None:
    url = postgres.new_database()
    assert open_in_processes(url, 4, tmp_path / "go") == [""] * 4
    assert differences(url) == []


@pytest.mark.full
def test_a_refused_postgresql_login_does_not_show_the_password(postgres: PostgreSQL) -> None:
    url = make_url(postgres.new_database())
    wrong = url.set(password="not-this-one").render_as_string(hide_password=False)
    assert "password" in open_error(wrong).what
    assert "not-this-one" not in str(open_error(wrong))
    nowhere = url.set(database="nowhere").render_as_string(hide_password=False)
    assert "nowhere" in open_error(nowhere).what
    assert str(url.password) not in str(open_error(nowhere))


@pytest.mark.full
def test_a_postgresql_connection_has_a_time_limit_for_every_wait(postgres: PostgreSQL) -> None:
    with contextlib.closing(Database(postgres.new_database() + "?tcp_user_timeout=7000")) as database:
        with database.write_session() as session:
            assert session.scalar(text("SHOW statement_timeout")) == "20s"
            assert session.scalar(text("SHOW lock_timeout")) == "5s"
            driver: Any = session.connection().connection.driver_connection
            parameters = driver.info.get_parameters()
            assert parameters["tcp_user_timeout"] == "7000", "what the URL says counts"
            assert (parameters["connect_timeout"], parameters["keepalives_idle"]) == ("5", "5")
            session.rollback()
        with database.read_session() as session:
            assert session.scalar(text("SHOW statement_timeout")) == "20s"


@pytest.mark.full
def test_a_restarted_postgresql_is_used_again(postgres: PostgreSQL) -> None:
    database = Database(postgres.new_database())
    with database.write_session() as session:
        session.add(conversation())
    postgres.stop()
    with pytest.raises(DatabaseError) as caught, database.read_session() as session:
        session.query(StoredConversation).count()
    assert postgres.password not in str(caught.value)
    postgres.start()
    with database.read_session() as session:
        assert session.query(StoredConversation).count() == 1
    database.close()
