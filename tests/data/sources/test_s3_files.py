"""Against moto's S3 server, another implementation of the service, on this machine."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from corral.data.prepare import Prepared
from corral.data.sources import hash_source
from corral.recipe import Source
from tests.data.conftest import chats
from tests.data.sources.conftest import refusal, rows_of, values_of

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto.server", reason="moto, an S3 server for tests, is not installed")
pytest.importorskip("flask_cors", reason="moto's server needs it")

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system of a fresh bucket `rows`, with the credentials set for what is tested."""
    import s3fs

    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    system: Any = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if system.exists("rows"):
        system.rm("rows", recursive=True)
    system.mkdir("rows")
    return system


def test_an_object_a_prefix_and_a_glob_are_read_with_locations(bucket: Any) -> None:
    bucket.pipe("rows/set/b.jsonl", b'{"a": 3}\n{"a": \n')
    bucket.pipe("rows/set/a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    bucket.pipe("rows/set/_SUCCESS", b"x")
    assert values_of("s3://rows/set/a.jsonl.gz") == [{"a": 1}, {"a": 2}]
    assert [(row.index, row.value, row.location) for row in rows_of("s3://rows/set")] == [
        (1, {"a": 1}, "a.jsonl.gz, line 1"),
        (2, {"a": 2}, "a.jsonl.gz, line 2"),
        (1, {"a": 3}, "b.jsonl, line 1"),
        (2, None, "b.jsonl, line 2"),
    ]
    assert [row.location for row in rows_of("s3://rows/*/*.jsonl*")][:1] == ["set/a.jsonl.gz, line 1"]


def test_a_prefix_is_read_as_a_folder_is(bucket: Any) -> None:
    import pyarrow as pa

    bucket.pipe("rows/clone/train.jsonl", b'{"a": 1}\n')
    bucket.pipe("rows/clone/test.jsonl", b'{"a": 2}\n')
    bucket.pipe("rows/clone/dataset_infos.json", b"{}")
    assert values_of("s3://rows/clone") == [{"a": 1}]
    data = pa.table({"a": [3]})
    for split in ("train", "test"):
        with bucket.open(f"rows/saved/{split}/0.arrow", "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data)
        bucket.pipe(f"rows/saved/{split}/state.json", b'{"_data_files": [{"filename": "0.arrow"}]}')
    bucket.pipe("rows/saved/dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert values_of("s3://rows/saved") == [{"a": 3}]
    bucket.pipe("rows/pointer/a.jsonl", b"version https://git-lfs.github.com/spec/v1\n")
    assert "a Git LFS pointer" in refusal("s3://rows/pointer").what


def test_a_parquet_object_of_several_blocks_is_read_from_s3(bucket: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [os.urandom(50_000).hex() for _ in range(200)]
    with bucket.open("rows/a.parquet", "wb") as file:
        pq.write_table(pa.table({"t": values}), file, use_dictionary=False)
    assert bucket.size("rows/a.parquet") > 16 * 2**20
    assert values_of("s3://rows/a.parquet") == [{"t": value} for value in values]


def test_the_hash_depends_on_content_and_names_below_the_prefix(bucket: Any) -> None:
    def of(path: str) -> str:
        return hash_source(Source(path=path))

    for prefix in ("p", "q"):
        bucket.pipe(f"rows/{prefix}/a.jsonl", b'{"a": 1}')
        bucket.pipe(f"rows/{prefix}/b.jsonl", b'{"a": 2}')
    before = of("s3://rows/p")
    assert before == of("s3://rows/q")
    bucket.pipe("rows/p/b.jsonl", b'{"a": 3}')
    assert of("s3://rows/p") != before


def test_rows_are_prepared_from_a_bucket_by_several_processes_and_kept(
    bucket: Any, prepared: Callable[..., Prepared]
) -> None:
    for name, start in (("a", 0), ("b", 60)):
        lines = "".join(json.dumps(row) + "\n" for row in chats(60, start))
        bucket.pipe(f"rows/set/{name}.jsonl.gz", gzip.compress(lines.encode()))
    rows = Source(path="s3://rows/set", name="rows")
    first = prepared(rows, workers=2)
    assert first.ledger["fates"]["kept"] == 120
    bucket.pipe("rows/set/b.jsonl.gz", gzip.compress(b"{broken\n" + lines.encode()))
    again = prepared(rows, workers=2)
    assert (again.ledger["fates"]["kept"], again.ledger["fates"]["dropped"]) == (120, 1)
    assert again.left_out[0]["text"].startswith("b.jsonl.gz, line 1, column 2")


def test_each_refusal_says_what_to_do(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe("rows/empty.jsonl", b"")
    bucket.pipe("rows/a.xlsx", b"PK")
    bucket.pipe("rows/a.jsonl", b"{}")
    bucket.pipe("rows/cut.jsonl.gz", gzip.compress(os.urandom(1000).hex().encode())[:300])
    assert "no such bucket or object" in refusal("s3://rows/nothing.jsonl").what
    assert "no such bucket or object" in refusal("s3://no-bucket/a.jsonl").what
    assert "no object matches" in refusal("s3://rows/z*.jsonl").what
    assert "the object is empty" in refusal("s3://rows/empty.jsonl").what
    assert "'.xlsx' is no kind" in refusal("s3://rows/a.xlsx").what
    cut = refusal("s3://rows/cut.jsonl.gz")
    assert "damaged or cut short" in cut.what
    assert cut.where == "s3://rows/cut.jsonl.gz"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client would wait between five
    gone = refusal("s3://rows/a.jsonl")
    assert "the S3 service cannot be used" in gone.what
    assert "AWS_ENDPOINT_URL" in str(gone.hint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    keys = refusal("s3://rows/a.jsonl")
    assert "AWS_ACCESS_KEY_ID" in str(keys.hint)
