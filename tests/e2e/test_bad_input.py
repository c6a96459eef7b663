"""Bad input gives one clear error with value, place and next step, the right exit code, and no traceback."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import corral, write_rows

NOT_UTF8 = b'{"messages": "\xe9"}\n' * 3
NO_ANSWER = '{"messages": [{"role": "user", "content": "a?"}]}\n' * 3


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda f: (f / "r.toml").write_text((f / "r.toml").read_text().replace(old, new))


def rows(content: bytes | str) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda f: (f / "rows.jsonl").write_bytes(data)


CASES: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "wrong key": (edit("rank = 4", "rnk = 4"), 2, ["train.0.lora.rnk", "did you mean 'rank'", "r.toml"]),
    "wrong type": (edit("steps = 8", 'steps = "x"'), 2, ["train.0.steps", "'x'"]),
    "impossible pair": (edit("steps = 8", "steps = 8\nepochs = 1"), 2, ["`epochs` = 1 and `steps` = 8"]),
    "broken toml": (edit("[model]", "[model"), 2, ["not valid TOML", "line"]),
    "unknown asset": (edit('base = "', 'base = "asset:smollm#'), 2, ["smollm", "asset"]),
    "missing model folder": (edit('base = "', 'base = "/nowhere'), 2, ["/nowhere"]),
    "missing data": (lambda f: (f / "rows.jsonl").rename(f / "row.jsonl"), 2, ["rows.jsonl", "row.jsonl"]),
    "empty data": (rows(""), 2, ["rows.jsonl", "empty"]),
    "binary data": (rows(b"\x00\x01\x02" * 50), 2, ["rows.jsonl"]),
    "not utf-8": (rows(NOT_UTF8), 2, ["rows.jsonl", "UTF-8", "line 1"]),
    "no answers": (rows(NO_ANSWER), 2, ["no answer"]),
    "all over the limit": (edit("max_length = 128", "max_length = 16"), 2, ["16 tokens"]),
    "unknown layer": (edit("rank = 4", 'rank = 4\ntargets = ["qproj"]'), 2, ["'qproj'", "q_proj"]),
    "unknown template": (edit("[data]", 'template = "chatlm"\n[data]'), 2, ["'chatlm'", "chatml"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_one_clear_error(case: str, workspace: Callable[[], Path]) -> None:
    spoil, code, expected = CASES[case]
    folder = workspace()
    spoil(folder)
    done = corral("run", folder / "r.toml", "--out", folder / "run")
    assert done.returncode == code, done.stderr
    for part in expected:
        assert part in done.stderr, done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_line_broken_in_the_middle_is_one_lost_row_in_the_ledger(workspace: Callable[[], Path]) -> None:
    folder = workspace()
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[40] = lines[40][:30]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = corral("inspect", folder / "r.toml", "--json")
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout)["ledger"]
    assert ledger["rows"] == 80
    assert ledger["fates"]["dropped"] == 1


def test_another_recipes_run_directory_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    done = corral("run", folder / "r.toml", "--out", folder / "run", "--set", "name=other")
    assert done.returncode == 2
    assert "'tiny'" in done.stderr
    assert "--out" in done.stderr


def test_a_full_disk_is_said_and_nothing_is_lost(workspace: Callable[[], Path]) -> None:
    """A limit on the size of a file stands for the disk: the system's error reaches corral in the same way."""
    folder = workspace()
    (folder / "rows.jsonl").unlink()
    write_rows(folder / "rows.jsonl", 80)

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    full = corral("run", folder / "r.toml", "--out", folder / "run", preexec_fn=limit)
    assert full.returncode == 2, full.stderr
    assert "next:" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(folder.rglob(".corral-tmp-*"))
    assert corral("run", folder / "r.toml", "--out", folder / "run").returncode == 0


def test_all_checkpoints_damaged_is_said_and_touches_nothing(workspace: Callable[[], Path]) -> None:
    folder = workspace()
    assert corral("run", folder / "r.toml", "--out", folder / "run").returncode == 0
    stage = folder / "run/train-1-sft"
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    for checkpoint in (stage / "checkpoints").glob("step-*"):
        (checkpoint / "adapter.safetensors").write_bytes(b"x")
    done = corral("run", folder / "r.toml", "--out", folder / "run")
    assert done.returncode == 2, done.stderr
    assert "checkpoints are damaged" in done.stderr


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("chat", "nowhere"), "nowhere"),
        (("report", "nowhere"), "not a run"),
        (("evaluate", "nowhere"), "not a run"),
        (("compare", "nowhere", "elsewhere"), "not a run"),
        (("assets", "--fetch", "smollm"), "smollm"),
        (("run", "none.toml"), "there is no recipe"),
    ],
)
def test_verbs_given_something_that_is_not_there(args: tuple[str, ...], part: str, tmp_path: Path) -> None:
    done = corral(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr
