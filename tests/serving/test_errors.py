"""What errors say to programs: the type, and whether and when to try again."""

from __future__ import annotations

import pytest

from corral.serving.errors import Refused, database_unavailable, shutting_down


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    def retry_after(seconds: float) -> str:
        return Refused(429, "what", retry_seconds=seconds, code="code").headers["retry-after"]

    assert [retry_after(0), retry_after(0.2), retry_after(1), retry_after(1.01)] == ["1", "1", "1", "2"]


@pytest.mark.parametrize(
    ("status", "code", "type_"),
    [
        (400, None, "invalid_request_error"),
        (404, "model_not_found", "invalid_request_error"),
        (401, "invalid_api_key", "authentication_error"),
        (403, "admin_required", "permission_error"),
        (429, "rate_limit_exceeded", "rate_limit_error"),
        (429, "insufficient_quota", "insufficient_quota"),
        (500, "internal_error", "server_error"),
        (504, "deadline_exceeded", "server_error"),
    ],
)
def test_each_status_has_openais_type(status: int, code: str | None, type_: str) -> None:
    error = Refused(status, "what", code=code).body().error
    assert (error.type, error.code) == (type_, code)


def test_clients_are_told_not_to_retry_in_vain() -> None:
    """OpenAI's clients repeat these on their own, unless a header says no."""
    vain = (Refused(504, "late"), Refused(500, "fault"), Refused(409, "taken"), Refused(429, "day", retry_seconds=3600))
    assert all(refused.headers["x-should-retry"] == "false" for refused in vain)
    for refused in (Refused(429, "minute", retry_seconds=60), database_unavailable(), shutting_down()):
        assert "x-should-retry" not in refused.headers
        assert "retry-after" in refused.headers
    assert Refused(400, "bad").headers == {}, "nobody repeats it"


def test_401_names_the_scheme() -> None:
    assert Refused(401, "who are you").headers == {"www-authenticate": "Bearer"}
