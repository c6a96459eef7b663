"""The hub's own client libraries against a server on this machine that plays the hub; the real hub was not asked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Request, web_server

COMMIT = hashlib.sha1(b"a commit").hexdigest()
CONVERTED = hashlib.sha1(b"the hub's conversion").hexdigest()
CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*.parquet
  - split: test
    path: main/test.parquet
- config_name: lines
  data_files:
  - split: test
    path: main/test.jsonl
---
"""
TABLES = """---
configs:
- config_name: plain
  data_files: other.csv
- config_name: tabs
  data_files: tabs.csv
  sep: "\\t"
- config_name: semicolons
  data_files: semicolons.csv
  sep: ";"
- config_name: odd
  data_files: other.csv
  skiprows: 1
---
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES: dict[str, dict[str, bytes]] = {
    "good/configs": {
        "README.md": CARD.encode(),
        "main/train-00000-of-00002.parquet": parquet([{"question": "1?", "answer": "1"}]),
        "main/train-00001-of-00002.parquet": parquet([{"question": "2?", "answer": "2"}]),
        "main/test.parquet": parquet([{"question": "3?"}]),
        "main/test.jsonl": b'{"question": "3?", "answer": "3"}\n{"question": \n',
    },
    "good/tables": {
        "README.md": TABLES.encode(),
        "other.csv": b"a,b\n1,2\n",
        "tabs.csv": b"a\tb\n1\t2,3\n",
        "semicolons.csv": b"a,0;b\n1;2,3\n",
    },
    "good/plain": {
        "train.jsonl.gz": gzip.compress(b'{"chosen": "a", "rejected": "b"}\n'),
        "test.jsonl.gz": gzip.compress(b'{"chosen": "c", "rejected": "d"}\n'),
    },
    "good/folders": {
        "one/train.jsonl": b'{"a": 1}\n',
        "two/train.jsonl": b'{"a": 2}\n',
        "two/test.jsonl": b'{"a": 3}\n',
    },
    "good/list": {"README.md": b"# No configuration", "rows.json": b'[{"a": 1}, {"a": 2}]'},
    "good/script": {"script.py": b"import this", "README.md": b"# A script"},
    "good/images": {"train/a.png": b"\x89PNG"},
    "good/mixed": {"train.csv": b"a\n1\n", "test.jsonl": b"{}"},
    "good/nothing": {"README.md": b"# Empty"},
}
BRANCH: dict[str, bytes] = {
    "one/train/0000.parquet": parquet([{"a": 1}]),
    "one/test/0000.parquet": parquet([{"a": 9}]),
    "two/train/0000.parquet": parquet([{"a": 2}]),
}
REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
    "unknown": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "secret": (401, {"X-Error-Message": "Invalid username or password."}),
    "broken": (503, {}),
}


class Hub(Request):
    """Answers as the hub does: about a data set, its files, and with their content."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/datasets/")
        owner, name, *rest = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        if owner in REFUSALS:
            status, headers = REFUSALS[owner]
            return self.answer(status, headers)
        repo = f"{owner}/{name}"
        what, rest = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        joined = "/".join(rest)
        if joined.startswith("refs/convert/parquet"):
            rest = [CONVERTED, *rest[3:]]
        revision = COMMIT if rest[0] == "main" else rest[0]
        files = {COMMIT: FILES.get(repo), CONVERTED: BRANCH}.get(revision)
        if files is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        inside = "/".join(rest[1:])
        if api and what == "revision":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": revision, "siblings": siblings, "tags": [], "private": False}
            return self.send(info)
        if api and what == "tree":
            return self.send([e for e in self.entries(files) if e["path"].startswith(inside)])
        if api and what == "paths-info":
            content = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content)["paths"]
            return self.send([entry for entry in self.entries(files) if entry["path"] in wanted])
        if what != "resolve" or inside not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        etag = f'"{hashlib.sha1(files[inside]).hexdigest()}"'
        return self.answer(200, {"ETag": etag, "X-Repo-Commit": revision}, files[inside])

    do_HEAD = do_POST = do_GET

    def send(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    @staticmethod
    def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            parts = name.split("/")
            for i in range(1, len(parts)):
                folder = "/".join(parts[:i])
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            found[name] = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        return list(found.values())


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that plays the hub, and what it was asked."""
    with web_server(Hub) as address:
        yield address, Hub.asked


def ask(endpoint: str, folder: Path, *sources: dict[str, Any], offline: bool = False) -> list[dict[str, Any]]:
    """What reading each source gives, in a process with its own hub settings and caches."""
    code = """
import json, sys
from corral.data.sources import hash_source, read_rows
from corral.errors import CorralError
from corral.progress import Progress
from corral.recipe import Source
class Listener(Progress):
    def say(self, text):
        messages.append(text)
for settings in sys.argv[1:]:
    messages = []
    source = Source(**json.loads(settings))
    try:
        rows = list(read_rows(source, Listener()))
        answer = {"values": [row.value for row in rows], "locations": [row.location for row in rows], "messages": messages}
        answer["faults"] = [row.fault for row in rows if row.fault]
        answer["identity"] = hash_source(source)
    except CorralError as error:
        answer = {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    print(json.dumps(answer))
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(folder / "hf"),
    }
    environment |= {"CORRAL_CACHE": str(folder / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_DATASETS_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, sources)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def source(path: str, **settings: Any) -> dict[str, Any]:
    return {"path": f"hub:{path}", **settings}


def test_a_configuration_and_split_are_read_once_pinned_and_found_again_offline(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    sources = [
        source("good/configs", config="main"),
        source("good/configs", config="lines", split="test"),
        source("good/tables", config="plain"),
        source("good/tables", config="tabs"),
        source("good/plain"),
        source("good/list"),
        source(f"good/list@{COMMIT}"),
        source("good/script@refs/convert/parquet", config="one"),
    ]
    answers = ask(endpoint, tmp_path, *sources)
    train, test, other, tabs, plain, listed, pinned, converted = answers
    assert train["values"] == [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "2"}]
    assert train["locations"][1] == "main/train-00001-of-00002.parquet, row 1"
    assert train["messages"] == [f"hub:good/configs: train at revision {COMMIT}"]
    assert test["values"] == [{"question": "3?", "answer": "3"}, None]
    assert test["faults"][0].startswith("line 2, column 13: not valid JSON")
    assert (other["values"], tabs["values"]) == ([{"a": "1", "b": "2"}], [{"a": "1", "b": "2,3"}])
    assert plain["values"] == [{"chosen": "a", "rejected": "b"}]
    assert listed["values"] == pinned["values"] == [{"a": 1}, {"a": 2}]
    assert listed["identity"] == pinned["identity"]
    assert converted["values"] == [{"a": 1}]
    fetched = [line for line in asked if line.startswith("GET") and "/resolve/" in line and "train-0000" in line]
    assert len(fetched) == 2, "each file is downloaded once"
    before = len(asked)
    assert ask(endpoint, tmp_path, *sources, offline=True) == answers
    assert len(asked) == before


def test_a_folder_or_files_of_a_data_set_are_chosen(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    sources = [
        source("good/folders", data_dir="one"),
        source("good/folders", data_dir="two", split="test"),
        source("good/folders", data_files="two/train.jsonl"),
        source("good/folders", data_files=["two/*.jsonl", "one/train.jsonl"]),
        source("good/tables", config="semicolons"),
    ]
    answers = ask(endpoint, tmp_path, *sources)
    values = [[row["a"] for row in answer["values"]] for answer in answers[:4]]
    assert (*values[:3], sorted(values[3])) == ([1], [3], [2], [1, 2, 3])
    assert answers[4]["values"] == [{"a,0": "1", "b": "2,3"}]
    assert ask(endpoint, tmp_path, *sources, offline=True) == answers
    for settings, name in (({"data_files": "three.jsonl"}, "three.jsonl"), ({"data_dir": "four"}, "four")):
        (missing,) = ask(endpoint, tmp_path, source("good/folders", **settings))
        assert missing["what"] == f"hub:good/folders has no data file {name!r}"
        assert "`data_files`" in missing["hint"]


def test_each_refusal_says_what_to_do(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    cases = {
        "is gated: its terms must be accepted": source("gated/data"),
        "knows no data set 'unknown/data'": source("unknown/data"),
        "HTTP 401": source("secret/data"),
        "HTTP 503": source("broken/data"),
        "no revision 'nope'": source("good/list@nope"),
        "no configuration 'mian'": source("good/configs", config="mian"),
        "several configurations, and the source names none": source("good/configs"),
        "no split 'validation'": source("good/configs", config="main", split="validation"),
        "is a Python script": source("good/script"),
        "several configurations": source("good/script@refs/convert/parquet"),
        "sets reading options that corral does not support (skiprows)": source("good/tables", config="odd"),
        "'.png' is no kind of file": source("good/images"),
        "holds no data files that can be read": source("good/nothing"),
        "Couldn't infer the same data file format for all splits": source("good/mixed"),
        "is not a hub id": source("no-owner"),
    }
    answers = dict(zip(cases, ask(endpoint, tmp_path, *cases.values()), strict=True))
    for says, answer in answers.items():
        assert answer.get("kind") == "DataError", (says, answer)
        assert says in answer["what"], (says, answer)
        assert answer["hint"], says
    assert "HF_TOKEN" in answers["is gated: its terms must be accepted"]["hint"]
    assert "main, lines" in answers["no configuration 'mian'"]["hint"]
    assert "train, test" in answers["no split 'validation'"]["hint"]
    assert "hub:good/script@refs/convert/parquet" in answers["is a Python script"]["hint"]


def test_an_unreachable_hub_is_reported(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    for offline in (False, True):
        (answer,) = ask(endpoint, tmp_path, source("good/list"), offline=offline)
        assert "cannot be reached" in answer["what"]
        assert answer["where"] == endpoint
