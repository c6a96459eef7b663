"""The remote engine over real sockets: corral's own server with an engine behind it, and servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from corral.answerer import Answerer
from corral.engines.base import Completion, Engine, Features, Sampling
from corral.engines.remote import RemoteEngine
from corral.engines.scripted import ScriptedEngine
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError, RequestError
from corral.model.loading import load_tokenizer
from corral.serving.answering import Served
from corral.template import Template
from corral.wire import said
from tests.conftest import Request, web_server
from tests.engines.conformance import DRAWN, GREEDY, EngineConformance, Failing, Subject, complete, deltas_of
from tests.engines.test_scripted import PROMPTS, babble, breaking
from tests.engines.tiny import CONTEXT, VOCABULARY, tiny_llama
from tests.serving.conftest import Endless, running

DOCS = Path(__file__).parent.parent.parent / "docs/serving.md"
VOCABULARY_OF_SCRIPTED = 2**20


@pytest.fixture(scope="session")
def template(tiny_folder: Path) -> Template:
    return Template.load(load_tokenizer(tiny_folder))


def remote(*urls: str, vocabulary: int = VOCABULARY_OF_SCRIPTED, **options: Any) -> RemoteEngine:
    """As a user makes it, but less patient."""
    given: Any = {"model": None, "backoff_seconds": 0.05, "retries": 3} | options
    return RemoteEngine([f"{url}/v1" for url in urls], vocabulary=vocabulary, **given)


class TestRemoteScripted(EngineConformance):
    @pytest.fixture(scope="class")
    def urls(self, template: Template) -> Generator[tuple[str, str]]:
        engines = ScriptedEngine(babble, delay_seconds=0.001), ScriptedEngine(breaking)
        first, second = (running(Served(Answerer(engine, template), "m")) for engine in engines)
        with first as url, second as breaks:
            yield url, breaks

    @pytest.fixture
    def subject(self, urls: tuple[str, str]) -> Subject:
        url, breaks = urls
        return Subject(lambda: remote(url), PROMPTS, Failing(lambda: remote(breaks), [13]))


@pytest.fixture(scope="module")
def behind() -> Generator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama())
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def tiny(behind: TransformersEngine, template: Template) -> Generator[str]:
    """The address of a model that computes."""
    with running(Served(Answerer(behind, template), "tiny")) as url:
        yield url


@pytest.mark.full
class TestRemoteTransformers(EngineConformance):
    @pytest.fixture
    def subject(self, tiny: str) -> Subject:
        return Subject(lambda: remote(tiny, vocabulary=VOCABULARY), PROMPTS)


def test_it_is_the_engine_behind_the_endpoint_in_ids_log_probs_scores_and_features(
    tiny: str, behind: TransformersEngine
) -> None:
    work = [(prompt, Sampling(20, 3, 0.9, 0.95, 50, seed=i, logprobs=True)) for i, prompt in enumerate(PROMPTS)]
    scored = [random.Random(i).choices(range(VOCABULARY), k=40) for i in range(3)]

    async def test() -> None:
        async with remote(tiny, vocabulary=VOCABULARY) as engine:
            assert (engine.model, engine.ready) == ("tiny", True)
            assert engine.features == Features(CONTEXT, VOCABULARY, logprobs=True, score=True)
            for far, near in zip(
                await asyncio.gather(*(complete(engine, *each) for each in work)),
                [await complete(behind, *each) for each in work],
                strict=True,
            ):
                assert [(one.ids, one.finish) for one in far] == [(one.ids, one.finish) for one in near]
                for one, other in zip(far, near, strict=True):
                    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            for ids in scored:
                assert await engine.score(ids, 7) == pytest.approx(await behind.score(ids, 7), abs=1e-5)

    asyncio.run(test())


def ask(engine: Engine, ids: Sequence[int] = (1, 2), sampling: Sampling = DRAWN) -> list[Completion]:
    async def work() -> list[Completion]:
        async with engine:
            return await complete(engine, ids, sampling)

    return asyncio.run(work())


class Flaky(Request):
    """An endpoint with the model `m`, which does to a completion what a test says."""

    protocol_version = "HTTP/1.1"
    asked: list[Any]
    keys: list[str | None]
    models: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        self.answer(200, {}, json.dumps({"data": self.models}).encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.completion()

    def completion(self) -> None:
        raise NotImplementedError

    def events(self, *events: Any, end: bytes = b"data: [DONE]\n\n") -> None:
        data = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + end
        self.answer(200, {"content-type": "text/event-stream"}, data)


def flaky(completion: Callable[[Any], None], **attributes: Any) -> type[Flaky]:
    base: dict[str, Any] = {"asked": [], "keys": [], "models": [{"id": "m", "max_model_len": 8192}]}
    return type("Made", (Flaky,), base | attributes | {"completion": completion})


def piece(*ids: int, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "x", "token_ids": list(ids), "finish_reason": finish} | more]}


def well(self: Flaky) -> None:
    self.events(piece(7, 8), piece(9, finish="length"))


def once(first: Callable[[Flaky], None], then: Callable[[Flaky], None] = well) -> Callable[[Flaky], None]:
    return lambda self: (first if len(self.asked) == 1 else then)(self)


def refusing(status: int, message: str = "no", **headers: str) -> Callable[[Flaky], None]:
    return lambda self: self.answer(status, headers, json.dumps({"error": {"message": message}}).encode())


def cut_off(self: Flaky) -> None:
    """Part of an answer, and the end of the connection where more was announced."""
    self.send_response(200)
    self.send_header("content-type", "text/event-stream")
    self.send_header("content-length", "100000")
    self.end_headers()
    self.wfile.write(f"data: {json.dumps(piece(7, 8))}\n\n".encode())
    self.close_connection = True


# What is asked, and of whom


def test_a_request_says_all_that_decides_the_answer() -> None:
    answers = flaky(lambda self: self.events(piece(7, finish="stop"), piece(8, index=1, finish="stop")))
    with web_server(answers) as url:
        ask(remote(url), (3, 4), Sampling(9, 2, 0.5, 0.9, 7, seed=11, stop_ids=(2, 5)))
    asked = {"model": "m", "prompt": [3, 4], "stream": True, "max_tokens": 9, "n": 2, "seed": 11}
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0}
    ends = {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [2, 5]}
    assert answers.asked == [asked | drawn | ends]


def test_the_key_comes_from_the_argument_or_the_environment_and_is_sent_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CORRAL_API_KEY", raising=False)
    answers = flaky(well)
    with web_server(answers) as url:
        ask(remote(url))
        monkeypatch.setenv("CORRAL_API_KEY", "from the environment")
        ask(remote(url))
        ask(remote(url, key="given"))
    assert answers.keys == [None, "Bearer from the environment", "Bearer given"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_at_once_and_not_shown_even_if_the_endpoint_shows_it(status: int) -> None:
    refuses = refusing(status, "no such key: sesame-1")
    for answers in (flaky(refuses), flaky(refuses, do_GET=refuses)):
        with web_server(answers) as url:
            with pytest.raises((EngineError, ModelError)) as caught:
                ask(remote(url, key="sesame-1"))
            assert "CORRAL_API_KEY" in str(caught.value)
            assert url in str(caught.value)
            assert "sesame" not in repr(caught.value) + str(caught.value)
            assert len(answers.asked) <= 1, "asking again with the same key helps nobody"


def test_the_only_model_is_taken_and_of_several_one_must_be_named() -> None:
    several = [{"id": "a", "max_model_len": 100}, {"id": "b", "max_model_len": 200}]
    with web_server(flaky(well, models=several)) as url:
        for name in (None, "c"):
            with pytest.raises(ModelError, match="a, b") as caught:
                remote(url, model=name)
            assert url in str(caught.value)
        engine = remote(url, model="b")
        assert (engine.model, engine.features.max_length) == ("b", 200)
        asyncio.run(engine.close())


def test_the_context_is_the_shortest_of_all_endpoints_or_must_be_given() -> None:
    short = flaky(well, models=[{"id": "m", "max_model_len": 50}])
    untold = flaky(well, models=[{"id": "m"}])
    with web_server(flaky(well)) as url, web_server(short) as other, web_server(untold) as silent:
        engine = remote(url, other)
        assert engine.features.max_length == 50
        asyncio.run(engine.close())
        with pytest.raises(InputError, match="context") as caught:
            remote(url, silent)
        assert "max_length" in str(caught.value)
        engine = remote(silent, max_length=77)
        assert engine.features.max_length == 77
        asyncio.run(engine.close())


def test_endpoints_that_serve_different_models_are_refused() -> None:
    with web_server(flaky(well)) as url, web_server(flaky(well, models=[{"id": "other"}])) as second:
        with pytest.raises(ModelError, match="no model 'm'; it has: other") as caught:
            remote(url, second)
        assert second in str(caught.value)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_an_endpoint_that_is_not_there_is_said_at_once_and_one_that_is_suffices() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError) as caught:
        remote(nobody)
    assert nobody in str(caught.value)
    assert "running" in str(caught.value)
    with web_server(flaky(well)) as url:
        assert ask(remote(nobody, url))[0].ids == (7, 8, 9)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://me:secret@x/v1", "http://x:y/v1"])
def test_what_is_no_url_is_said_without_a_password_that_is_in_it(url: str) -> None:
    with pytest.raises(InputError) as caught:
        RemoteEngine([url], model="m", vocabulary=9)
    assert "secret" not in str(caught.value) + repr(caught.value)
    with pytest.raises(InputError):
        RemoteEngine([], model="m", vocabulary=9)


def test_a_page_that_is_no_api_is_said_to_be_none() -> None:
    def page(self: Request) -> None:
        self.answer(200, {"content-type": "text/html"}, b"<html>welcome</html>")

    with web_server(flaky(well, do_GET=page)) as url, pytest.raises(ModelError, match="cannot be read") as caught:
        remote(url)
    assert "/v1" in str(caught.value)


# What fails


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_asked_again(status: int) -> None:
    answers = flaky(once(refusing(status)))
    with web_server(answers) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert len(answers.asked) == 2


def test_retry_after_is_honoured() -> None:
    moments: list[float] = []

    def busy(self: Flaky) -> None:
        moments.append(time.monotonic())
        once(refusing(429, **{"retry-after": "1"}))(self)

    with web_server(flaky(busy)) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert moments[1] - moments[0] >= 1


def test_an_endpoint_that_is_busy_for_too_long_or_always_is_given_up_with_its_words() -> None:
    answers = flaky(refusing(429, "come back tomorrow", **{"retry-after": "86400"}))
    with web_server(answers) as url, pytest.raises(EngineError, match=r"tomorrow.* for 86400 s") as caught:
        ask(remote(url))
    assert url in str(caught.value)
    assert len(answers.asked) == 1
    answers = flaky(refusing(503, "overloaded", **{"retry-after": "0"}))
    with web_server(answers) as url, pytest.raises(EngineError, match="503: overloaded"):
        ask(remote(url))
    assert len(answers.asked) == 4, "the first and three retries"


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RequestError), (422, RequestError), (404, EngineError), (500, EngineError)]
)
def test_what_will_not_pass_is_said_at_once(status: int, kind: type[EngineError]) -> None:
    answers = flaky(refusing(status, "the context is too short"))
    with web_server(answers) as url, pytest.raises(EngineError, match="the context is too short") as caught:
        ask(remote(url))
    assert type(caught.value) is kind
    assert url in str(caught.value)
    assert len(answers.asked) == 1


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "seeded"])
def test_an_answer_that_broke_off_is_taken_up_where_it_must_come_out_the_same(sampling: Sampling) -> None:
    answers = flaky(once(cut_off))
    with web_server(answers) as url:

        async def test() -> list[tuple[int, ...]]:
            async with remote(url) as engine:
                return [delta.ids for delta in await deltas_of(engine.submit([1], sampling))]

        assert asyncio.run(test()) == [(7, 8), (9,)], "nothing twice"
    assert answers.asked[0] == answers.asked[1]


def test_an_answer_by_chance_that_broke_off_is_not_patched_but_one_that_had_not_begun_is_asked_again() -> None:
    chance = Sampling(max_tokens=12, temperature=1.0)
    with web_server(flaky(once(cut_off))) as url, pytest.raises(EngineError, match="amid an answer") as caught:
        ask(remote(url), sampling=chance)
    assert "seed" in str(caught.value)
    for before in (lambda self: self.events(end=b""), refusing(503), Flaky.finish):
        with web_server(flaky(once(before))) as url:
            assert ask(remote(url), sampling=chance)[0].ids == (7, 8, 9)


def test_an_answer_that_would_go_on_differently_is_an_error() -> None:
    other = once(cut_off, lambda self: self.events(piece(7, 6), piece(9, finish="length")))
    with web_server(flaky(other)) as url, pytest.raises(EngineError, match="other ids"):
        ask(remote(url))


GARBAGE: dict[str, Any] = {
    "a page": lambda self: self.answer(200, {"content-type": "text/html"}, b"<html>"),
    "no JSON": lambda self: self.events(end=b"data: {]\n\n"),
    "another choice": lambda self: self.events(piece(1, index=5)),
    "ids that are none": lambda self: self.events({"choices": [{"index": 0, "token_ids": ["a"]}]}),
    "no ids": lambda self: self.events({"choices": [{"index": 0, "text": "hello"}]}),
    "too many ids": lambda self: self.events(piece(*range(13))),
    "no log-probs": lambda self: self.events(piece(1, 2, logprobs=None)),
    "a reason nobody knows": lambda self: self.events(piece(1, finish="tired", logprobs={"token_logprobs": [-1]})),
    "an error amid the answer": lambda self: self.events({"error": {"message": "out of memory", "code": 500}}),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_nonsense_is_an_error_that_names_the_endpoint(case: str) -> None:
    answers = flaky(GARBAGE[case])
    sampling = Sampling(max_tokens=12, logprobs=case in ("no log-probs", "a reason nobody knows"))
    with web_server(answers) as url, pytest.raises(EngineError) as caught:
        ask(remote(url), sampling=sampling)
    assert url in str(caught.value)
    assert len(answers.asked) == 1
    assert case != "no ids" or "ids_of" in str(caught.value)


def test_an_event_that_says_the_endpoint_goes_down_is_asked_elsewhere() -> None:
    down = {"error": {"message": "the engine of this server is closed", "code": "engine_unavailable"}}
    with web_server(flaky(once(lambda self: self.events(piece(7), down)))) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)


def test_a_score_that_is_none_is_an_error() -> None:
    answer = {"choices": [{"index": 0, "text": "", "logprobs": {"token_logprobs": [-1.0]}}]}
    with web_server(flaky(lambda self: self.answer(200, {}, json.dumps(answer).encode()))) as url:

        async def test() -> None:
            async with remote(url) as engine:
                with pytest.raises(EngineError, match="1 log-probabilities of a prompt of 3") as caught:
                    await engine.score([1, 2, 3])
                assert "echo" in str(caught.value)

        asyncio.run(test())


# Other servers


def test_a_stop_id_at_the_end_of_the_ids_as_vllm_sends_it_is_left_out() -> None:
    def answer(self: Flaky) -> None:
        self.events(
            piece(7, logprobs={"token_logprobs": [-1.0]}),
            piece(8, 2, finish="stop", logprobs={"token_logprobs": [-2, -3]}),
        )

    with web_server(flaky(answer)) as url:
        (done,) = ask(remote(url), sampling=Sampling(stop_ids=(2,), logprobs=True))
    assert (done.ids, done.logprobs, done.finish) == ((7, 8), (-1.0, -2.0), "stop")


def test_text_of_a_server_that_gives_no_ids_is_made_into_ids_where_the_caller_says_how() -> None:
    def answer(self: Flaky) -> None:
        texts = [("a", None), ("bc", None), ("", "stop")]
        self.events(*({"choices": [{"index": 0, "text": t, "finish_reason": f}]} for t, f in texts))

    answers = flaky(answer)
    with web_server(answers) as url:
        engine = remote(url, ids_of=lambda text: [ord(c) for c in text])
        assert not engine.features.logprobs
        assert not engine.features.score
        (done,) = ask(engine)
    assert (done.ids, done.finish) == ((97, 98, 99), "stop")
    assert {"return_token_ids", "ignore_eos", "stop_token_ids", "min_p"}.isdisjoint(answers.asked[0])


# Many, and the end of some


def test_requests_go_to_the_endpoint_with_the_fewest_and_no_more_than_agreed_are_under_way() -> None:
    lock = threading.Lock()
    counts: list[list[int]] = [[], []]
    now = [0, 0]

    def counting(which: int) -> Callable[[Flaky], None]:
        def answer(self: Flaky) -> None:
            with lock:
                now[which] += 1
                counts[which].append(now[which])
            time.sleep(0.05)
            with lock:
                now[which] -= 1
            well(self)

        return answer

    with web_server(flaky(counting(0))) as first, web_server(flaky(counting(1))) as second:

        async def test() -> None:
            async with remote(first, second, concurrency=6) as engine:
                await asyncio.gather(*(complete(engine, [1], DRAWN) for _ in range(24)))

        asyncio.run(test())
    assert len(counts[0]) + len(counts[1]) == 24
    assert max(counts[0] + counts[1]) == 3


SERVER = """
import asyncio, socket, sys
from pathlib import Path
from corral.answerer import Answerer
from corral.engines.scripted import ScriptedEngine
from corral.model.loading import load_tokenizer
from corral.serving.answering import Served
from corral.serving.app import build_app
from corral.serving.door import Door
from corral.serving.models import Models
from corral.serving.server import http_server
from corral.template import Template
from tests.engines.test_scripted import babble

