"""What an endpoint can do is found out by asking it, whatever it knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from corral.engines.base import Sampling
from corral.errors import ModelError
from tests.conftest import web_server
from tests.engines.remote.fake_server import (
    FakeServer,
    ask,
    fake_server,
    knows_fields,
    refuses_with,
    remote,
)

IDS: dict[str, Any] = dict.fromkeys(
    ("return_token_ids", "ignore_eos", "stop_token_ids", "top_k", "min_p", "repetition_penalty")
)


ABLE: dict[str, tuple[Callable[[FakeServer], None], tuple[bool, bool], int]] = {
    "all of it": (knows_fields(**IDS, logprobs=0, echo=True), (True, True), 1),
    "log-probs of what it draws": (knows_fields(**IDS, logprobs=0), (True, False), 2),
    "ids": (knows_fields(**IDS), (False, False), 3),
    "text": (knows_fields(), (False, False), 4),
}


@pytest.mark.parametrize("case", ABLE)
def test_what_a_server_gives_besides_text_is_found_out_once_and_answers_come_in_every_case(case: str) -> None:
    answer, (logprobs, score), asked = ABLE[case]
    answers = fake_server(answer)
    with web_server(answers) as url:
        engine = remote(url, probe=True, encode=lambda text: [ord(c) for c in text])
        assert (engine.features.logprobs, engine.features.score) == (logprobs, score)
        assert len(answers.asked) == asked
        assert {body["max_tokens"] for body in answers.asked} == {1}, "it costs a token"
        (done,) = ask(engine, sampling=Sampling(max_tokens=2, seed=1))
    assert (done.ids, done.finish) == ((98, 99), "length")


def test_what_gives_no_ids_and_what_takes_none_is_said_at_once() -> None:
    with web_server(fake_server(knows_fields())) as url, pytest.raises(ModelError, match="no token ids") as caught:
        remote(url, probe=True)
    assert "encode" in str(caught.value)
    for status in (404, 400):
        refuses = fake_server(refuses_with(status, "no such thing"))
        with web_server(refuses) as url, pytest.raises(ModelError, match="no such thing") as caught:
            remote(url, probe=True)
        assert "/v1/completions" in str(caught.value.hint)
    with web_server(fake_server(refuses_with(503))) as url:
        busy = remote(url, probe=True, retries=0)
        assert busy.features.logprobs, "it is too busy to say"
        asyncio.run(busy.close())
