from __future__ import annotations

import json

import pytest

from corral.engines.remote.engine import RemoteEngine
from corral.engines.remote.protocol import auth_header, error_message
from corral.errors import InputError


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://me:secret@x/v1", "http://x:y/v1"])
def test_a_wrong_url_is_refused_without_showing_a_password_in_it(url: str) -> None:
    with pytest.raises(InputError) as caught:
        RemoteEngine([url], model="m", vocabulary=9)
    assert "secret" not in str(caught.value) + repr(caught.value)


def test_no_url_is_refused() -> None:
    with pytest.raises(InputError):
        RemoteEngine([], model="m", vocabulary=9)


def test_a_key_sent_to_several_hosts_or_unencrypted_is_logged_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    auth_header("sesame", "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    auth_header("sesame", "https://a.example/v1")
    auth_header("sesame", "http://localhost:1/v1", "http://localhost:2/v1")
    auth_header(None, "http://a.example/v1", "http://b.example/v1")
    assert not caplog.records
    auth_header("sesame", "https://a.example/v1", "https://b.example/v1")
    assert "a.example, b.example" in caplog.text
    auth_header("sesame", "http://c.example/v1")
    assert "c.example unencrypted" in caplog.text
    assert "sesame" not in caplog.text


@pytest.mark.parametrize("pad", [0, 270, 283])
def test_an_error_message_is_cut_after_the_key_is_removed(pad: int) -> None:
    body = json.dumps({"error": {"message": "x" * pad + " no such key: sesame-and-more-1"}})
    assert "ses" not in error_message(body, "sesame-and-more-1")


def test_an_error_body_of_any_depth_is_read() -> None:
    assert len(error_message("[" * 2**16)) == 300 - 2
