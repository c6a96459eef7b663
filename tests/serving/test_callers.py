"""Who is let in, and what a key may still use, as a server knows it that reads its database now and then."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from corral.errors import DatabaseError
from corral.serving import callers as module
from corral.serving.admission import Busy
from corral.serving.answering import usage
from corral.serving.callers import ANYBODY, Caller, Callers, Window
from corral.serving.database import Database
from corral.serving.keys import Key, Keys, Quota, Used, today
from corral.serving.protocol import Refused, Usage
from tests.serving.postgres import PostgreSQL, Proxy


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        yield Keys(database)


@dataclass
class Counted:
    usage: Usage


def use(callers: Callers, caller: Caller, counted: Counted) -> None:
    """A request from its beginning to its end."""
    callers.admit(caller)
    callers.began(caller, counted)
    callers.left(caller, counted)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


async def refusal(callers: Callers, authorization: str | None) -> Refused:
    with pytest.raises(Refused) as caught:
        await callers.identify(authorization)
    return caught.value


def test_without_a_database_and_without_keys_anybody_may_ask(keys: Keys) -> None:
    async def work() -> None:
        for callers in (Callers(), Callers(keys)):
            assert await callers.identify(None) == ANYBODY
            assert await callers.identify("Bearer none") == ANYBODY

    run(work)


def test_with_keys_only_a_key_opens(keys: Keys) -> None:
    alice, secret = keys.add("alice")
    bob, other = keys.add("bob", Quota(at_once=3))

    async def work() -> None:
        callers = Callers(keys)
        assert await callers.identify(f"Bearer {secret}") == Caller(alice.id, "alice")
        assert await callers.identify(f"bearer  {other}") == Caller(bob.id, "bob", Quota(at_once=3))
        wrong = f"corral_{alice.id}_{'A' * 43}"
        for header in (None, "", secret, f"Basic {secret}", "Bearer", "Bearer none", f"Bearer {wrong}", "Bearer \xff"):
            refused = await refusal(callers, header)
            assert (refused.status, refused.code) == (401, "invalid_api_key")
            assert wrong not in refused.what

    run(work)


def test_a_revoked_key_stops_within_seconds_and_the_door_stays_locked(keys: Keys) -> None:
    _, secret = keys.add("alice")

    async def work() -> None:
        callers = Callers(keys)
        await callers.identify(f"Bearer {secret}")
        keys.revoke("alice")
        since = time.monotonic()
        while time.monotonic() < since + 5:
            with contextlib.suppress(Refused):
                await callers.identify(f"Bearer {secret}")
                await asyncio.sleep(0.05)
                continue
            break
        assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what
        assert (await refusal(callers, None)).status == 401, "no key is left, and anybody is still refused"

    run(work)


def test_a_server_that_was_idle_lets_nobody_in_on_old_knowledge(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = keys.add("alice")

    async def work() -> None:
        callers = Callers(keys)
        await callers.identify(f"Bearer {secret}")
        keys.revoke("alice")
        monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
        monkeypatch.setattr(module, "_PATIENT_SECONDS", 60.0)
        found = await asyncio.gather(*(callers.identify(f"Bearer {secret}") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(each, Refused) and each.status == 401 for each in found), found

    run(work)


def test_an_expired_key_is_told_so(keys: Keys) -> None:
    _, secret = keys.add("alice", expires=int(time.time()) - 1)

    async def work() -> None:
        assert "expired" in (await refusal(Callers(keys), f"Bearer {secret}")).what

    run(work)


class Away(Keys):
    """A database that can be unplugged."""

    away = False

    def all(self) -> list[Key]:
        self._look()
        return super().all()

    def count(self, day: str, used: Mapping[str, Used]) -> None:
        self._look()
        super().count(day, used)

    def _look(self) -> None:
        if self.away:
            raise DatabaseError("the database cannot be used: it is away")


def test_a_database_that_is_away_is_forgiven_for_a_while_and_then_nobody_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(module, "_PATIENT_SECONDS", 60.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Away(database)
        key, secret = keys.add("alice")

        async def work() -> None:
            callers = Callers(keys)
            caller = await callers.identify(f"Bearer {secret}")
            keys.away = True
            assert await callers.identify(f"Bearer {secret}") == caller
            counted = Counted(usage(1, 2))
            use(callers, caller, counted)
            monkeypatch.setattr(module, "_STALE_SECONDS", 0.0)
            refused = await refusal(callers, f"Bearer {secret}")
            assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
            assert (await refusal(Callers(keys), None)).status == 503, "and not: there are no keys"
            keys.away = False
            monkeypatch.setattr(module, "_STALE_SECONDS", 30.0)
            assert await callers.identify(f"Bearer {secret}") == caller
            await callers.close()
            assert keys.used(today()) == {key.id: Used(1, 1, 2)}, "what was used meanwhile is not lost"

        run(work)


class Unwritable(Keys):
    """A database that can be read, and where nothing can be written until it is mended."""

    def __init__(self, database: Database, fault: Exception | None) -> None:
        super().__init__(database)
        self.mended = threading.Event()
        self._fault = fault
        self.tried = 0

    def count(self, day: str, used: Mapping[str, Used]) -> None:
        self.tried += 1
        if self._fault is None:
            assert self.mended.wait(60), "as a file that another program has locked"
        elif not self.mended.is_set():
            raise self._fault
        super().count(day, used)


@pytest.mark.parametrize("fault", [DatabaseError("the disk is full"), KeyError("a fault of ours"), None])
def test_while_nothing_can_be_written_keys_are_read_and_nothing_used_is_lost(
    fault: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Unwritable(database, fault)
        alice, secret = keys.add("alice")

        async def work() -> None:
            callers = Callers(keys)
            caller = await callers.identify(f"Bearer {secret}")
            use(callers, caller, Counted(usage(1, 2)))
            while not keys.tried:
                assert await callers.identify(f"Bearer {secret}") == caller
            monkeypatch.setattr(module, "_STALE_SECONDS", 1.0)
            since = time.monotonic()
            while time.monotonic() < since + 1.5:
                assert await callers.identify(f"Bearer {secret}") == caller
                await asyncio.sleep(0.01)
            keys.revoke("alice")
            while (await asyncio.gather(callers.identify(f"Bearer {secret}"), return_exceptions=True))[0] == caller:
                await asyncio.sleep(0.01)
            assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what
            assert callers.used_today(caller.key) == Used(1, 1, 2)
            keys.mended.set()
            await callers.close()
            assert keys.used(today()) == {alice.id: Used(1, 1, 2)}

        try:
            run(work)
        finally:
            keys.mended.set()


def test_a_server_that_was_idle_waits_for_the_keys_and_not_for_what_is_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Unwritable(database, None)
        alice, secret = keys.add("alice")

        async def work() -> None:
            callers = Callers(keys)
            caller = await callers.identify(f"Bearer {secret}")
            monkeypatch.setattr(module, "_FRESH_SECONDS", 60.0)
            use(callers, caller, Counted(usage(1, 2)))
            monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
            monkeypatch.setattr(module, "_STALE_SECONDS", 2.0)
            await asyncio.sleep(2.1)
            async with asyncio.timeout(20):  # else it would wait for what is never written
                assert await callers.identify(f"Bearer {secret}") == caller
            assert keys.tried == 1
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await callers.close()
            assert f"key {alice.id} used 1 requests, 1 tokens of prompts and 2 of answers" in caplog.text

        try:
            run(work)
        finally:
            keys.mended.set()


def test_keys_are_read_though_all_threads_and_connections_are_taken(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(database)
    _, secret = keys.add("alice")
    over = threading.Event()

    def hold() -> None:
        with contextlib.suppress(DatabaseError), database.reading() as session:
            session.execute(text("SELECT 1"))
            over.wait(60)

    async def work() -> None:
        threads = ThreadPoolExecutor(20)
        asyncio.get_running_loop().set_default_executor(threads)
        for _ in range(40):
            threads.submit(hold)
        try:
            async with asyncio.timeout(20):
                assert (await Callers(keys).identify(f"Bearer {secret}")).name == "alice"
        finally:
            over.set()

    run(work)


def test_the_door_stays_locked_when_the_database_is_emptied(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(module, "_PATIENT_SECONDS", 60.0)
    _, secret = keys.add("alice")

    async def work() -> None:
        callers = Callers(keys)
        await callers.identify(f"Bearer {secret}")
        monkeypatch.setattr(keys, "all", list[Key])
        for header in (None, f"Bearer {secret}"):
            assert (await refusal(callers, header)).status == 401
        assert await Callers(keys).identify(None) == ANYBODY
        told = Callers(keys)
        told.is_locked = True
        assert (await refusal(told, None)).status == 401

    run(work)


class Silent(Keys):
    """A database that takes questions and does not answer, while `silent`."""

    silent = False

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.over = threading.Event()

    def all(self) -> list[Key]:
        if self.silent:
            self.over.wait(60)
        return super().all()


def test_a_database_that_is_silent_delays_nobody_whom_the_server_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Silent(database)
        _, secret = keys.add("alice")

        async def work() -> None:
            callers = Callers(keys)
            caller = await callers.identify(f"Bearer {secret}")
            keys.silent = True
            monkeypatch.setattr(module, "_PATIENT_SECONDS", 0.1)
            async with asyncio.timeout(20):  # else it would wait for ever
                for _ in range(50):
                    assert await callers.identify(f"Bearer {secret}") == caller
            keys.silent = False
            keys.revoke("alice")
            keys.over.set()
            monkeypatch.setattr(module, "_PATIENT_SECONDS", 60.0)
            await asyncio.sleep(0.1)
            assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what

        try:
            run(work)
        finally:
            keys.over.set()


def test_a_reading_that_hangs_is_given_up_and_the_next_one_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        keys = Silent(database)
        _, secret = keys.add("alice")

        async def work() -> None:
            callers = Callers(keys)
            await callers.identify(f"Bearer {secret}")
            keys.silent = True
            monkeypatch.setattr(module, "_READ_SECONDS", 0.5)
            monkeypatch.setattr(module, "_STALE_SECONDS", 0.0)
            async with asyncio.timeout(20):
                refused = await refusal(callers, f"Bearer {secret}")
                assert (refused.status, refused.code, refused.retry_seconds) == (503, "database_unavailable", 1)
                keys.silent = False
                monkeypatch.setattr(module, "_READ_SECONDS", 20.0)
                monkeypatch.setattr(module, "_STALE_SECONDS", 30.0)
                assert (await callers.identify(f"Bearer {secret}")).name == "alice"
            assert not keys.over.is_set(), "the first still hangs"

        try:
            run(work)
        finally:
            keys.over.set()


@pytest.mark.full
def test_connections_that_fall_silent_are_left_for_new_ones(
    postgres: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    url = make_url(postgres.new_database())
    with Proxy(url.port or 0) as proxy:
        through = url.set(port=proxy.port).render_as_string(hide_password=False)
        with contextlib.closing(Database(through)) as database:
            keys = Keys(database)
            _, secret = keys.add("alice")

            async def work() -> None:
                callers = Callers(keys)
                caller = await callers.identify(f"Bearer {secret}")
                proxy.silence()
                monkeypatch.setattr(module, "_READ_SECONDS", 1.0)
                monkeypatch.setattr(module, "_STALE_SECONDS", 0.5)
                await asyncio.sleep(0.6)
                statuses = [503]
                async with asyncio.timeout(30):
                    while statuses[-1] == 503:
                        found = (await asyncio.gather(callers.identify(f"Bearer {secret}"), return_exceptions=True))[0]
                        statuses.append(found.status if isinstance(found, Refused) else 200)
                assert found == caller
                assert statuses.count(503) > 1, "the old connections were silent"

            run(work)


def test_tokens_of_a_day_are_counted_with_those_under_way_and_by_all_servers(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(module, "_PATIENT_SECONDS", 60.0)
    _, secret = keys.add("alice", Quota(tokens_per_day=100))

    async def work() -> None:
        one, other = Callers(keys), Callers(keys)
        caller = await one.identify(f"Bearer {secret}")
        work = Counted(usage(10, 0))
        one.admit(caller)
        one.began(caller, work)
        one.admit(caller)
        work.usage = usage(10, 90)
        with pytest.raises(Busy) as caught:
            one.admit(caller)
        assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
        assert 0 < (caught.value.retry_seconds or 0) <= 86400
        other.admit(await other.identify(f"Bearer {secret}"))
        work.usage = usage(10, 95)
        one.left(caller, work)
        assert one.used_today(caller.key) == Used(1, 10, 95)
        await one.close()
        assert one.used_today(caller.key) == Used(1, 10, 95), "written, and counted once"
        assert keys.used(today()) == {caller.key: Used(1, 10, 95)}
        with pytest.raises(Busy):
            other.admit(await other.identify(f"Bearer {secret}"))

    run(work)


def test_what_was_used_is_written_within_seconds_though_nobody_asks_again(keys: Keys) -> None:
    _, secret = keys.add("alice")

    async def work() -> None:
        callers = Callers(keys)
        caller = await callers.identify(f"Bearer {secret}")
        for _ in range(50):
            counted = Counted(usage(1, 2))
            use(callers, caller, counted)
        while not keys.used(today()):
            await asyncio.sleep(0.05)
        assert keys.used(today()) == {caller.key: Used(50, 50, 100)}

    run(work)


def test_requests_at_once_and_a_minute_are_bounded_and_what_found_no_place_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("corral.serving.callers.time.monotonic", lambda: clock[0])
    callers = Callers()
    caller = Caller("k", "alice", Quota(requests_per_minute=2, at_once=3))

    def retry(seconds_each: float = 0.0) -> int | None:
        try:
            callers.came(caller)
            callers.admit(caller, seconds_each)
        except Busy as busy:
            return busy.retry_seconds if (busy.status, busy.code) == (429, "rate_limit_exceeded") else None
        return None

    assert retry() is None
    callers.turned_away(caller)
    callers.left(caller, None)
    assert retry() is None
    clock[0] += 20
    assert retry() is None
    assert retry() == 40
    clock[0] += 40
    assert retry() is None, "what it said was true"
    clock[0] += 60
    assert retry() == 1, "three are under way"
    assert retry(seconds_each=30) == 10, "one of the three ends in that time"
    callers.left(caller, None)
    clock[0] += 60
    assert retry() is None


def test_a_window_is_the_last_sixty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window()
    assert window.seconds_until(1) == 0
    window.take_back()
    for _ in range(3):
        window.add()
    assert window.seconds_until(4) == 0
    assert 59 < window.seconds_until(3) <= 60
    monkeypatch.setattr("corral.serving.callers.time.monotonic", lambda: 10.0**9)
    assert window.seconds_until(1) == 0
    window.add()
    assert window.seconds_until(1) == 60, "the old ones are forgotten"


def test_who_has_no_key_is_not_counted_by_key() -> None:
    async def work() -> None:
        callers = Callers()
        counted = Counted(usage(1, 1))
        for _ in range(1000):
            callers.admit(ANYBODY)
        use(callers, ANYBODY, counted)
        await callers.close()

    run(work)
