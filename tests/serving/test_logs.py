"""The log as an operator reads it: one line a request, and what is on each line."""

from __future__ import annotations

import logging
import re

import pytest

from corral.serving.admission import Admission
from corral.serving.keys import KeyStore
from corral.serving.logs import log_to_stderr, request_id
from tests.serving.conftest import Serve, bearer, wait_for

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?P<level>\w+) (?P<id>\S+) (?P<logger>\S+): (?P<message>.*)")


def test_each_request_is_one_line_with_its_id_tokens_and_key_but_no_secret(
    serve: Serve, keys: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = keys.add("alice")
    caplog.set_level("INFO", "corral.access")
    server = serve("one two three", Admission(keys=keys))
    status, answer, _ = server.chat(bearer(secret))
    assert status == 200
    server.chat(bearer(secret), stream=True)
    server.call("GET", "/secret/path?secret")
    server.call("PROPFIND", "/health")
    assert wait_for(lambda: len(caplog.records) == 4)
    lines = [re.sub(r"\d+ms", "1ms", record.getMessage()) for record in caplog.records]
    usage = answer["usage"]
    tokens = f"tokens {usage['prompt_tokens']} {usage['completion_tokens']} key alice"
    assert lines == [
        f"POST /v1/chat/completions 200 1ms prompt/completion {tokens}",
        f"POST /v1/chat/completions 200 1ms prompt/completion {tokens}",
        "GET none 401 1ms prompt/completion tokens - - key -",
        "OTHER /health 405 1ms prompt/completion tokens - - key -",
    ]
    assert secret.rpartition("_")[2] not in caplog.text


def test_lines_have_time_level_and_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("corral.serving.some")
    token = request_id.set("req_1")
    with log_to_stderr("info"):
        log.info("one")
        log.debug("nobody sees this")
        logging.getLogger("library").warning("two")
        logging.getLogger("library").info("nobody sees this")
        request_id.reset(token)
        log.error("three")
    log.error("after the end")
    found = [match.groupdict() for match in map(LINE.fullmatch, capsys.readouterr().err.splitlines()) if match]
    assert found == [
        {"level": "INFO", "id": "req_1", "logger": "corral.serving.some", "message": "one"},
        {"level": "WARNING", "id": "req_1", "logger": "library", "message": "two"},
        {"level": "ERROR", "id": "-", "logger": "corral.serving.some", "message": "three"},
    ]
