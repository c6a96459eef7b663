"""The seconds of `Retry-After`."""

from __future__ import annotations

from corral.serving.retry_after import Busy


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    def retry_after(seconds: float) -> int | None:
        return Busy(429, "what", retry_seconds=seconds, code="code").retry_seconds

    assert [retry_after(0), retry_after(0.2), retry_after(1), retry_after(1.01)] == [1, 1, 1, 2]
