"""Who is let in, and what a key may still use, as a server knows it that reads its database now and then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import pytest

from corral.serving.accounts import ANONYMOUS, Accounts, Caller, RateWindow
from corral.serving.errors import Refused
from corral.serving.generation import count_usage
from corral.serving.keys import Key, KeyStore, KeyUsage, Quota, today


class RunningRequest:
    """A request that used so many tokens until now."""

    def __init__(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.usage = count_usage(prompt_tokens, completion_tokens)

    def run(self, callers: Accounts, caller: Caller) -> None:
        """Go from its beginning to its end."""
        callers.admit(caller)
        callers.started(caller, self)
        callers.finished(caller, self)


async def authenticate(callers: Accounts, secret: str) -> Caller:
    return await callers.authenticate(f"Bearer {secret}")


async def sign_in(keys: KeyStore) -> tuple[Accounts, str, Caller]:
    """The callers of a server with these keys, a new key, and who sends it."""
    _, secret = keys.add("alice")
    callers = Accounts(keys)
    return callers, secret, await authenticate(callers, secret)


async def refusal(callers: Accounts, authorization: str | None) -> Refused:
    with pytest.raises(Refused) as caught:
        await callers.authenticate(authorization)
    return caught.value


async def test_without_a_database_or_keys_every_request_is_accepted(keys: KeyStore) -> None:
    for callers in (Accounts(), Accounts(keys)):
        assert await callers.authenticate(None) == ANONYMOUS
        assert await callers.authenticate("Bearer none") == ANONYMOUS


async def test_with_keys_only_requests_with_a_valid_key_are_accepted(keys: KeyStore) -> None:
    alice, secret = keys.add("alice")
    bob, other = keys.add("bob", Quota(at_once=3))
    callers = Accounts(keys)
    assert await authenticate(callers, secret) == Caller(alice.id, "alice")
    assert await callers.authenticate(f"bearer  {other}") == Caller(bob.id, "bob", Quota(at_once=3))
    wrong = f"corral_{alice.id}_{'A' * 43}"
    for header in (None, "", secret, f"Basic {secret}", "Bearer", "Bearer none", f"Bearer {wrong}", "Bearer \xff"):
        refused = await refusal(callers, header)
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert wrong not in refused.what


async def test_a_revoked_key_stops_within_seconds_and_keys_stay_required(keys: KeyStore) -> None:
    callers, secret, _ = await sign_in(keys)
    keys.revoke("alice")
    since = time.monotonic()
    while time.monotonic() < since + 5:
        with contextlib.suppress(Refused):
            await authenticate(callers, secret)
            await asyncio.sleep(0.05)
            continue
        break
    assert "revoked" in (await refusal(callers, f"Bearer {secret}")).what
    assert (await refusal(callers, None)).status == 401, "no key is left, and anybody is still refused"


async def test_an_idle_server_reads_the_keys_again_before_accepting_one(
    keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    callers, secret, _ = await sign_in(keys)
    keys.revoke("alice")
    set_seconds(refresh=0.0, wait=60.0)
    outcomes = await asyncio.gather(*(authenticate(callers, secret) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(each, Refused) and each.status == 401 for each in outcomes), outcomes


async def test_an_expired_key_is_refused_as_expired(keys: KeyStore) -> None:
    _, secret = keys.add("alice", expires=int(time.time()) - 1)
    assert "expired" in (await refusal(Accounts(keys), f"Bearer {secret}")).what


async def test_keys_stay_required_when_the_database_is_emptied(
    keys: KeyStore, set_seconds: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_seconds(refresh=0.0, wait=60.0)
    callers, secret, _ = await sign_in(keys)
    monkeypatch.setattr(keys, "all", list[Key])
    for header in (None, f"Bearer {secret}"):
        assert (await refusal(callers, header)).status == 401
    assert await Accounts(keys).authenticate(None) == ANONYMOUS
    keyless = Accounts(keys)
    keyless.requires_key = True
    assert (await refusal(keyless, None)).status == 401


async def test_daily_tokens_include_running_requests_and_all_servers(
    keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0, wait=60.0)
    _, secret = keys.add("alice", Quota(tokens_per_day=100))
    one, other = Accounts(keys), Accounts(keys)
    caller = await authenticate(one, secret)
    request = RunningRequest(10, 0)
    one.admit(caller)
    one.started(caller, request)
    one.admit(caller)
    request.usage = count_usage(10, 90)
    with pytest.raises(Refused) as caught:
        one.admit(caller)
    assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
    assert 0 < (caught.value.retry_seconds or 0) <= 86400
    other.admit(await authenticate(other, secret))
    request.usage = count_usage(10, 95)
    one.finished(caller, request)
    assert one.usage_today(caller.key_id) == KeyUsage(1, 10, 95)
    await one.close()
    assert one.usage_today(caller.key_id) == KeyUsage(1, 10, 95), "written, and counted once"
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(1, 10, 95)}
    with pytest.raises(Refused):
        other.admit(await authenticate(other, secret))


async def test_usage_is_written_within_seconds_without_a_further_request(keys: KeyStore) -> None:
    callers, _, caller = await sign_in(keys)
    for _ in range(50):
        RunningRequest(1, 2).run(callers, caller)
    while not keys.usage_on(today()):
        await asyncio.sleep(0.05)
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(50, 50, 100)}


def test_request_quotas_are_enforced_and_rejected_requests_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("corral.serving.accounts.time.monotonic", lambda: clock[0])
    callers = Accounts()
    caller = Caller("k", "alice", Quota(requests_per_minute=2, at_once=3))

    def retry(seconds_each: float = 0.0) -> int | None:
        try:
            callers.count_request(caller)
            callers.admit(caller, seconds_each)
        except Refused as busy:
            return busy.retry_seconds if (busy.status, busy.code) == (429, "rate_limit_exceeded") else None
        return None

    assert retry() is None
    callers.uncount_request(caller)
    callers.finished(caller, None)
    assert retry() is None
    clock[0] += 20
    assert retry() is None
    assert retry() == 40
    clock[0] += 40
    assert retry() is None, "what it said was true"
    clock[0] += 60
    assert retry() == 1, "three are under way"
    assert retry(seconds_each=30) == 10, "one of the three ends in that time"
    callers.finished(caller, None)
    clock[0] += 60
    assert retry() is None


def test_the_request_quota_counts_the_last_sixty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    window = RateWindow()
    assert window.seconds_until(1) == 0
    window.remove_last()
    for _ in range(3):
        window.add()
    assert window.seconds_until(4) == 0
    assert 59 < window.seconds_until(3) <= 60
    monkeypatch.setattr("corral.serving.accounts.time.monotonic", lambda: 10.0**9)
    assert window.seconds_until(1) == 0
    window.add()
    assert window.seconds_until(1) == 60, "the old ones are forgotten"


async def test_anonymous_requests_have_no_quota_and_no_usage() -> None:
    callers = Accounts()
    for _ in range(1000):
        callers.admit(ANONYMOUS)
    RunningRequest(1, 1).run(callers, ANONYMOUS)
    await callers.close()