listener = socket.create_server(("127.0.0.1", 0))
template = Template.load(load_tokenizer(Path(sys.argv[1])))
served = Served(Answerer(ScriptedEngine(babble, delay_seconds=0.01), template), "m")
print(listener.getsockname()[1], flush=True)
door = Door()
server = http_server(build_app(Models([served]), door), door)
asyncio.run(server.serve(sockets=[listener]))
"""


def test_a_server_that_is_killed_amid_its_answers_costs_none(tiny_folder: Path, template: Template) -> None:
    command = [sys.executable, "-c", SERVER, str(tiny_folder)]
    doomed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent)
    work = [([i + 1], Sampling(100, 2, 1.0, seed=i, logprobs=True)) for i in range(12)]
    try:
        assert doomed.stdout
        port = doomed.stdout.readline().strip()
        with running(Served(Answerer(ScriptedEngine(babble, delay_seconds=0.01), template), "m")) as url:

            async def test() -> tuple[list[list[Completion]], int, list[list[Completion]]]:
                async with remote(url, f"http://127.0.0.1:{port}") as engine:
                    generations = [engine.submit(*each) for each in work]
                    tasks = [asyncio.create_task(generation.completions()) for generation in generations]
                    await asyncio.sleep(0.4)
                    doomed.kill()
                    left = sum(not task.done() for task in tasks)
                    done = await asyncio.gather(*tasks)
                    return done, left, await asyncio.gather(*(complete(engine, *each) for each in work))

            done, left, again = asyncio.run(test())
    finally:
        doomed.kill()
        doomed.communicate()
    assert left == 12, "it was killed amid them"
    assert done == again
    assert all(len(completion.ids) == 100 for completions in done for completion in completions)


def test_cancelling_frees_the_servers_work_also_of_a_choice_that_nobody_waits_for(template: Template) -> None:
    for whole in (True, False):
        endless = Endless()
        with running(Served(Answerer(endless.engine, template), "m")) as url:

            async def test(url: str = url, endless: Endless = endless, whole: bool = whole) -> None:
                async with remote(url) as engine:
                    generation = engine.submit([1], Sampling(5000, 2, stop_ids=() if whole else (43,)))
                    if whole:
                        assert await asyncio.to_thread(endless.began.wait, 30)
                        generation.cancel()
                    else:
                        generation.cancel(1)  # the other ends by itself, at its third token
                    finishes = [completion.finish for completion in await generation.completions()]
                    assert finishes == (["cancelled"] * 2 if whole else ["stop", "cancelled"])
                    await asyncio.sleep(1)
                    then = endless.drawn
                    await asyncio.sleep(0.2)
                    assert endless.drawn == then, "the server still works for nobody"

            asyncio.run(test())


def test_ready_tells_whether_an_endpoint_may_be_asked() -> None:
    with web_server(flaky(well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, backoff_seconds=3600)
        assert engine.ready

    async def test() -> None:
        async with engine:
            with pytest.raises(EngineError):
                await complete(engine, [1], DRAWN)
            await asyncio.sleep(0.1)
            assert not engine.ready

    asyncio.run(test())


def test_the_example_in_the_documentation_works(template: Template) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", DOCS.read_text("utf-8"), re.S)
    with running(Served(Answerer(ScriptedEngine(babble), template), "quickstart")) as url:
        script = code.replace("http://127.0.0.1:8000", url).replace("http://127.0.0.1:8001", url)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(\(\d+(, \d+)* ?.*\) \w+\n)+.*\n", done.stdout), done.stdout


# Endpoints that go and come


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.01)


def test_one_that_failed_several_times_is_asked_for_answers_only_once_it_lists_the_model() -> None:
    listed = flaky(Flaky.finish, models=[{"id": "m", "max_model_len": 8192}])
    with web_server(listed) as url, web_server(flaky(well)) as other:
        engine = remote(url, other)
        listed.models = [{"id": "another", "max_model_len": 8192}]

        async def test() -> None:
            async with engine:
                for _ in range(8):
                    await complete(engine, [1], DRAWN)
                assert len(listed.asked) == 3
                await asyncio.to_thread(wait_for, lambda: len(listed.keys) >= 4)
                assert len(listed.asked) == 3, "it does not list the model"
                listed.completion = well  # type: ignore[method-assign]
                listed.models = [{"id": "m", "max_model_len": 8192}]
                while len(listed.asked) < 4:
                    await asyncio.gather(*(complete(engine, [1], DRAWN) for _ in range(2)))

        asyncio.run(test())


@pytest.mark.parametrize("retries", [0, 3])
def test_what_one_endpoint_is_too_busy_for_is_asked_of_another_and_others_are_still_asked_there(retries: int) -> None:
    busy = flaky(once(refusing(503, **{"retry-after": "3600"})))
    with web_server(busy) as url, web_server(flaky(well)) as other:

        async def test() -> None:
            async with remote(url, other, retries=retries, backoff_seconds=60) as engine:
                for _ in range(5):
                    assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(busy.asked) == 5


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_a_fault_of_one_request_is_none_of_the_next_ones(fault: str) -> None:
    first = Flaky.finish if fault == "reset" else refusing(503, "full", **{"retry-after": "20"})
    answers = flaky(once(first))
    with web_server(answers) as url:

        async def test() -> None:
            async with remote(url, retries=0, backoff_seconds=60) as engine:
                with pytest.raises(EngineUnavailableError) as caught:
                    await complete(engine, [1], DRAWN)
                told = (caught.value.status, round(caught.value.retry_seconds or 0))
                assert told == ((503, 20) if fault == "busy" else (None, 0))
                assert url in str(caught.value.where)
                assert engine.ready
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(answers.asked) == 2


def test_the_last_endpoint_rests_no_longer_than_it_takes_to_see_that_it_is_there() -> None:
    answers = flaky(lambda self: (Flaky.finish if len(self.asked) <= 3 else well)(self))
    with web_server(answers) as url:

        async def test() -> None:
            async with remote(url, retries=0, backoff_seconds=3600) as engine:
                for _ in range(3):
                    with pytest.raises(EngineUnavailableError):
                        await complete(engine, [1], DRAWN)
                await asyncio.to_thread(wait_for, lambda: engine.ready)
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(answers.keys) == 2, "it was asked for its models once more"


def test_those_that_nobody_asks_are_looked_at_where_that_is_wanted() -> None:
    # A connection for each request: one that is kept would outlive the server.
    answers = flaky(well, protocol_version="HTTP/1.0")
    with web_server(answers) as url:
        engine = remote(url, check_seconds=0.05)
        lazy = remote(url)
        assert engine.ready
    wait_for(lambda: not engine.ready)
    assert lazy.ready, "it has not noticed"
    with web_server(answers, int(url.rpartition(":")[2])):
        wait_for(lambda: engine.ready)
        assert ask(engine)[0].ids == (7, 8, 9)
        assert ask(lazy)[0].ids == (7, 8, 9)


def test_without_patience_each_endpoint_is_tried_once_and_a_request_is_refused_while_all_rest() -> None:
    first, second = flaky(refusing(503)), flaky(refusing(429))
    with web_server(first) as url, web_server(second) as other:

        async def test() -> None:
            async with remote(url, other, retries=0, backoff_seconds=60) as engine:
                with pytest.raises(EngineUnavailableError, match=r"503.*429"):
                    await complete(engine, [1], DRAWN)
                assert engine.ready

        asyncio.run(test())
    assert (len(first.asked), len(second.asked)) == (1, 1)
    with web_server(flaky(well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, check_seconds=0.05)
    wait_for(lambda: not engine.ready)

    async def refused() -> None:
        async with engine:
            with pytest.raises(EngineUnavailableError):
                engine.submit([1], DRAWN)

    asyncio.run(refused())


def test_a_fault_of_ours_is_logged_without_what_was_answered(caplog: pytest.LogCaptureFixture) -> None:
    def ids_of(text: str) -> list[int]:
        raise ValueError(f"cannot make ids of {text}")

    diary = {"choices": [{"index": 0, "text": "my diary", "finish_reason": "stop"}]}
    with web_server(flaky(lambda self: self.events(diary))) as url, pytest.raises(EngineError):
        ask(remote(url, ids_of=ids_of))
    assert re.search(r"ValueError at .*test_remote\.py:\d+", caplog.text)
    assert "diary" not in caplog.text


def test_a_model_that_only_embeds_is_not_the_one_that_is_meant() -> None:
    models = [{"id": "m", "max_model_len": 8192}, {"id": "e", "max_model_len": 256, "task": "embeddings"}]
    with web_server(flaky(well, models=models)) as url:
        engine = remote(url)
        assert (engine.model, engine.features.max_length) == ("m", 8192)
        asyncio.run(engine.close())


# What an endpoint can do, found out


def tried(**known: Any) -> Callable[[Flaky], None]:
    """A server that knows these fields besides the usual ones, and refuses others as OpenAI's does."""
    usual = {"model", "prompt", "stream", "max_tokens", "n", "temperature", "top_p", "seed"}

    def answer(self: Flaky) -> None:
        body = self.asked[-1]
        if foreign := set(body) - usual - set(known):
            refusing(400, f"unknown parameter {min(foreign)}")(self)
            return
        choice: dict[str, Any] = {"text": "bc", "finish_reason": "length"}
        if "return_token_ids" in body:
            choice["token_ids"] = [98, 99][: body["max_tokens"]]
        if "logprobs" in body:
            told = [None, -1.0] if body.get("echo") else []
            choice["logprobs"] = {"token_logprobs": [*told, *[-0.5] * len(choice["token_ids"])]}
        if body.get("stream"):
            self.events({"choices": [choice | {"index": i} for i in range(body["n"])]})
        else:
            self.answer(200, {}, json.dumps({"choices": [choice]}).encode())

    return answer


