"""`corral serve`: the requests of its documentation, its answers, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import openai
import pytest

from corral import recipe
from corral.answering.open_model import open_model
from corral.answering.settings import AnswererSettings, load_answer_settings
from corral.cli import parser
from corral.engines.base import Sampling
from corral.messages import Conversation
from tests.conftest import run_python
from tests.e2e.conftest import fail, succeed
from tests.forked import Forked, start_corral
from tests.recipe.test_recipe import GOOD

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs/serving.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


@contextlib.contextmanager
def serving(*args: object) -> Generator[tuple[str, Forked]]:
    """Start a server on a free port; yields its output up to its address, and the process."""
    process = start_corral("serve", *args, "--port", "0", "--engine", "transformers")
    try:
        while not re.search("try: curl .*\n", process.errors):
            assert process.is_running, f"it ended before it served: {process.errors}"
            time.sleep(0.02)
        yield process.errors, process
    finally:
        process.kill()
        process.finish()


def address(output: str) -> str:
    match = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", output)
    assert match, output
    return match[1]


def curl(command: str, url: str) -> Any:
    """Send the request of a `curl` command; returns the JSON or the text of the response."""
    words = shlex.split(command.replace("http://127.0.0.1:8000", url))
    options = list(zip(words[2::2], words[3::2], strict=True))
    headers = dict(value.split(": ") for name, value in options if name == "-H")
    data = next((value.encode() for name, value in options if name == "-d"), None)
    with urllib.request.urlopen(urllib.request.Request(words[1], data, headers)) as response:
        text = response.read().decode()
        return text if response.headers["content-type"].startswith("text/") else json.loads(text)


@pytest.fixture(scope="module")
def quickstart(finished_run: Path) -> Generator[str]:
    """The address of a server of the finished run, with the model name that the documentation uses."""
    with serving(finished_run, "--name", "quickstart", "--embeddings") as (output, _):
        yield address(output)


def test_every_request_in_the_documentation_works(quickstart: str) -> None:
    docs_commands, readme_commands = (re.findall(r"^curl .*$", page, re.M) for page in (DOCS, README))
    docs_commands = [command for command in docs_commands if "lora_adapter" not in command]  # see the test of adapters
    assert (len(docs_commands), len(readme_commands)) == (4, 1)
    for command in [*docs_commands, *readme_commands]:
        answer = curl(command, quickstart)
        is_list = answer.get("object") == "list" and answer["data"]
        assert is_list or answer.get("status") == "ok" or answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert ("consensus" in command) == ("consensus" in answer)


def test_the_python_in_the_documentation_works(quickstart: str) -> None:
    outputs = []
    for code in re.findall(r"```python\n(.*?)```", DOCS, re.S):
        script = code.replace("http://127.0.0.1:8000", quickstart)
        done = run_python("-c", script)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    completions, conversations, embeddings = outputs
    assert re.search(r"^2 (stop|length) ", completions, re.M)
    assert re.findall(r"^(user|assistant) ", conversations, re.M)[:2] == ["user", "assistant"]
    assert re.fullmatch(r"2 384 \d+\n", embeddings)


def test_every_serve_and_keys_command_in_the_documentation_parses() -> None:
    commands = re.findall(r"^(?:ExecStart=/\S+/)?(corral (?:serve|keys) .*)$", DOCS, re.M)
    assert len(commands) > 10
    for command in commands:
        assert parser().parse_args(shlex.split(command)[1:]).verb in ("serve", "keys")


def test_the_settings_in_the_documentation_are_settings_of_a_recipe() -> None:
    (section,) = re.findall(r"```toml\n(\[serve\].*?)```", DOCS, re.S)
    assert len(recipe.parse(f"{GOOD}\n{section}", where="docs").serve.changes()) == 4


def test_the_adapter_requests_in_the_documentation_work(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "train-1-sft" / "adapter", tmp_path / "cook-v2")
    base = json.loads((tmp_path / "cook-v2" / "adapter_config.json").read_text())["base_model_name_or_path"]
    load, unload = re.findall(r"^curl .*lora_adapter.*$", DOCS, re.M)
    with serving(base, "--adapters", tmp_path) as (output, _):
        url = address(output)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert "added" in curl(load, url)
            assert "cook" in [model.id for model in client.models.list()]
            assert client.completions.create(model="cook", prompt="Hello", max_tokens=4).choices
            assert "removed" in curl(unload, url)
            assert "cook" not in [model.id for model in client.models.list()]


def test_the_server_answers_as_the_answerer_does_with_the_same_seed(quickstart: str, finished_run: Path) -> None:
    questions = [f"What is {i} plus {i}?" for i in range(4)]
    with openai.OpenAI(base_url=f"{quickstart}/v1", api_key="none", max_retries=0) as client:
        served = [
            client.chat.completions.create(
                model="quickstart", messages=[{"role": "user", "content": text}], seed=7, n=2, max_tokens=24
            )
            for text in questions
        ]

    async def work() -> list[tuple[str, ...]]:
        opened = open_model(str(finished_run), "transformers")
        async with opened.answerer.engine:
            sampling = Sampling(24, 2, temperature=1.0, seed=7)
            answers = [
                await opened.answerer.answer(Conversation.from_turns(("user", text)), sampling) for text in questions
            ]
        settings = AnswererSettings(str(finished_run), *load_answer_settings(str(finished_run), {}))
        identity = settings.identity_on(opened.identity)
        assert {answer.system_fingerprint for answer in served} == {f"fp_{identity.digest}"}
        return [answer.texts for answer in answers]

    assert [tuple(c.message.content for c in answer.choices) for answer in served] == asyncio.run(work())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_answers_finish_and_sets_the_exit_code(
    number: signal.Signals, code: int, tiny_folder: Path
) -> None:
    with serving(tiny_folder) as (output, process):
        command = re.search(r"try: (curl .*)", output)
        assert command
        assert curl(command[1], "")["model"] == tiny_folder.name
        client = openai.OpenAI(base_url=f"{address(output)}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model=tiny_folder.name, messages=[{"role": "user", "content": "Hi"}], seed=1, max_tokens=40, stream=True
        )
        chunks = [next(iter(stream))]
        process.send_signal(number)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason
        done = process.finish()
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        client.close()


def test_a_port_in_use_is_one_clear_error(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fail(2, ["in use", "next:"], "serve", tiny_folder, "--port", taken.getsockname()[1])


@pytest.mark.full
def test_a_followed_run_that_is_made_again_is_served_anew_without_ending_a_stream(run_copy: Path) -> None:
    with serving(run_copy, "--follow") as (output, process):
        client = openai.OpenAI(base_url=f"{address(output)}/v1", api_key="none", max_retries=0)
        (model,) = [each.id for each in client.models.list()]
        asked: Any = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.5}
        stream = client.chat.completions.create(**asked, seed=1, max_tokens=400, stream=True)
        chunks = [next(iter(stream))]
        succeed("run", run_copy.parent / "r.toml", "--out", run_copy, "--set", "train.0.seed=77")
        fingerprint = chunks[0].system_fingerprint
        while client.chat.completions.create(**asked, max_tokens=1).system_fingerprint == fingerprint:
            assert process.is_running, process.errors
            time.sleep(0.1)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert {chunk.system_fingerprint for chunk in chunks} == {fingerprint}
        client.close()
