"""Who is let in, and what is counted, while the database is away, locked or silent."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import make_url, text

from corral.errors import DatabaseError
from corral.serving.accounts import Accounts
from corral.serving.database import Database
from corral.serving.keys import Key, KeyStore, KeyUsage, today
from corral.serving.protocol import Refused
from tests.serving.postgres import PostgreSQL, Proxy
from tests.serving.test_accounts import authenticate, refusal, run, sign_in


class FlakyKeyStore(KeyStore):
    """Keys in a database of which a test says what works: it may be away, unwritable or silent."""

    is_away = False
    is_silent = False
    write_error: Exception | None = None
    blocks_writes = False

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.mended = threading.Event()
        """Ends what is silent or unwritable; set at the end of the test, so that no thread stays behind."""
        self.writes = 0

    def all(self) -> list[Key]:
        if self.is_away:
            raise DatabaseError("the database cannot be used: it is away")
        if self.is_silent:
            self.mended.wait(60)
        return super().all()

    def add_usage(self, day: str, usage: Mapping[str, KeyUsage]) -> None:
        self.writes += 1
        if self.is_away:
            raise DatabaseError("the database cannot be used: it is away")
        if self.blocks_writes:
            assert self.mended.wait(60), "as a file that another program has locked"
        elif self.write_error is not None and not self.mended.is_set():
            raise self.write_error
        super().add_usage(day, usage)


@pytest.fixture
def keys(sqlite: Database) -> Iterator[FlakyKeyStore]:
    store = FlakyKeyStore(sqlite)
    yield store
    store.mended.set()


async def test_known_keys_work_for_a_while_without_the_database_and_then_get_503(
    keys: FlakyKeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0, wait=60.0)
    callers, secret, caller = await sign_in(keys)
    keys.is_away = True
    assert await authenticate(callers, secret) == caller
    run(callers, caller)
    set_seconds(max_age=0.0)
    refused = await refusal(callers, f"Bearer {secret}")
    assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
    assert (await refusal(Accounts(keys), None)).status == 503, "and not: there are no keys"
    keys.is_away = False
    set_seconds(max_age=30.0)
    assert await authenticate(callers, secret) == caller
    await callers.close()
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(1, 1, 2)}, "what was used meanwhile is not lost"


@pytest.mark.parametrize("fault", [DatabaseError("the disk is full"), KeyError("a fault of ours"), None])
async def test_while_writes_fail_keys_are_read_and_no_usage_is_lost(
    fault: Exception | None, keys: FlakyKeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0)
    keys.write_error, keys.blocks_writes = fault, fault is None
    callers, secret, caller = await sign_in(keys)
    run(callers, caller)
    while not keys.writes:
        assert await authenticate(callers, secret) == caller
    # Far longer than a reading takes on a machine that does much else.
    set_seconds(max_age=5.0)
    since = time.monotonic()
    while time.monotonic() < since + 5.5:
        assert await authenticate(callers, secret) == caller
        await asyncio.sleep(0.01)
    keys.revoke("alice")
    while (await asyncio.gather(authenticate(callers, secret), return_exceptions=True))[0] == caller:
        await asyncio.sleep(0.01)
    assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what
    assert callers.usage_today(caller.key_id) == KeyUsage(1, 1, 2)
    keys.mended.set()
    await callers.close()
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(1, 1, 2)}


async def test_an_idle_server_waits_for_reading_keys_but_not_for_writing_usage(
    keys: FlakyKeyStore, set_seconds: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    keys.blocks_writes = True
    callers, secret, caller = await sign_in(keys)
    set_seconds(refresh=60.0)
    run(callers, caller)
    set_seconds(refresh=0.0, max_age=5.0)
    await asyncio.sleep(5.1)
    async with asyncio.timeout(20):  # else it would wait for what is never written
        assert await authenticate(callers, secret) == caller
    assert keys.writes == 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await callers.close()
    assert f"key {caller.key_id} used 1 requests, 1 tokens of prompts and 2 of answers" in caplog.text


async def test_keys_are_read_when_all_threads_and_connections_are_in_use(database: Database) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    over = threading.Event()

    def hold() -> None:
        with contextlib.suppress(DatabaseError), database.read_session() as session:
            session.execute(text("SELECT 1"))
            over.wait(60)

    threads = ThreadPoolExecutor(20)
    asyncio.get_running_loop().set_default_executor(threads)
    for _ in range(40):
        threads.submit(hold)
    try:
        async with asyncio.timeout(20):
            assert (await authenticate(Accounts(keys), secret)).name == "alice"
    finally:
        over.set()


async def test_a_database_that_does_not_respond_does_not_delay_known_keys(
    keys: FlakyKeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0)
    callers, secret, caller = await sign_in(keys)
    keys.is_silent = True
    set_seconds(wait=0.1)
    async with asyncio.timeout(20):  # else it would wait for ever
        for _ in range(50):
            assert await authenticate(callers, secret) == caller
    keys.is_silent = False
    keys.revoke("alice")
    keys.mended.set()
    set_seconds(wait=60.0)
    await asyncio.sleep(0.1)
    assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what


async def test_a_hanging_read_of_the_keys_times_out_and_the_next_one_succeeds(
    keys: FlakyKeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0)
    callers, secret, _ = await sign_in(keys)
    keys.is_silent = True
    set_seconds(read=0.5, max_age=0.0)
    async with asyncio.timeout(20):
        refused = await refusal(callers, f"Bearer {secret}")
        assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
        keys.is_silent = False
        set_seconds(read=20.0, max_age=30.0)
        assert (await authenticate(callers, secret)).name == "alice"
    assert not keys.mended.is_set(), "the first still hangs"


@pytest.mark.full
async def test_connections_that_stop_responding_are_replaced(
    postgres: PostgreSQL, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0)
    url = make_url(postgres.new_database())
    with Proxy(url.port or 0) as proxy:
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        with contextlib.closing(Database(through)) as database:
            keys = KeyStore(database)
            callers, secret, caller = await sign_in(keys)
            proxy.silence()
            set_seconds(read=1.0, max_age=0.5)
            await asyncio.sleep(0.6)
            statuses, outcome = [503], None
            async with asyncio.timeout(30):
                while statuses[-1] == 503:
                    (outcome,) = await asyncio.gather(authenticate(callers, secret), return_exceptions=True)
                    statuses.append(outcome.status if isinstance(outcome, Refused) else 200)
            assert outcome == caller
            assert statuses.count(503) > 1, "the old connections were silent"