IDS: dict[str, Any] = dict.fromkeys(
    ("return_token_ids", "ignore_eos", "stop_token_ids", "top_k", "min_p", "repetition_penalty")
)
ABLE: dict[str, tuple[Callable[[Flaky], None], tuple[bool, bool], int]] = {
    "all of it": (tried(**IDS, logprobs=0, echo=True), (True, True), 1),
    "log-probs of what it draws": (tried(**IDS, logprobs=0), (True, False), 2),
    "ids": (tried(**IDS), (False, False), 3),
    "text": (tried(), (False, False), 4),
}


@pytest.mark.parametrize("case", ABLE)
def test_what_a_server_gives_besides_text_is_found_out_once_and_answers_come_in_every_case(case: str) -> None:
    answer, (logprobs, score), asked = ABLE[case]
    answers = flaky(answer)
    with web_server(answers) as url:
        engine = remote(url, try_out=True, ids_of=lambda text: [ord(c) for c in text])
        assert (engine.features.logprobs, engine.features.score) == (logprobs, score)
        assert len(answers.asked) == asked
        assert {body["max_tokens"] for body in answers.asked} == {1}, "it costs a token"
        (done,) = ask(engine, sampling=Sampling(max_tokens=2, seed=1))
    assert (done.ids, done.finish) == ((98, 99), "length")


