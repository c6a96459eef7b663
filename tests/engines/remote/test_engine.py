"""The remote engine over real sockets: corral's own server with an engine behind it, and servers that misbehave."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.answering.open_model import connect_model
from corral.engines.base import OPTIONAL_SAMPLING, Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineError
from corral.messages import Conversation
from corral.recipe import Answer, Consensus
from corral.serving.admission import ServerLimits
from corral.serving.models import ServedModel
from corral.template import Template
from tests.conftest import web_server
from tests.engines.conformance import DRAWN, GREEDY, EngineConformance, Failing, Subject, complete, deltas_of
from tests.engines.remote.fake_server import (
    FakeServer,
    ask,
    breaks_off,
    chunk,
    fake_server,
    first_then,
    knows_fields,
    refuses_with,
    remote,
)
from tests.engines.test_scripted import PROMPTS, babble, breaking
from tests.engines.tiny import CONTEXT, VOCABULARY, tiny_llama
from tests.serving.conftest import Endless, serve_in_thread

DOCS = Path(__file__).parents[3] / "docs/serving.md"


class TestRemoteScripted(EngineConformance):
    @pytest.fixture(scope="class")
    def urls(self, template: Template) -> Generator[tuple[str, str]]:
        engines = ScriptedEngine(babble, delay_seconds=0.001), ScriptedEngine(breaking)
        first, second = (serve_in_thread(ServedModel(Answerer(engine, template), "m")) for engine in engines)
        with first as url, second as breaks:
            yield url, breaks

    @pytest.fixture
    def subject(self, urls: tuple[str, str]) -> Subject:
        url, breaks = urls
        return Subject(lambda: remote(url), PROMPTS, Failing(lambda: remote(breaks), [13]), computes_logits=False)


@pytest.fixture(scope="module")
def behind() -> Generator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama())
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def tiny(behind: TransformersEngine, template: Template) -> Generator[str]:
    """The address of a model that computes."""
    with serve_in_thread(ServedModel(Answerer(behind, template), "tiny")) as url:
        yield url


@pytest.mark.full
class TestRemoteTransformers(EngineConformance):
    @pytest.fixture
    def subject(self, tiny: str) -> Subject:
        return Subject(lambda: remote(tiny, vocabulary=VOCABULARY), PROMPTS)


async def test_it_is_the_engine_behind_the_endpoint_in_ids_log_probs_scores_and_features(
    tiny: str, behind: TransformersEngine
) -> None:
    work = [(prompt, Sampling(20, 3, 0.9, 0.95, 50, seed=i, logprobs=True)) for i, prompt in enumerate(PROMPTS)]
    scored = [random.Random(i).choices(range(VOCABULARY), k=40) for i in range(3)]
    async with remote(tiny, vocabulary=VOCABULARY) as engine:
        assert (engine.model, engine.ready) == ("tiny", True)
        assert engine.features == Features(
            CONTEXT,
            VOCABULARY,
            logprobs=True,
            score=True,
            requests=ServerLimits().at_once,
            honours=behind.features.honours,
            score_top=True,
        )
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


def test_a_request_says_all_that_decides_the_answer() -> None:
    server = fake_server(lambda self: self.events(chunk(7, finish="stop"), chunk(8, index=1, finish="stop")))
    with web_server(server) as url:
        ask(remote(url), (3, 4), Sampling(9, 2, 0.5, 0.9, 7, seed=11, stop_ids=(2, 5)))
    body = {"model": "m", "prompt": [3, 4], "stream": True, "max_tokens": 9, "n": 2, "seed": 11}
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0}
    ends = {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [2, 5]}
    assert server.requests == [body | drawn | ends]


def test_the_optional_fields_are_sent_where_they_change_something_and_alternatives_come_as_ids() -> None:
    tops = [{"token_id:8": -0.1, "token_id:7": -2.5, "token_id:9": -3.0}]
    logprobs = {"token_logprobs": [-2.5], "top_logprobs": tops}
    server = fake_server(lambda self: self.events(chunk(7, logprobs=logprobs, finish="length")))
    asked = {
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "frequency_penalty": -1.0,
        "presence_penalty": 0.5,
        "min_tokens": 1,
    }
    with web_server(server) as url:
        sampling = Sampling(1, logit_bias=((7, 2.0),), logprobs=True, top_logprobs=2, **asked)
        (done,) = ask(remote(url), sampling=sampling)
    assert done.top_logprobs == (((8, -0.1), (7, -2.5)),)
    fields = asked | {"logit_bias": {"7": 2.0}, "logprobs": 2, "return_tokens_as_token_ids": True}
    assert {name: server.requests[0].get(name) for name in fields} == fields


def test_alternatives_as_texts_are_an_error_which_names_the_field() -> None:
    logprobs = {"token_logprobs": [-2.5], "top_logprobs": [{" the": -0.1}]}
    server = fake_server(lambda self: self.events(chunk(7, logprobs=logprobs, finish="length")))
    with web_server(server) as url, pytest.raises(EngineError, match="as texts") as caught:
        ask(remote(url), sampling=Sampling(1, logprobs=True, top_logprobs=2))
    assert "return_tokens_as_token_ids" in (caught.value.hint or "")


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "seeded"])
async def test_an_answer_that_broke_off_is_taken_up_where_it_must_come_out_the_same(sampling: Sampling) -> None:
    server = fake_server(first_then(breaks_off))
    with web_server(server) as url:
        async with remote(url) as engine:
            deltas = await deltas_of(engine.submit([1], sampling))
    assert [delta.ids for delta in deltas] == [(7, 8), (9,)], "nothing twice"
    assert server.requests[0] == server.requests[1]


def test_an_answer_by_chance_that_broke_off_is_not_patched_but_one_that_had_not_begun_is_asked_again() -> None:
    chance = Sampling(max_tokens=12, temperature=1.0)
    with (
        web_server(fake_server(first_then(breaks_off))) as url,
        pytest.raises(EngineError, match="amid an answer") as caught,
    ):
        ask(remote(url), sampling=chance)
    assert "seed" in str(caught.value)
    for before in (lambda self: self.events(end=b""), refuses_with(503), FakeServer.finish):
        with web_server(fake_server(first_then(before))) as url:
            assert ask(remote(url), sampling=chance)[0].ids == (7, 8, 9)


def test_an_answer_that_would_go_on_differently_is_an_error() -> None:
    other = first_then(breaks_off, lambda self: self.events(chunk(7, 6), chunk(9, finish="length")))
    with web_server(fake_server(other)) as url, pytest.raises(EngineError, match="other ids"):
        ask(remote(url))


def test_a_stop_id_at_the_end_of_the_ids_as_vllm_sends_it_is_left_out() -> None:
    def answer(self: FakeServer) -> None:
        self.events(
            chunk(7, logprobs={"token_logprobs": [-1.0]}),
            chunk(8, 2, finish="stop", logprobs={"token_logprobs": [-2, -3]}),
        )

    with web_server(fake_server(answer)) as url:
        (done,) = ask(remote(url), sampling=Sampling(stop_ids=(2,), logprobs=True))
    assert (done.ids, done.logprobs, done.finish) == ((7, 8), (-1.0, -2.0), "stop")


def test_text_of_a_server_that_gives_no_ids_is_made_into_ids_where_the_caller_says_how() -> None:
    def answer(self: FakeServer) -> None:
        texts = [("a", None), ("bc", None), ("", "stop")]
        self.events(*({"choices": [{"index": 0, "text": t, "finish_reason": f}]} for t, f in texts))

    server = fake_server(answer)
    with web_server(server) as url:
        engine = remote(url, encode=lambda text: [ord(c) for c in text])
        assert not engine.features.logprobs
        assert not engine.features.score
        (done,) = ask(engine)
    assert (done.ids, done.finish) == ((97, 98, 99), "stop")
    assert {"return_token_ids", "ignore_eos", "stop_token_ids", "min_p"}.isdisjoint(server.requests[0])


SERVER = """
import asyncio, socket, sys
from pathlib import Path
from corral.answering.answerer import Answerer
from corral.engines.scripted import ScriptedEngine
from corral.model.loading import load_tokenizer
from corral.serving.app import build_app
from corral.serving.admission import Admission
from corral.serving.models import ServedModel, ServedModels
from corral.serving.server import build_http_server
from corral.template import Template
from tests.engines.test_scripted import babble

