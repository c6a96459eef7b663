"""Bad input gives one clear error with value, place and next step, the right exit code, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import change_json
from tests.e2e.conftest import fail, succeed


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda f: (f / "r.toml").write_text((f / "r.toml").read_text().replace(old, new))


def rows(content: bytes) -> Callable[[Path], object]:
    return lambda f: (f / "rows.jsonl").write_bytes(content)


CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "wrong key": (edit("rank = 4", "rnk = 4"), ["train.0.lora.rnk", "did you mean 'rank'", "r.toml"]),
    "wrong type": (edit("steps = 8", 'steps = "x"'), ["train.0.steps", "'x'"]),
    "impossible pair": (edit("steps = 8", "steps = 8\nepochs = 1"), ["`epochs` = 1 and `steps` = 8"]),
    "broken toml": (edit("[model]", "[model"), ["not valid TOML", "line"]),
    "unknown asset": (edit('base = "', 'base = "asset:smollm#'), ["smollm", "asset"]),
    "missing model folder": (edit('base = "', 'base = "/nowhere'), ["/nowhere"]),
    "missing data": (lambda f: (f / "rows.jsonl").rename(f / "row.jsonl"), ["rows.jsonl", "row.jsonl"]),
    "empty data": (rows(b""), ["rows.jsonl", "empty"]),
    "binary data": (rows(b"\x00\x01\x02" * 50), ["rows.jsonl"]),
    "not utf-8": (rows(b'{"messages": "\xe9"}\n' * 3), ["rows.jsonl", "UTF-8", "line 1"]),
    "no answers": (rows(b'{"messages": [{"role": "user", "content": "a?"}]}\n' * 3), ["no answer"]),
    "all over the limit": (edit("max_length = 128", "max_length = 16"), ["16 tokens"]),
    "unknown layer": (edit("rank = 4", 'rank = 4\ntargets = ["qproj"]'), ["'qproj'", "q_proj"]),
    "unknown template": (edit("[data]", 'template = "chatlm"\n[data]'), ["'chatlm'", "chatml"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_one_clear_error(case: str, workspace: Path) -> None:
    spoil, expected = CASES[case]
    spoil(workspace)
    done = fail(2, [*expected, "next:"], "run", workspace / "r.toml", "--out", workspace / "run")
    assert done.stdout == ""


def test_one_broken_line_is_one_dropped_row_in_the_ledger(workspace: Path) -> None:
    lines = (workspace / "rows.jsonl").read_text().splitlines()
    lines[40] = lines[40][:30]
    (workspace / "rows.jsonl").write_text("\n".join(lines) + "\n")
    ledger = json.loads(succeed("inspect", workspace / "r.toml", "--json").stdout)["ledger"]
    assert ledger["rows"] == 80
    assert ledger["fates"]["dropped"] == 1


def test_the_run_directory_of_another_recipe_is_refused(run_copy: Path) -> None:
    command = ("run", run_copy.parent / "r.toml", "--out", run_copy)
    fail(2, ["'tiny'", "--out"], *command, "--set", "name=other")


def test_when_all_checkpoints_are_damaged_the_run_stops(run_copy: Path) -> None:
    stage = run_copy / "train-1-sft"
    change_json(stage / "stage.json", status="running")
    for checkpoint in (stage / "checkpoints").glob("step-*"):
        (checkpoint / "adapter.safetensors").write_bytes(b"x")
    fail(2, ["checkpoints are damaged"], "run", run_copy.parent / "r.toml", "--out", run_copy)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("chat", "nowhere"), "nowhere"),
        (("report", "nowhere"), "not a run"),
        (("evaluate", "nowhere"), "not a run"),
        (("compare", "nowhere", "elsewhere"), "not a run"),
        (("assets", "--fetch", "smollm"), "smollm"),
        (("run", "none.toml"), "there is no recipe"),
        (("serve", "nowhere"), "nowhere"),
        (("serve", "nowhere", "--host", "0.0.0.0"), "--insecure"),
        (("serve", "nowhere", "--port", "99999"), "less than or equal to 65535"),
        (("serve", "nowhere", "--port", "http"), "--port"),
        (("serve", "nowhere", "--engine", "warp"), "warp"),
    ],
)
def test_an_impossible_command_is_one_clear_error(args: tuple[str, ...], part: str, tmp_path: Path) -> None:
    fail(2, [part], *args, cwd=tmp_path)
