"""Servers with a store, over an engine that answers with what it was asked: here, or in a process that a test can kill.

The answer is the text of the whole prompt, so that it shows what was said before. As a process:
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
from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.generation import ServedModel
from corral.serving.responses_routes import build_router
from corral.serving.served_models import ServedModels
from corral.serving.server import build_http_server
from corral.template import Template
from tests.serving.conftest import serve_in_thread

ROOT = Path(__file__).parents[2]


ASK: Any = {"model": "echo", "max_output_tokens": 400}


def echo_model(template: Template, *, delay_seconds: float = 0.0, context: int = 8192) -> ServedModel:
    """A model that answers with the prompt's text, which ChatML begins each message of with its role."""
    special = set(template.tokenizer.all_special_ids)

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
        return [id_ for id_ in ids if id_ not in special]

    features = Features(max_length=context, vocabulary=2**20, logprobs=True, score=True)
    return ServedModel(
        Answerer(ScriptedEngine(reply, features=features, delay_seconds=delay_seconds), template), "echo"
    )


@contextlib.contextmanager
def serve_with_store(
    served: ServedModel,
    database: str | Database,
    *,
    admission: Admission | None = None,
    lease_seconds: float = 20,
) -> Generator[str]:
    """Serve in a thread; yields the address."""
    opened = Database(database) if isinstance(database, str) else database
    models, admission = ServedModels([served]), admission or Admission()
    conversations = ConversationStore(opened, lease_seconds=lease_seconds)
    try:
        with serve_in_thread(
            models, admission=admission, routers=[build_router(models, conversations, admission)]
        ) as url:
            yield url
    finally:
        opened.close()


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
    """What the echo scripted_model when it was asked with these turns, from the user's on."""
    names = ["assistant" if i % 2 else "user" for i in range(len(turns))]
    return "".join(f"{name}\n{text}\n" for name, text in zip(names, turns, strict=True)) + "assistant\n"


def main(folder: str, url: str, delay: str, lease: str) -> None:
    models, admission = (
        ServedModels([echo_model(Template.load(load_tokenizer(Path(folder))), delay_seconds=float(delay))]),
        Admission(),
    )
    conversations = ConversationStore(Database(url), lease_seconds=float(lease))
    server = build_http_server(
        build_app(models, admission, routers=[build_router(models, conversations, admission)]), admission
    )
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main(*sys.argv[1:])