listener = socket.create_server(("127.0.0.1", 0))
template = Template.load(load_tokenizer(Path(sys.argv[1])))
served = ServedModel(Answerer(ScriptedEngine(babble, delay_seconds=0.01), template), "m")
print(listener.getsockname()[1], flush=True)
admission = Admission()
server = build_http_server(build_app(ServedModels([served]), admission), admission)
asyncio.run(server.serve(sockets=[listener]))
"""


async def test_a_server_that_is_killed_amid_its_answers_costs_none(tiny_folder: Path, template: Template) -> None:
    command = [sys.executable, "-c", SERVER, str(tiny_folder)]
    doomed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    work = [([i + 1], Sampling(100, 2, 1.0, seed=i, logprobs=True)) for i in range(12)]
    try:
        assert doomed.stdout
        port = doomed.stdout.readline().strip()
        with serve_in_thread(ServedModel(Answerer(ScriptedEngine(babble, delay_seconds=0.01), template), "m")) as url:
            async with remote(url, f"http://127.0.0.1:{port}") as engine:
                generations = [engine.submit(*each) for each in work]
                tasks = [asyncio.create_task(generation.completions()) for generation in generations]
                await asyncio.sleep(0.4)
                doomed.kill()
                assert not any(task.done() for task in tasks), "it was killed amid them"
                done = await asyncio.gather(*tasks)
                assert await asyncio.gather(*(complete(engine, *each) for each in work)) == done
    finally:
        doomed.kill()
        doomed.communicate()
    assert all(len(completion.ids) == 100 for completions in done for completion in completions)


@pytest.mark.parametrize("whole", [True, False])
async def test_cancelling_frees_the_servers_work_also_of_a_choice_that_nobody_waits_for(
    whole: bool, template: Template
) -> None:
    endless = Endless()
    with serve_in_thread(ServedModel(Answerer(endless.engine, template), "m")) as url:
        async with remote(url) as engine:
            generation = engine.submit([1], Sampling(5000, 2, stop_ids=() if whole else (43,)))
            if whole:
                assert await asyncio.to_thread(endless.started.wait, 30)
                generation.cancel()
            else:
                generation.cancel(1)  # the other ends by itself, at its third token
            finishes = [completion.finish for completion in await generation.completions()]
            assert finishes == (["cancelled"] * 2 if whole else ["stop", "cancelled"])
            assert await asyncio.to_thread(endless.has_stopped), "the server still works for nobody"


def test_the_example_in_the_documentation_works(template: Template) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", DOCS.read_text("utf-8"), re.S)
    with serve_in_thread(ServedModel(Answerer(ScriptedEngine(babble), template), "quickstart")) as url:
        script = code.replace("http://127.0.0.1:8000", url).replace("http://127.0.0.1:8001", url)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(\(\d+(, \d+)* ?.*\) \w+\n)+.*\n", done.stdout), done.stdout


def test_a_fault_of_ours_is_logged_without_what_was_answered(caplog: pytest.LogCaptureFixture) -> None:
    def encode(text: str) -> list[int]:
        raise ValueError(f"cannot make ids of {text}")

    diary = {"choices": [{"index": 0, "text": "my diary", "finish_reason": "stop"}]}
    with web_server(fake_server(lambda self: self.events(diary))) as url, pytest.raises(EngineError):
        ask(remote(url, encode=encode))
    assert re.search(r"ValueError at .*test_engine\.py:\d+", caplog.text)
    assert "diary" not in caplog.text


def test_corrals_own_server_is_found_able_to_do_all_of_it(tiny: str) -> None:
    engine = remote(tiny, vocabulary=VOCABULARY, probe=True)
    features = engine.features
    assert (features.max_length, features.vocabulary, features.requests) == (
        CONTEXT,
        VOCABULARY,
        ServerLimits().at_once,
    )
    assert features.logprobs and features.score and features.score_top  # noqa: PT018 (one statement about the server)
    assert features.honours == frozenset(OPTIONAL_SAMPLING)
    asyncio.run(engine.close())


async def test_a_vote_among_the_answers_of_a_server_without_log_probs_is_held(tiny_folder: Path) -> None:

    with web_server(fake_server(knows_fields(), models=[{"id": "m"}])) as url:
        opened = connect_model(str(tiny_folder), [url])
        assert opened.answerer.engine.features.max_length == 512, "as its config tells"
        settings = Answer(consensus=Consensus(method="rouge-l", n=2))
        plain = opened.answerer
        answerer = build_answerer(plain.engine, plain.template, settings, examples=list, seed=1)

        async with plain.engine:
            assert (await answerer.answer(Conversation.from_turns(("user", "hi")))).text == "bc"
