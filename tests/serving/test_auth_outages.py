"""Who is let in, and what is counted, while the database is away, locked or silent."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from corral.errors import DatabaseError
from corral.serving import auth as module
from corral.serving.api_keys import Key, KeyStore, KeyUsage, today
from corral.serving.auth import Accounts
from corral.serving.database import Database
from corral.serving.generation import count_usage
from corral.serving.protocol import Refused
from tests.serving.postgres import PostgreSQL, Proxy
from tests.serving.test_auth import Counted, refusal, run, use


class Away(KeyStore):
    """A database that can be unplugged."""

    away = False

    def all(self) -> list[Key]:
        self._look()
        return super().all()

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        self._look()
        super().add_usage(day, usage)

    def _look(self) -> None:
        if self.away:
            raise DatabaseError("the database cannot be used: it is away")


def test_known_keys_work_for_a_while_without_the_database_and_then_get_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(module, "_WAIT_SECONDS", 60.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Away(database)
        key, secret = keys.add("alice")

        async def work() -> None:
            callers = Accounts(keys)
            caller = await callers.authenticate(f"Bearer {secret}")
            keys.away = True
            assert await callers.authenticate(f"Bearer {secret}") == caller
            counted = Counted(count_usage(1, 2))
            use(callers, caller, counted)
            monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 0.0)
            refused = await refusal(callers, f"Bearer {secret}")
            assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
            assert (await refusal(Accounts(keys), None)).status == 503, "and not: there are no keys"
            keys.away = False
            monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 30.0)
            assert await callers.authenticate(f"Bearer {secret}") == caller
            await callers.close()
            assert keys.usage_on(today()) == {key.id: KeyUsage(1, 1, 2)}, "what was used meanwhile is not lost"

        run(work)


class Unwritable(KeyStore):
    """A database that can be read, and where nothing can be written until it is mended."""

    def __init__(self, database: Database, fault: Exception | None) -> None:
        super().__init__(database)
        self.mended = threading.Event()
        self._fault = fault
        self.tried = 0

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        self.tried += 1
        if self._fault is None:
            assert self.mended.wait(60), "as a file that another program has locked"
        elif not self.mended.is_set():
            raise self._fault
        super().add_usage(day, usage)


@pytest.mark.parametrize("fault", [DatabaseError("the disk is full"), KeyError("a fault of ours"), None])
def test_while_writes_fail_keys_are_read_and_no_usage_is_lost(
    fault: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Unwritable(database, fault)
        alice, secret = keys.add("alice")

        async def work() -> None:
            callers = Accounts(keys)
            caller = await callers.authenticate(f"Bearer {secret}")
            use(callers, caller, Counted(count_usage(1, 2)))
            while not keys.tried:
                assert await callers.authenticate(f"Bearer {secret}") == caller
            # Far longer than a reading takes on a machine that does much else.
            monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 5.0)
            since = time.monotonic()
            while time.monotonic() < since + 5.5:
                assert await callers.authenticate(f"Bearer {secret}") == caller
                await asyncio.sleep(0.01)
            keys.revoke("alice")
            while (await asyncio.gather(callers.authenticate(f"Bearer {secret}"), return_exceptions=True))[0] == caller:
                await asyncio.sleep(0.01)
            assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what
            assert callers.usage_today(caller.key_id) == KeyUsage(1, 1, 2)
            keys.mended.set()
            await callers.close()
            assert keys.usage_on(today()) == {alice.id: KeyUsage(1, 1, 2)}

        try:
            run(work)
        finally:
            keys.mended.set()


def test_an_idle_server_waits_for_reading_keys_but_not_for_writing_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Unwritable(database, None)
        alice, secret = keys.add("alice")

        async def work() -> None:
            callers = Accounts(keys)
            caller = await callers.authenticate(f"Bearer {secret}")
            monkeypatch.setattr(module, "_REFRESH_SECONDS", 60.0)
            use(callers, caller, Counted(count_usage(1, 2)))
            monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
            monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 5.0)
            await asyncio.sleep(5.1)
            async with asyncio.timeout(20):  # else it would wait for what is never written
                assert await callers.authenticate(f"Bearer {secret}") == caller
            assert keys.tried == 1
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await callers.close()
            assert f"key {alice.id} used 1 requests, 1 tokens of prompts and 2 of answers" in caplog.text

        try:
            run(work)
        finally:
            keys.mended.set()


def test_keys_are_read_when_all_threads_and_connections_are_in_use(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    over = threading.Event()

    def hold() -> None:
        with contextlib.suppress(DatabaseError), database.read_session() as session:
            session.execute(text("SELECT 1"))
            over.wait(60)

    async def work() -> None:
        threads = ThreadPoolExecutor(20)
        asyncio.get_running_loop().set_default_executor(threads)
        for _ in range(40):
            threads.submit(hold)
        try:
            async with asyncio.timeout(20):
                assert (await Accounts(keys).authenticate(f"Bearer {secret}")).name == "alice"
        finally:
            over.set()

    run(work)


class Silent(KeyStore):
    """A database that takes questions and does not answer, while `silent`."""

    silent = False

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.over = threading.Event()

    def all(self) -> list[Key]:
        if self.silent:
            self.over.wait(60)
        return super().all()


def test_a_database_that_does_not_respond_does_not_delay_known_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Silent(database)
        _, secret = keys.add("alice")

        async def work() -> None:
            callers = Accounts(keys)
            caller = await callers.authenticate(f"Bearer {secret}")
            keys.silent = True
            monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
            async with asyncio.timeout(20):  # else it would wait for ever
                for _ in range(50):
                    assert await callers.authenticate(f"Bearer {secret}") == caller
            keys.silent = False
            keys.revoke("alice")
            keys.over.set()
            monkeypatch.setattr(module, "_WAIT_SECONDS", 60.0)
            await asyncio.sleep(0.1)
            assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what

        try:
            run(work)
        finally:
            keys.over.set()


def test_a_hanging_read_of_the_keys_times_out_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Silent(database)
        _, secret = keys.add("alice")

        async def work() -> None:
            callers = Accounts(keys)
            await callers.authenticate(f"Bearer {secret}")
            keys.silent = True
            monkeypatch.setattr(module, "_READ_SECONDS", 0.5)
            monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 0.0)
            async with asyncio.timeout(20):
                refused = await refusal(callers, f"Bearer {secret}")
                assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
                keys.silent = False
                monkeypatch.setattr(module, "_READ_SECONDS", 20.0)
                monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 30.0)
                assert (await callers.authenticate(f"Bearer {secret}")).name == "alice"
            assert not keys.over.is_set(), "the first still hangs"

        try:
            run(work)
        finally:
            keys.over.set()


@pytest.mark.full
def test_connections_that_stop_responding_are_replaced(postgres: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFRESH_SECONDS", 0.0)
    url = make_url(postgres.new_database())
    with Proxy(url.port or 0) as proxy:
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        with contextlib.closing(Database(through)) as database:
            keys = KeyStore(database)
            _, secret = keys.add("alice")

            async def work() -> None:
                callers = Accounts(keys)
                caller = await callers.authenticate(f"Bearer {secret}")
                proxy.silence()
                monkeypatch.setattr(module, "_READ_SECONDS", 1.0)
                monkeypatch.setattr(module, "_MAX_AGE_SECONDS", 0.5)
                await asyncio.sleep(0.6)
                statuses = [503]
                async with asyncio.timeout(30):
                    while statuses[-1] == 503:
                        found = (
                            await asyncio.gather(callers.authenticate(f"Bearer {secret}"), return_exceptions=True)
                        )[0]
                        statuses.append(found.status if isinstance(found, Refused) else 200)
                assert found == caller
                assert statuses.count(503) > 1, "the old connections were silent"

            run(work)