def test_corrals_own_server_is_found_able_to_do_all_of_it(tiny: str) -> None:
    engine = remote(tiny, vocabulary=VOCABULARY, try_out=True)
    assert engine.features == Features(CONTEXT, VOCABULARY, logprobs=True, score=True)
    asyncio.run(engine.close())


def test_what_gives_no_ids_and_what_takes_none_is_said_at_once() -> None:
    with web_server(flaky(tried())) as url, pytest.raises(ModelError, match="no token ids") as caught:
        remote(url, try_out=True)
    assert "ids_of" in str(caught.value)
    for status in (404, 400):
        refuses = flaky(refusing(status, "no such thing"))
        with web_server(refuses) as url, pytest.raises(ModelError, match="no such thing") as caught:
            remote(url, try_out=True)
        assert "/v1/completions" in str(caught.value.hint)
    with web_server(flaky(refusing(503))) as url:
        busy = remote(url, try_out=True, retries=0)
        assert busy.features.logprobs, "it is too busy to say"
        asyncio.run(busy.close())


def test_a_context_that_is_known_is_that_of_endpoints_that_tell_none_and_the_most_of_others() -> None:
    untold, long = flaky(well, models=[{"id": "m"}]), flaky(well)
    with web_server(untold) as url, web_server(long) as other:
        for known in (77, 9000):
            engine = remote(url, other, max_length=known)
            assert engine.features.max_length == min(known, 8192)
            asyncio.run(engine.close())


