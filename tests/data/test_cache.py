from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.cache import Chunks, each, name_of, split
from corral.errors import CorralError, DataError


def squares(places: Iterable[int]) -> dict[str, np.ndarray]:
    values = np.array(list(places), np.int64)
    return {"square": values**2, "pair": np.stack([values, -values], axis=1)}


@given(st.lists(st.lists(st.integers(0, 50), unique=True, min_size=1, max_size=20), max_size=5))
def test_every_row_that_was_put_is_found_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]]
) -> None:
    chunks = Chunks(tmp_path_factory.mktemp("chunks"))
    wanted = np.arange(51)
    for piece in pieces:
        places = np.array(sorted(piece))
        chunks.put(places, squares(places))
    chunks.refresh()
    put = sorted({place for piece in pieces for place in piece})
    assert chunks.missing(wanted).tolist() == [place for place in range(51) if place not in put]
    backwards = np.array(put[::-1], np.int64)
    assert chunks.column("square", backwards).tolist() == [place**2 for place in put[::-1]]
    for place in put:
        arrays, offset = chunks.find(place)
        assert arrays["pair"][offset].tolist() == [place, -place]


def test_more_files_than_are_kept_open_are_all_found(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path)
    for place in range(60):
        chunks.put(np.array([place]), squares([place]))
    chunks.refresh()
    assert [int(chunks.find(p)[0]["square"][0]) for p in (*range(60), *range(60))] == [p**2 for p in range(60)] * 2


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_file_counts_as_missing_and_the_others_stay(tmp_path: Path, damage: object) -> None:
    chunks = Chunks(tmp_path)
    for places in (np.arange(10), np.arange(10, 20)):
        chunks.put(places, squares(places))
    path = next(p for p in tmp_path.iterdir() if 3 in np.load(p)["places"])
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    chunks.refresh()
    assert chunks.missing(np.arange(20)).tolist() == list(range(10))
    assert not path.exists()


def test_names_stand_for_all_their_parts() -> None:
    assert name_of("rows", 1, {"a": 2, "b": None}) == name_of("rows", 1, {"b": None, "a": 2})
    assert len({name_of("rows", 1), name_of("rows", 2), name_of("words", 1), name_of("rows", 1, None)}) == 4


def test_pieces_cover_all_places_in_order() -> None:
    places = np.arange(0, 3000, 2)
    pieces = split(places)
    assert [len(p) for p in pieces] == [500, 500, 500]
    assert np.concatenate(pieces).tolist() == places.tolist()
    assert split(places[:0]) == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_work_is_done_once_for_each_item_in_this_process_or_in_others(workers: int) -> None:
    here = os.getpid()
    done = list(each(lambda item: (item, os.getpid() == here), range(20), workers))
    assert sorted(item for item, _ in done) == list(range(20))
    assert {mine for _, mine in done} == {workers == 1 or sys.platform != "linux"}


def refuse(item: int) -> int:
    if item == 3:
        raise DataError("row 3 is bad", where="here", hint="mend it")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_callers_with_its_place_and_hint(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(each(refuse, range(8), workers))
    assert (caught.value.what, caught.value.where, caught.value.hint) == ("row 3 is bad", "here", "mend it")


@pytest.mark.skipif(sys.platform != "linux", reason="work is done in other processes on Linux only")
def test_a_killed_worker_is_an_error_that_says_so() -> None:
    with pytest.raises(CorralError, match="a worker process was killed"):
        list(each(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


@pytest.mark.skipif(sys.platform != "linux", reason="work is done in other processes on Linux only")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from corral.data.cache import each\n"
        "def work(item):\n"
        "    Path(sys.argv[1], str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
        "list(each(work, range(4), 2))\n"
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
