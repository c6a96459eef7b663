from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.data import cache as caches
from corral.data.cache import cache_name, hold_cache


def test_cache_names_depend_on_all_their_parts() -> None:
    assert cache_name("rows", 1, {"a": 2, "b": None}) == cache_name("rows", 1, {"b": None, "a": 2})
    assert len({cache_name("rows", 1), cache_name("rows", 2), cache_name("words", 1), cache_name("rows", 1, None)}) == 4


def put_folder(cache: Path, name: str, size: int, used: int) -> Path:
    """A folder of so many bytes that was used so many seconds after the first."""
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(bytes(size))
    os.utime(folder, (1e9 + used, 1e9 + used))
    return folder


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Room for 100 bytes; it holds 90: `rows-a`, `rows-b` and `rows-c`, used in this order."""
    monkeypatch.setattr(caches, "MAX_BYTES", 100)
    for used, name in enumerate("abc"):
        put_folder(tmp_path / "cache", f"rows-{name}", 30, used)
        (tmp_path / "cache" / f".rows-{name}.lock").touch()
    return tmp_path / "cache"


def test_the_least_recently_used_folders_are_removed(small_cache: Path) -> None:
    with hold_cache(small_cache) as used:
        used.add(small_cache / "rows-a")
    assert folders(small_cache) == {"rows-a", "rows-b", "rows-c"}
    with hold_cache(small_cache) as used:
        used.update({put_folder(small_cache, "rows-d", 30, 9), small_cache / "never-made"})
        assert len(folders(small_cache)) == 4
    assert folders(small_cache) == {"rows-a", "rows-c", "rows-d"}
    assert not (small_cache / ".rows-b.lock").exists()
    assert (small_cache / ".rows-a.lock").exists()


def test_folders_just_used_stay_whatever_their_size_also_after_an_error(small_cache: Path) -> None:
    def stop_in_the_middle() -> None:
        with hold_cache(small_cache) as used:
            used.update({put_folder(small_cache, "rows-d", 200, 0), small_cache / "rows-b"})
            raise KeyError

    with pytest.raises(KeyError):
        stop_in_the_middle()
    assert folders(small_cache) == {"rows-b", "rows-d"}


def test_leftovers_of_killed_writers_are_removed(small_cache: Path) -> None:
    put_folder(small_cache, ".corral-tmp-rows-x.12345678", 1, 20)
    (small_cache / "rows-c" / ".corral-tmp-abc").touch()
    with hold_cache(small_cache):
        assert len(folders(small_cache)) == 4
    assert folders(small_cache) == {"rows-a", "rows-b", "rows-c"}
    assert [path.name for path in (small_cache / "rows-c").iterdir()] == ["data"]


HOLD = """
import sys, time
from pathlib import Path
from corral.data.cache import hold_cache
with hold_cache(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(cache: Path) -> subprocess.Popen[str]:
    """Another process, once it holds the cache; it lets go when its input ends."""
    command = [sys.executable, "-c", HOLD, str(cache)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_nothing_is_removed_while_another_process_holds_the_cache(small_cache: Path) -> None:
    put_folder(small_cache, "rows-d", 30, 9)
    with holder(small_cache) as other:
        with hold_cache(small_cache):
            pass
        assert folders(small_cache) == {"rows-a", "rows-b", "rows-c", "rows-d"}
        other.kill()
    with hold_cache(small_cache):
        pass
    assert folders(small_cache) == {"rows-b", "rows-c", "rows-d"}


def test_clearing_waits_for_processes_that_hold_the_cache(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(small_cache.parent))
    small_cache = small_cache.rename(small_cache.with_name("prepared"))
    clear = [sys.executable, "-c", "from corral.assets import clear_cache; print(clear_cache(['prepared']))"]
    with holder(small_cache) as other:
        clearing = subprocess.Popen(clear, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            clearing.wait(3)
        assert len(folders(small_cache)) == 3
        other.communicate("\n")
    assert clearing.communicate()[0] == "['prepared']\n"
    assert not small_cache.exists()
    with hold_cache(small_cache):
        put_folder(small_cache, "rows-a", 1, 0)
    assert folders(small_cache) == {"rows-a"}