def test_a_vote_among_the_answers_of_a_server_without_log_probs_is_held(tiny_folder: Path) -> None:
    from corral.composing import compose
    from corral.messages import Conversation
    from corral.opening import reach_model
    from corral.recipe import Answer, Consensus

    with web_server(flaky(tried(), models=[{"id": "m"}])) as url:
        opened = reach_model(str(tiny_folder), [url])
        assert opened.answerer.engine.features.max_length == 512, "as its config tells"
        settings = Answer(consensus=Consensus(method="rouge-l", n=2))
        plain = opened.answerer
        answerer = compose(plain.engine, plain.template, settings, examples=list, seed=1)

        async def test() -> str:
            async with plain.engine:
                return (await answerer.answer(Conversation.of(("user", "hi")))).text

        assert asyncio.run(test()) == "bc"


# The key


@pytest.mark.parametrize("pad", [0, 270, 283])
def test_nothing_of_the_key_is_shown_wherever_the_endpoint_says_it(pad: int) -> None:
    words = "x" * pad + " no such key: sesame-and-more-1"
    amid = flaky(lambda self: self.events({"error": {"message": words, "code": 500}}))
    refused = flaky(refusing(400, words))
    passing = flaky(refusing(503, words))
    for answers in (amid, refused, passing):
        with web_server(answers) as url, pytest.raises(EngineError) as caught:
            ask(remote(url, key="sesame-and-more-1", retries=0))
        assert "sesame" not in str(caught.value) + repr(caught.value)
    assert "ses" not in said(json.dumps({"error": {"message": words}}), "sesame-and-more-1")


