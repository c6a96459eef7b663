"""A server with a store in a process that a test can kill, over an engine that answers with the text of the whole prompt.

So an answer shows what was said before. As a process:
`python -m tests.serving.stateful FOLDER DATABASE DELAY LEASE` prints its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import openai

from corral.answering.answerer import Answerer
from corral.engines.base import Features, Sampling
from corral.engines.scripted import ScriptedEngine
from corral.model.loading import load_tokenizer
from corral.serving.admission import Admission
from corral.serving.app import build_app
from corral.serving.database import Database
from corral.serving.models import ServedModel, ServedModels
from corral.serving.responses import build_router
from corral.serving.server import build_http_server
from corral.template import Template

ROOT = Path(__file__).parents[2]


ASK: Any = {"model": "m", "max_output_tokens": 400}


def echo_engine(template: Template, *, delay_seconds: float = 0.0, context: int = 8192) -> ScriptedEngine:
    """An engine that answers with the prompt's text, which ChatML begins each message of with its role."""
    special = set(template.tokenizer.all_special_ids)

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        return [id_ for id_ in ids if id_ not in special]

    features = Features(
        max_length=context, vocabulary=2**20, logprobs=True, score=True, honours=frozenset({"top_logprobs"})
    )
    return ScriptedEngine(reply, features=features, delay_seconds=delay_seconds)


@contextlib.contextmanager
def serve_in_process(
    folder: Path, database: str, *, delay: float = 0.0, lease: float = 20
) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """Serve in a process, which is killed at the end; yields the address and the process."""
    command = [sys.executable, "-m", "tests.serving.stateful", str(folder), database, str(delay), str(lease)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            yield child.stdout.readline().strip(), child
        finally:
            child.kill()


def list_items(client: openai.OpenAI, conversation: str) -> list[tuple[str, str, str]]:
    """(role, status, text) of each item of a conversation."""
    items = client.conversations.items.list(conversation, order="asc")
    return [(item.role, item.status, "".join(part.text for part in item.content)) for item in items]  # type: ignore[union-attr]


def echoed(*turns: str) -> str:
    """What the echo answers to these turns, the user's first."""
    names = ["assistant" if i % 2 else "user" for i in range(len(turns))]
    return "".join(f"{name}\n{text}\n" for name, text in zip(names, turns, strict=True)) + "assistant\n"


def main(folder: str, url: str, delay: str, lease: str) -> None:
    template = Template.load(load_tokenizer(Path(folder)))
    engine = echo_engine(template, delay_seconds=float(delay))
    models, admission = ServedModels([ServedModel(Answerer(engine, template), "m")]), Admission()
    router = build_router(models, Database(url), admission, lease_seconds=float(lease))
    server = build_http_server(build_app(models, admission, routers=[router]), admission)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main(*sys.argv[1:])
