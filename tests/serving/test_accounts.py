"""Who is let in, and what a key may still use, as a server knows it that reads its database now and then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from corral.serving.accounts import ANONYMOUS, RATE_LIMIT_HEADERS, Accounts, Caller, OpenRequest
from corral.serving.errors import Refused
from corral.serving.generation import count_usage
from corral.serving.keys import Key, KeyStore, KeyUsage, Quota, SecretKeys, today


def admit(callers: Accounts, caller: Caller, ends: list[Refused] | None = None) -> OpenRequest:
    """Admit a request; the errors that end it go into a list."""
    return callers.admit(caller, (ends if ends is not None else []).append)


def run(callers: Accounts, caller: Caller, prompt_tokens: int = 1, completion_tokens: int = 2) -> None:
    """A request from its beginning to its end."""
    admit(callers, caller).close(count_usage(prompt_tokens, completion_tokens))


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
    assert not (await authenticate(callers, secret)).is_admin
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


async def test_daily_tokens_include_those_reserved_and_those_of_all_servers(
    keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0, wait=60.0)
    _, secret = keys.add("alice", Quota(tokens_per_day=100))
    one, other = Accounts(keys), Accounts(keys)
    caller = await authenticate(one, secret)
    request, second = admit(one, caller), admit(one, caller)
    assert request.reserve(10, 20, 4) == 20
    with pytest.raises(Refused) as caught:
        second.reserve(10, 1)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded"), "it may be free in a moment"
    assert one.tokens_left(caller) == 10
    request.close(count_usage(10, 85))
    second.close(None)
    assert one.usage_today(caller.key_id) == KeyUsage(1, 10, 85), "settled to what it did use"
    await one.close()
    assert one.usage_today(caller.key_id) == KeyUsage(1, 10, 85), "written, and counted once"
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(1, 10, 85)}
    late = admit(other, await authenticate(other, secret))
    with pytest.raises(Refused) as caught:
        late.reserve(5, 1)
    assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
    assert 0 < (caught.value.retry_seconds or 0) <= 86400
    late.close(count_usage(5, 0))
    with pytest.raises(Refused, match="are used up"):
        admit(other, await authenticate(other, secret))
    await other.close()


def test_an_answer_of_no_stated_length_is_shortened_to_what_is_left_of_the_day() -> None:
    callers, caller = Accounts(), Caller("k", "alice", Quota(tokens_per_day=100))
    request = OpenRequest(callers, caller, lambda _: None)
    assert request.reserve(20, 4096, may_shorten=True) == 80
    assert request.reserve(20, 4096, 3, may_shorten=True) == 26
    assert request.reserved == 98
    for prompt, most, shorten in ((20, 81, False), (100, 4096, True), (200, 1, False)):
        with pytest.raises(Refused) as caught:
            request.reserve(prompt, most, may_shorten=shorten)
        assert caught.value.code == "insufficient_quota"
        assert request.reserved == 0
    assert caught.value.retry_seconds is None, "tomorrow it is not served either"
    free = OpenRequest(callers, Caller("l", "bob"), lambda _: None)
    assert free.reserve(10**6, 10**6, may_shorten=True) == 10**6


async def test_usage_is_written_within_seconds_without_a_further_request(keys: KeyStore) -> None:
    callers, _, caller = await sign_in(keys)
    for _ in range(50):
        run(callers, caller)
    while not keys.usage_on(today()):
        await asyncio.sleep(0.05)
    assert keys.usage_on(today()) == {caller.key_id: KeyUsage(50, 50, 100)}


async def test_a_key_has_so_many_requests_at_once() -> None:
    callers, caller = Accounts(), Caller("", "alice", Quota(at_once=3))
    admitted = [admit(callers, caller) for _ in range(3)]
    for seconds_each, wait in ((0.0, 1), (30.0, 10)):
        with pytest.raises(Refused) as caught:
            callers.admit(caller, lambda _: None, seconds_each)
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.retry_seconds == wait, "one of the three ends in that time"
    admitted[0].close(None)
    admit(callers, caller)


def test_the_request_quota_counts_the_last_sixty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0**9]
    monkeypatch.setattr("limits.storage.memory.time.time", lambda: clock[0])
    monkeypatch.setattr("corral.serving.accounts.time.time", lambda: clock[0])
    callers, caller = Accounts(), Caller("k", "alice", Quota(requests_per_minute=2))
    callers.count_request(caller)
    clock[0] += 20
    callers.count_request(caller)
    assert callers.rate_limit_headers(caller) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "40s",
    }
    with pytest.raises(Refused) as caught:
        callers.count_request(caller)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_seconds == 40
    clock[0] += 40.5
    callers.count_request(caller)
    callers.count_request(Caller("k2", "bob", Quota(requests_per_minute=1)))
    callers.count_request(Caller("k3", "carol"))


def test_headers_tell_what_is_left_of_the_days_tokens() -> None:
    callers, caller = Accounts(), Caller("k", "alice", Quota(tokens_per_day=100, requests_per_minute=5))
    headers = callers.rate_limit_headers(caller)
    assert set(headers) == set(RATE_LIMIT_HEADERS)
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("100", "100")
    assert 0 < int(headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 86400
    assert callers.rate_limit_headers(ANONYMOUS) == {}


@pytest.mark.parametrize("reason", ["revoked", "expired", "deleted"])
async def test_running_requests_of_a_key_that_is_revoked_or_expired_end(
    reason: str, keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.05)
    expires = int(time.time()) + 3600
    key, secret = keys.add("alice", expires=expires)
    other = keys.add("bob")[1]
    callers = Accounts(keys)
    ends: list[Refused] = []
    kept: list[Refused] = []
    hers = [admit(callers, await authenticate(callers, secret), ends) for _ in range(2)]
    his = admit(callers, await authenticate(callers, other), kept)
    if reason == "expired":
        stored = keys.all()
        expired = [replace(each, expires=1) if each.id == key.id else each for each in stored]
        keys.all = lambda: expired  # pyright: ignore[reportAttributeAccessIssue]
    else:
        keys.revoke("alice")
    if reason == "deleted":
        keys.delete(key)
    while len(ends) < 2:
        await asyncio.sleep(0.02)
    assert all((refused.status, refused.code) == (401, "invalid_api_key") for refused in ends)
    assert ("not known" if reason == "deleted" else reason) in ends[0].what
    assert not kept
    for request in (*hers, his):
        request.close(None)
    await callers.close()


async def test_keys_of_a_file_need_no_database_and_change_with_it(
    tmp_path: Path, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.0, wait=60.0)
    file = tmp_path / "keys"
    file.write_text("alice=a-secret-of-an-operator admin\n")
    callers = Accounts(SecretKeys(file))
    alice = await authenticate(callers, "a-secret-of-an-operator")
    assert (alice.name, alice.is_admin) == ("alice", True)
    run(callers, alice)
    file.write_text("alice=another-secret-of-hers\n")
    assert (await refusal(callers, "Bearer a-secret-of-an-operator")).status == 401
    assert (await authenticate(callers, "another-secret-of-hers")).key_id == alice.key_id
    file.write_text("alice=another-secret-of-hers\nbob\n")
    set_seconds(max_age=0.3)
    for _ in range(10):
        assert (await authenticate(callers, "another-secret-of-hers")).key_id == alice.key_id, (
            "a bad line locks out nobody"
        )
        await asyncio.sleep(0.1)
    file.write_text("")
    assert (await refusal(callers, None)).status == 401, "an empty file lets nobody in"
    await callers.close()


async def test_anonymous_requests_have_no_quota_and_no_usage() -> None:
    callers = Accounts()
    for _ in range(1000):
        admit(callers, ANONYMOUS)
    run(callers, ANONYMOUS)
    assert callers.usage_today("") == KeyUsage()
    await callers.close()