def test_a_server_that_sends_requests_elsewhere_is_refused_and_the_key_does_not_follow() -> None:
    elsewhere = flaky(well)
    with web_server(elsewhere) as other:
        redirects: Any = lambda self: self.answer(307, {"location": f"{other}{self.path}"})  # noqa: E731
        with web_server(flaky(redirects)) as url, pytest.raises(EngineError, match="307"):
            ask(remote(url, key="sesame"))
        with web_server(flaky(well, do_GET=redirects)) as url, pytest.raises(ModelError, match="307"):
            remote(url, key="sesame")
    assert (elsewhere.keys, elsewhere.asked) == ([], [])


def test_who_gets_the_key_is_said_where_it_may_not_be_meant(caplog: pytest.LogCaptureFixture) -> None:
    from corral.wire import bearer

    bearer("sesame", "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    bearer("sesame", "https://a.example/v1")
    bearer("sesame", "http://localhost:1/v1", "http://localhost:2/v1")
    bearer(None, "http://a.example/v1", "http://b.example/v1")
    assert not caplog.records
    bearer("sesame", "https://a.example/v1", "https://b.example/v1")
    assert "a.example, b.example" in caplog.text
    bearer("sesame", "http://c.example/v1")
    assert "c.example unencrypted" in caplog.text
    assert "sesame" not in caplog.text
