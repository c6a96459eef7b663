"""A batch on a Ray cluster of two workers on this machine, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.batch import BatchResult, answer_file
from corral.batch.prompts import PromptFile
from corral.batch.ray_cluster import RayWorker, answer_on_ray
from corral.errors import EngineError, InputError, MissingExtraError
from corral.progress import Progress
from tests.batch.work import IDENTITY, Batch, finished_rows, question, read_rows, wait_for_rows

ROWS = 400
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")


@dataclass(frozen=True)
class OpensInWorker:
    """Opens a batch's Answerer in a worker, and leaves the worker's process id."""

    batch: Batch
    folder: Path

    def __call__(self) -> Any:
        (self.folder / str(os.getpid())).touch()
        return self.batch.open()


@pytest.fixture(scope="module")
def cluster() -> Generator[str]:
    """The address of a cluster of two machines, which are this one."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    root = str(Path(__file__).parent.parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    memory = {"object_store_memory": 100 * 2**20}
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    started.add_node(num_cpus=1, **memory)
    yield started.address
    started.shutdown()


def answer_with_ray(
    cluster: str, batch: Batch, open_answerer: Any = None, progress: Progress | None = None
) -> BatchResult:
    answering = partial(answer_on_ray, cluster, open_answerer or batch.open, 1, 7)
    return answer_file(str(batch.prompts), batch.out, IDENTITY, answering, progress or Progress())


def load_no_model() -> Answerer:
    raise AssertionError("a model was loaded")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="ray") as missing:
        answer_on_ray(None, load_no_model, 1, 0, iter(()), lambda _: None)
    assert "corral[ray]" in str(missing.value.hint)


def test_a_worker_tells_a_bad_row_from_a_broken_engine(make_batch: Callable[..., Batch]) -> None:
    import pyarrow as pa

    rows = [{"prompt": "Break it." if i == 7 else question(i)} for i in range(16)]
    batch = make_batch(rows, breaks_at="Break it.")
    table = pa.table({"row": [prompt.to_json() for prompt in PromptFile(str(batch.prompts), Progress())]})
    worker = RayWorker(batch.open, 7)
    answered = [json.loads(row) for row in worker({"row": table["row"]})["row"]]
    assert [row["index"] for row in answered] == list(range(16))
    assert [row["index"] for row in answered if "error" in row] == [7]
    with pytest.raises(EngineError, match="broken"):
        RayWorker(replace(batch, breaks_at="").open, 7)({"row": table["row"]})


@pytest.mark.full
@needs_ray
def test_rows_that_break_an_engine_are_bad_and_all_others_are_answered(
    cluster: str, make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    breaking = {3, 50, 98, 99}
    rows = [{"prompt": "Break it." if i in breaking else question(i)} for i in range(100)]
    batch = make_batch(rows, breaks_at="Break it.")
    outcome = answer_with_ray(cluster, batch)
    assert (outcome.figures.rows, outcome.figures.bad) == (100, 4)
    assert {row["index"] for row in read_rows(batch.out) if "error" in row} == breaking
    local = replace(batch, out=tmp_path / "local.jsonl")
    local.run()
    assert local.out.read_bytes() == batch.out.read_bytes()


@pytest.mark.full
@needs_ray
def test_after_a_worker_is_killed_every_row_is_answered_once_in_order(
    cluster: str, make_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    local = make_batch(ROWS)
    local.run()
    batch = Batch(local.prompts, tmp_path / "ray.jsonl", local.tokenizer, local.calls, delay_seconds=1.0)
    workers = tmp_path / "workers"
    workers.mkdir()
    killed: list[int] = []
    done_at_kill: list[bool] = []

    def kill() -> None:
        wait_for_rows(batch, 40)
        killed.append(int(min(workers.iterdir(), key=lambda path: path.stat().st_mtime).name))
        os.kill(killed[0], signal.SIGKILL)
        done_at_kill.append(batch.out.exists())

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = answer_with_ray(cluster, batch, OpensInWorker(batch, workers))
    killer.join()
    assert outcome.answered == ROWS
    assert not done_at_kill[0], "it was killed on the way"
    assert str(killed[0]) in {path.name for path in workers.iterdir()}
    assert batch.out.read_bytes() == local.out.read_bytes()


@pytest.mark.full
@needs_ray
def test_a_stopped_batch_resumes(cluster: str, make_batch: Callable[..., Batch], tmp_path: Path) -> None:
    local = make_batch(ROWS)
    local.run()
    batch = Batch(local.prompts, tmp_path / "ray.jsonl", local.tokenizer, local.calls, delay_seconds=0.2)

    class Stop(Progress):
        def update(self, done: int, note: str = "") -> None:
            if done == 50:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        answer_with_ray(cluster, batch, progress=Stop())
    kept = len(finished_rows(batch.out))
    assert kept >= 50
    assert answer_with_ray(cluster, batch).answered == ROWS - kept
    assert batch.out.read_bytes() == local.out.read_bytes()


def _no_model() -> Any:
    raise EngineError("no such model here")


@pytest.mark.full
@needs_ray
def test_errors_of_a_worker_are_those_of_a_local_batch(cluster: str, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(40)
    with pytest.raises(EngineError, match="no such model here"):
        answer_with_ray(cluster, batch, _no_model)
    bad = replace(make_batch([{"prompt": "c " * 9000}, {"prompt": "a"}]), out=batch.out.with_name("b"))
    answer_with_ray(cluster, bad)
    assert ["error" in row for row in read_rows(bad.out)] == [True, False]


@pytest.mark.full
@needs_ray
def test_an_unreachable_cluster_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="no Ray cluster") as refused:
        answer_on_ray("127.0.0.1:1", _no_model, 1, 0, iter([]), print)
    assert refused.value.where == "127.0.0.1:1"
