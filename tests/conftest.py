"""What more than one folder of tests uses: a tiny tokenizer, a tiny random Llama, rows, a web server on this machine."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# No test may reach a model hub: what it needs comes from packages or is made here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# In the background of a shell, or under nohup, these are ignored, and so would they be in what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keys and conversations of whoever runs the tests are none of theirs."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system What is two plus two? Four. Five? No.",
    "Write a recipe: flour, sugar, butter, eggs, milk, salt and pepper. Mix, bake, serve.",
    "def double(x): return 2 * x",
    "Ünïcode — 東京 🙂 Grüße",
]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with ChatML's special tokens, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


@pytest.fixture
def tiny_model(tiny_tokenizer: Any) -> Any:
    """A random Llama of two layers with grouped-query attention, the same at each call."""
    return make_tiny_model(len(tiny_tokenizer))


def make_tiny_model(vocabulary: int, **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,  # its embedding starts as zeros, which is what an untrained token looks like
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and tokenizer as a Hugging Face folder with a ChatML template."""
    from corral.template import Template

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(len(tiny_tokenizer)).save_pretrained(folder)
    Template.load(tiny_tokenizer, "chatml").save(folder)
    return folder


@pytest.fixture(scope="session")
def encoded_rows(tiny_tokenizer: Any) -> list[Any]:
    """Encoded conversations of varied length."""
    from corral.messages import Conversation
    from corral.template import Template

    template = Template.load(tiny_tokenizer, "chatml")
    rows = []
    for i in range(24):
        question = f"What is {i} plus {i}? " + CORPUS[i % len(CORPUS)] * (i % 3)
        rows.append(
            template.encode(
                Conversation.from_turns(("user", question), ("assistant", f"It is {2 * i}. " * (1 + i % 4)))
            )
        )
    return rows


@pytest.fixture(scope="session")
def template(tiny_folder: Path) -> Any:
    """The tiny model's template."""
    from corral.model.loading import load_tokenizer
    from corral.template import Template

    return Template.load(load_tokenizer(tiny_folder))


@contextmanager
def unprivileged(folder: Path) -> Generator[None]:
    """Root may read and write anything: be somebody else for a while, who may look into `folder`."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.parents):
        if path != Path(tempfile.gettempdir()) and path.is_relative_to(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class Request(BaseHTTPRequestHandler):
    """A request to a web server on this machine: a test says what to answer. Nothing is written to a log."""

    def answer(self, status: int, headers: Mapping[str, str], body: bytes = b"{}") -> None:
        """The whole answer, without its body if only the head is asked for."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def web_server(answers: type[Request], port: int = 0) -> Generator[str]:
    """The address of a web server, on this machine while the block runs; at any free port unless one is given."""
    with ThreadingHTTPServer(("127.0.0.1", port), answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
