from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.data.selection import SourcePlan
from corral.data.worker_pool import WorkerPool, map_in_processes
from corral.errors import CorralError, DataError
from corral.messages import Record
from tests.data.conftest import Listener, chats, source, write_rows


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_work_is_done_once_for_each_item_in_this_process_or_in_others(workers: int) -> None:
    here = os.getpid()
    done = list(map_in_processes(lambda item: (item, os.getpid() == here), range(20), workers))
    assert sorted(item for item, _ in done) == list(range(20))
    assert {mine for _, mine in done} == {workers == 1 or sys.platform != "linux"}


def refuse(item: int) -> int:
    if item == 3:
        raise DataError("row 3 is bad", where="here", hint="fix it")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_reaches_the_caller_with_location_and_hint(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(map_in_processes(refuse, range(8), workers))
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("row 3 is bad", "here", "fix it")


@pytest.mark.skipif(sys.platform != "linux", reason="work is done in other processes on Linux only")
def test_a_killed_worker_raises_an_error() -> None:
    with pytest.raises(CorralError, match="a worker process was killed"):
        list(map_in_processes(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


@pytest.mark.skipif(sys.platform != "linux", reason="work is done in other processes on Linux only")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from corral.data.worker_pool import map_in_processes\n"
        "def work(item):\n"
        "    Path(sys.argv[1], str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
        "list(map_in_processes(work, range(4), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in workers):
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_only_what_is_missing_is_computed(planned: Callable[..., list[SourcePlan]], tmp_path: Path) -> None:
    (plan,) = planned(source(write_rows(tmp_path / "a.jsonl", chats(20))))
    listener, seen = Listener(), list[int]()

    def length(records: Iterable[Record]) -> dict[str, Any]:
        seen.extend(found := [len(str(record)) for record in records])
        return {"length": np.array(found)}

    for end, computed in ((8, 8), (8, 8), (20, 20)):
        WorkerPool(listener, 1).compute_missing("Measuring", [(plan, plan.words, np.arange(end))], length)
        assert len(seen) == computed
    assert listener.titles == ["Measuring", "Measuring"], "the second time there was nothing to do"
    expected = [len(str(record)) for record in plan.rows.records(np.arange(20))]
    assert plan.words.column("length", np.arange(20)).tolist() == expected == seen
