"""Fixtures that several folders of tests use: a tiny tokenizer and Llama, a finished run, rows, a local web server."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# No test may reach a model hub: what it needs comes from packages or is created here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Runs are compared bit for bit, which needs the same number of threads in all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A background shell and nohup ignore these signals, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Try each property on fewer examples where the tests marked `full` are left out. No example has a time limit: what a
    first call imports would count against one."""
    settings.register_profile("full", deadline=None)
    settings.register_profile("quick", deadline=None, max_examples=30)
    settings.load_profile("quick" if config.option.markexpr == "not full" else "full")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is an `async def` in an event loop of its own; its fixtures are not in that loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


def pytest_collection_finish() -> None:
    """Spare later collections of garbage the modules and tests that were loaded: they stay, and there are millions."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests away from the keys and conversations of the user who runs them."""
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
    """A byte-level BPE tokenizer with ChatML's special tokens."""
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
    """A random Llama of two layers with grouped-query attention, with the same weights in every test."""
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
        "pad_token_id": 0,  # its embedding starts as zeros, like that of an untrained token
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Let the first of several pytest-xdist workers build a folder; the others wait for it."""
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            build(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all pytest-xdist workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer: Any, shared_folder: Path) -> Path:
    """The tiny model and tokenizer as a Hugging Face folder with a ChatML template."""

    def build(folder: Path) -> None:
        from corral.template import Template

        make_tiny_model(len(tiny_tokenizer)).save_pretrained(folder)
        Template.load(tiny_tokenizer, "chatml").save(folder)

    return build_once(shared_folder / "tiny", build)


@pytest.fixture(scope="session")
def taught_folder(tiny_folder: Path, shared_folder: Path) -> Path:
    """The tiny model, taught to answer a few prompts."""

    def build(folder: Path) -> None:
        from corral.model.loading import load_template
        from tests.training.guarded import teach

        teach(tiny_folder, load_template(tiny_folder), folder)

    return build_once(shared_folder / "taught", build) / "model"


RECIPE = """
name = "tiny"
seed = 3
[model]
base = "{model}"
[data]
max_length = 128
[[data.sources]]
path = "rows.jsonl"
[data.split]
validation = 0.15
test = 0.2
[[train]]
steps = 8
batch_size = 4
evaluate_every = 4
checkpoint_every = 2
[train.lora]
rank = 4
[train.optimizer]
lr = 5e-3
[evaluate]
engine = "transformers"
loss_rows = 12
answer_rows = 6
[answer]
max_tokens = 12
"""


def write_rows(path: Path, count: int = 80) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"{2 * i}."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, **values: Any) -> None:
    """Change the JSON object in a file: by a function, and by values of some of its keys."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content | values), "utf-8")


def write_workspace(folder: Path, model: Path) -> None:
    """Write the tiny recipe `r.toml` and its `rows.jsonl`."""
    (folder / "r.toml").write_text(RECIPE.format(model=model))
    write_rows(folder / "rows.jsonl")


def run_python(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments, in a process of its own."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.fixture(scope="session")
def finished_run(tiny_folder: Path, shared_folder: Path) -> Path:
    """The tiny recipe's run directory, made once by `corral run`; its parent has `r.toml` and `rows.jsonl`. Read only."""

    def build(folder: Path) -> None:
        write_workspace(folder, tiny_folder)
        done = run_python("-m", "corral", "run", folder / "r.toml", "--out", folder / "run")
        assert done.returncode == 0, done.stderr

    return build_once(shared_folder / "finished", build) / "run"


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that this process writes have pictures of one pixel; so have those of `tests.forked`."""
    from tests import unrendered

    monkeypatch.setattr("corral.report.plots._picture", unrendered.picture)


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run directory, which a test may change; its parent has `r.toml` and `rows.jsonl` too."""
    return Path(shutil.copytree(finished_run.parent, tmp_path / "workspace")) / "run"


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


@pytest.fixture
def llama() -> Generator[Callable[..., Any]]:
    """Loads GGUF files in llama.cpp, (path, context) → `Llama`; closes them all."""
    module = pytest.importorskip("xllamacpp")
    from tests.llama_cpp import Llama

    opened: list[Llama] = []

    def load(path: Path, context: int = 512) -> Llama:
        opened.append(Llama(module, path, context))
        return opened[-1]

    yield load
    for one in opened:
        del one.server


@contextmanager
def unprivileged(folder: Path) -> Generator[None]:
    """As root, which may read and write everything, become another user for a while, who may list `folder`."""
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


@contextmanager
def file_size_limit(largest: int) -> Generator[None]:
    """Let the system refuse to write files of more bytes to this process."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def mount_small_disk(folder: Path, size: str) -> Generator[Path]:
    """A disk of a few pages in a new folder; the test is skipped if this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk; limits on file sizes are tested in any case")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Request(BaseHTTPRequestHandler):
    """A handler of requests to a local web server, which logs nothing; tests override its `do_…` methods."""

    def answer(self, status: int, headers: Mapping[str, str], body: bytes = b"{}") -> None:
        """Send a response; without its body to a HEAD request."""
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
    """Run a local web server during the block, on any free port unless one is given; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", port), answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
