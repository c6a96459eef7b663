"""The chat client against corral's own server and others: its requests, its output and its errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from corral.answering.answerer import Answerer
from corral.chat.client import ServerBackend
from corral.chat.repl import AnswerPiece
from corral.cli import main
from corral.engines.base import Sampling
from corral.engines.embedding import Embedder
from corral.engines.scripted import ScriptedEngine
from corral.errors import CorralError, EngineError, InputError, ModelError
from corral.messages import Conversation
from corral.serving.models import ServedModel, ServedModels
from corral.template import Template
from tests.conftest import web_server
from tests.engines.remote.fake_server import FakeServer, fake_server
from tests.serving.conftest import Endless, serve_in_thread

ASKED = Conversation.from_turns(("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "And you?"))


def model_replying(template: Template, *texts: str, name: str = "m", **engine: Any) -> ServedModel:
    """A model whose choices reply with these texts."""
    ids = [template.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return ServedModel(Answerer(ScriptedEngine(lambda *of: ids[of[2] % len(ids)], **engine), template), name)


def collect(server: ServerBackend, conversation: Conversation = ASKED) -> list[AnswerPiece]:
    try:
        return list(server.stream(conversation))
    finally:
        server.close()


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def thanks(self: FakeServer) -> None:
    self.events(delta(""), delta("Well, "), delta("thanks."), delta(None, "stop"), {"choices": [], "usage": {}})


class Finished(NamedTuple):
    """What `corral chat` wrote, and its exit status."""

    status: int
    out: str
    err: str


Chat = Callable[..., Finished]


@pytest.fixture
def corral_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """`corral_chat(lines, *options)` runs the command with these lines, as a user types them."""

    def run(lines: str, *options: str) -> Finished:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status, shown = main(["chat", *options]), capsys.readouterr()
        return Finished(status, shown.out, shown.err)

    return run


# Requests and answers


def test_an_answer_is_streamed(template: Template) -> None:
    with serve_in_thread(model_replying(template, "Four, I think.")) as url:
        pieces = collect(ServerBackend(url))
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == "Four, I think."
    assert {piece.note for piece in pieces} == {""}


def test_the_whole_conversation_is_sent_with_the_given_options_and_no_others() -> None:
    answers = fake_server(thanks)
    with web_server(answers) as url:
        assert (
            "".join(p.text for p in collect(ServerBackend(f"{url}/v1/", options={"max_tokens": 7}))) == "Well, thanks."
        )
        collect(ServerBackend(f"{url}/openai/v1", model="gpt-5"))
    messages = ASKED.to_json()["messages"]
    assert answers.requests == [
        {"model": "m", "messages": messages, "stream": True, "max_tokens": 7},
        {"model": "gpt-5", "messages": messages, "stream": True},
    ]
    assert answers.paths == ["/v1/models", "/v1/chat/completions", "/openai/v1/chat/completions"]


def test_the_winner_of_a_vote_is_shown_with_its_score(template: Template) -> None:
    wish = {"consensus": {"method": "majority", "n": 3, "stop": "never"}}
    with serve_in_thread(model_replying(template, "It is 5.", "It is 4.", "It is 4.")) as url:
        pieces = collect(ServerBackend(url, options=wish))
    assert "".join(piece.text for piece in pieces) == "It is 4."
    assert [piece.note for piece in pieces if piece.note] == ["[answer 2: majority 0.67 among 3]"]


def test_the_only_chat_model_is_the_default_and_one_of_several_must_be_named(template: Template) -> None:
    models = ServedModels([model_replying(template, "a", name="cook")], Embedder())
    with serve_in_thread(models) as url:
        server = ServerBackend(url)
        assert (server.model, server.url) == ("cook", f"{url}/v1")
        server.close()
    with serve_in_thread(ServedModels([model_replying(template, "a", name=name) for name in ("cook", "poet")])) as url:
        with pytest.raises(ModelError, match="cook, poet") as caught:
            ServerBackend(url)
        assert "--model" in str(caught.value.hint)
        assert collect(ServerBackend(url, model="poet"))


def test_closing_an_answer_cancels_it_on_the_server(template: Template) -> None:
    endless = Endless()
    with serve_in_thread(ServedModel(Answerer(endless.engine, template), "m")) as url:
        server = ServerBackend(url)
        answer = server.stream(ASKED)
        next(answer)
        answer.close()
        assert endless.has_stopped(within=0.5)
        server.close()


# Failures


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "refused": (lambda self: self.answer(400, {}, b'{"error": {"message": "too long"}}'), "400: too long"),
    "no such model": (lambda self: self.answer(404, {}, b'{"error": {"message": "no m"}}'), "--model"),
    "busy": (lambda self: self.answer(429, {"retry-after": "7"}, b'{"error": {"message": "full"}}'), "in 7 s"),
    "a page": (lambda self: self.answer(200, {"content-type": "text/html"}, b"<html>"), "cannot be read"),
    "a page in place of an error": (lambda self: self.answer(502, {}, b"<html>\n<b>Bad gateway</b>"), "502"),
    "no JSON": (lambda self: self.events(end=b"data: {]\n\n"), "cannot be read"),
    "no object": (lambda self: self.events([1]), "cannot be read"),
    "an error amid": (lambda self: self.events(delta("So"), {"error": {"message": "out of memory"}}), "out of memory"),
    "cut off": (lambda self: self.events(delta("So"), end=b""), "lost amid"),
    "a malformed vote": (lambda self: self.events(delta("So", "stop") | {"consensus": {"winner": 3}}), "a vote"),
    "nothing": (lambda self: self.finish(), "lost"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failed_answer_is_one_line_with_the_servers_message(case: str) -> None:
    completion, part = FAULTS[case]
    with web_server(fake_server(completion)) as url, pytest.raises(EngineError) as caught:
        collect(ServerBackend(url))
    line = f"{caught.value.what}; {caught.value.hint}"
    assert part in line
    assert "\n" not in line


def test_an_address_without_an_openai_compatible_server_is_reported_at_once() -> None:
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        ServerBackend("http://127.0.0.1:9")
    assert "http://127.0.0.1:9/v1" in str(caught.value)
    with web_server(fake_server(thanks, do_GET=lambda self: self.answer(200, {}, b"<html>"))) as url:
        with pytest.raises(ModelError, match="cannot be read") as caught:
            ServerBackend(url)
        assert "/v1" in str(caught.value.hint)
    for url in ("127.0.0.1:8000", "ftp://x", "http://me:secret@x/v1"):
        with pytest.raises(InputError) as refused:
            ServerBackend(url)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_reported_without_showing_it_even_if_the_server_does(status: int) -> None:
    body = b'{"error": {"message": "no such key: sesame-1"}}'
    refuses: Any = lambda self: self.answer(status, {}, body)  # noqa: E731
    for answers in (fake_server(refuses), fake_server(thanks, do_GET=refuses)):
        with web_server(answers) as url, pytest.raises(CorralError) as caught:
            collect(ServerBackend(url, key="sesame-1"))
        assert "CORRAL_API_KEY" in str(caught.value)
        assert "sesame" not in str(caught.value) + repr(caught.value)


def test_malformed_events_and_input_cost_one_turn_at_most(corral_chat: Chat) -> None:
    vote = {"method": "rouge-l", "winner": float("inf"), "candidates": [{"score": 1.0}], "cancelled": 0}
    sent: list[Callable[[FakeServer], None]] = [
        lambda self: self.events(delta("half \ud800 a character", "stop")),
        lambda self: self.answer(200, {"content-type": "text/event-stream"}, b"data: " + b"[" * 10**5 + b"\n\n"),
        lambda self: self.events(delta("So", "stop") | {"consensus": vote}),
        thanks,
    ]
    answers = fake_server(lambda self: sent[len(self.requests) - 1](self))
    with web_server(answers) as url:
        shown = corral_chat("Hello\nbyte \udcff\nagain\nlast\n", "--url", url)
    assert shown.status == 0
    assert "half \ufffd a character" in shown.out
    assert shown.err.count("the server's answer cannot be read") == 2
    sent_before = [message["content"] for message in answers.requests[-1]["messages"]]
    assert sent_before == ["Hello", "half \ufffd a character", "last"], "the conversation is kept"
    assert answers.requests[1]["messages"][-1]["content"] == "byte \ufffd"


def test_control_characters_in_errors_votes_and_model_names_do_not_reach_the_terminal(corral_chat: Chat) -> None:
    steering = "\x1b]0;title\x07\x1b[2J\x9b2J\u202e"
    vote = {"method": f"{steering}rouge-l", "winner": 0, "candidates": [{"score": 1.0}], "cancelled": 0}
    name = f"{steering}other"
    answers = fake_server(
        lambda self: (
            self.events(delta("So", "stop") | {"consensus": vote})
            if len(self.requests) == 1
            else self.answer(400, {}, json.dumps({"error": {"message": f"{steering}too long"}}).encode())
        ),
        do_GET=lambda self: self.answer(200, {}, json.dumps({"data": [{"id": name}]}).encode()),
    )
    with web_server(answers) as url:
        one_model = corral_chat("Hello\nagain\n", "--url", url)
    assert answers.requests[0]["model"] == name
    two = json.dumps({"data": [{"id": name}] * 2}).encode()
    with web_server(fake_server(thanks, do_GET=lambda self: self.answer(200, {}, two))) as url:
        two_models = corral_chat("", "--url", url)
    assert (one_model.status, two_models.status) == (0, 2)
    errors = one_model.err + two_models.err
    for part in ("chatting with ", "rouge-l 1.00 among 1]", "too long", "the server has 2 models"):
        assert part in errors
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(errors)


# The command line


def test_the_key_comes_from_the_option_or_the_environment(corral_chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = fake_server(thanks)
    monkeypatch.delenv("CORRAL_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "of openai")
    with web_server(answers) as url:
        for key, options in ((None, []), ("of corral", []), ("given", ["--key", "given"])):
            if key == "of corral":
                monkeypatch.setenv("CORRAL_API_KEY", key)
            shown = corral_chat("Hello\n", "--url", url, *options)
            assert (shown.status, shown.out.splitlines().count("Well, thanks.")) == (0, 1)
    keys = [None, "Bearer of corral", "Bearer given"]
    for headers in (answers.headers_of_lists, answers.headers_of_requests):
        assert [each.get("authorization") for each in headers] == keys


def test_the_key_of_openai_is_sent_to_openai_only(corral_chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str | None, str]] = []

    def auth_header(key: str | None, url: str) -> dict[str, str]:
        sent.append((key, url))
        return {}

    monkeypatch.setattr("corral.chat.client.auth_header", auth_header)
    monkeypatch.setenv("OPENAI_API_KEY", "of openai")
    monkeypatch.delenv("CORRAL_API_KEY", raising=False)
    elsewhere = "http://api.openai.com", "https://api.openai.com.example/v1", "https://example.com/api.openai.com/v1"
    for url in ("https://api.openai.com", "https://API.openai.com:443/v1/", *elsewhere):
        assert corral_chat("", "--url", url, "--model", "m").status == 0, "no request is sent"
    assert [key for key, _ in sent] == ["of openai"] * 2 + [None] * 3


def test_host_and_port_replace_the_url_and_options_are_sent(corral_chat: Chat) -> None:
    answers = fake_server(thanks)
    with web_server(answers) as url:
        port = url.rpartition(":")[2]
        for options in (["--host", "127.0.0.1", "--port", port], ["--port", port]):
            drawn = ["--temperature", "0.5", "--consensus", "rouge-l", "--n", "3", "--system", "Be brief."]
            assert corral_chat("Hello\n", *options, *drawn).status == 0
    (first, second) = answers.requests
    assert first == second
    assert (first["temperature"], first["consensus"]) == (0.5, {"method": "rouge-l", "n": 3})
    assert "max_tokens" not in first
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "corral chat --url"),
        (["--url", "http://a", "--url", "http://b"], "2 servers"),
        (["--url", "http://a", "--port", "1"], "2 servers"),
        (["--url", "http://a", "--engine", "transformers"], "--engine"),
        (["--url", "http://a", "--shots", "3"], "--shots"),
        (["--url", "http://a", "--n", "3"], "--consensus"),
        (["nowhere", "--model", "m"], "--model"),
        (["nowhere", "--host", "a"], "--host"),
        (["nowhere", "--key", "k"], "--key"),
    ],
)
def test_options_that_contradict_each_other_or_name_no_server_are_refused(
    options: list[str], part: str, corral_chat: Chat
) -> None:
    refused = corral_chat("", *options)
    assert refused.status == 2
    assert part in refused.err


def test_chat_with_a_server_imports_only_the_http_client() -> None:
    code = """
import io, sys
from corral.cli import main
sys.stdin = io.StringIO("Hello\\n/retry\\n")
assert main(["chat", "--url", sys.argv[1]]) == 0
loaded = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
own = {"corral", "__main__", "httpx2", "httpcore2", "h11", "idna", "certifi", "truststore", "anyio", "sniffio"}
foreign = {name for name in loaded - own if not name.startswith(("_", "typing_extensions"))}
sys.exit(f"loaded: {sorted(foreign)}" if foreign else 0)
"""
    with web_server(fake_server(thanks)) as url:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Well, thanks."] * 2 + [""]


def test_sampling_options_reach_the_engine(template: Template) -> None:
    drawn: list[Sampling] = []

    def reply(ids: Any, sampling: Sampling, choice: int) -> list[int]:
        drawn.append(sampling)
        return [50]

    with serve_in_thread(ServedModel(Answerer(ScriptedEngine(reply), template), "m")) as url:
        collect(ServerBackend(url, options={"max_tokens": 9, "temperature": 0.25, "top_p": 0.5}))
    assert [(s.max_tokens, s.temperature, s.top_p) for s in drawn] == [(9, 0.25, 0.5)]
