"""`corral batch`: killed and resumed, refused input, and the commands of its documentation."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from corral.cli import main, parser
from tests.batch.work import finished_rows, question, read_rows, write_prompts
from tests.e2e.conftest import fail, succeed
from tests.forked import start_corral

DOCS = (Path(__file__).parent.parent.parent / "docs/batch.md").read_text("utf-8")
ENGINE = ("--engine", "transformers")


def write_questions(folder: Path, count: int = 12) -> Path:
    return write_prompts(folder / "prompts.jsonl", [{"id": i, "prompt": question(i)} for i in range(count)])


def test_options_override_the_answer_settings_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    done = succeed("batch", finished_run, write_questions(tmp_path), "--out", out, *ENGINE, "--max-tokens", 8, "--json")
    summary = json.loads(done.stdout)
    assert summary["figures"]["rows"] == summary["answered"] == 12
    rows = read_rows(out)
    assert [row["id"] for row in rows] == list(range(12))
    assert all(row["tokens"] <= 8 for row in rows)
    voted = ("--consensus", "rouge-l", "--n", 3, "--shots", 1, "--max-tokens", 8)
    done = succeed("batch", finished_run, tmp_path / "prompts.jsonl", "--out", tmp_path / "v.jsonl", *ENGINE, *voted)
    assert "12 rows" in done.stdout
    for plain, row in zip(rows, read_rows(tmp_path / "v.jsonl"), strict=True):
        assert len(row["candidates"]) == len(row["votes"]) == 3
        assert row["answer"] == row["candidates"][row["winner"]]
        assert row["prompt_tokens"] > plain["prompt_tokens"], "the shown example is part of the prompt"


def test_killed_and_repeated_it_writes_the_answers_of_an_uninterrupted_run(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 700)
    # Sampled at random, one row in hundreds differs by rounding when it is batched with other rows; greedily none here.
    common = (*ENGINE, "--max-tokens", 24, "--temperature", 0)
    succeed("batch", tiny_folder, path, "--out", tmp_path / "whole.jsonl", *common)
    out = tmp_path / "a.jsonl"
    command = ("batch", tiny_folder, path, "--out", out, *common)
    for number in (signal.SIGKILL, signal.SIGTERM):
        running = start_corral(*command)
        before = finished_rows(out)
        while finished_rows(out) <= before:
            assert running.is_running, running.errors
            time.sleep(0.01)
        running.send_signal(number)
        done = running.finish()
        assert done.returncode in (-number, 128 + number), done.stderr
        if number == signal.SIGTERM:
            assert "the same command goes on" in done.stderr
    assert "rows are done already" in succeed(*command).stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "already done" in succeed(*command).stdout
    fail(2, ["max_tokens = 24 there, 5 here"], *command, "--max-tokens", 5)


CASES: dict[str, tuple[str, tuple[object, ...], list[str]]] = {
    "no prompts": ("", (), ["prompts.jsonl", "empty"]),
    "no JSON": ("Hi?\n", (), ["not valid JSON", "line 1"]),
    "all too long": (json.dumps({"prompt": "word " * 3000}), (), ["only row is bad", "exceed"]),
    "no such engine": ('{"prompt": "a"}\n', ("--engine", "warp"), ["warp"]),
    "nothing to vote on": ('{"prompt": "a"}\n', ("--n", 3), ["--consensus"]),
    "an output that is a folder": ('{"prompt": "a"}\n', ("--out", "/"), ["/"]),
    "two backends": ('{"prompt": "a"}\n', ("--ray", "--url", "http://127.0.0.1:1/v1"), ["--ray"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error_and_leaves_no_file(
    case: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, options, expected = CASES[case]
    (tmp_path / "prompts.jsonl").write_text(text)
    backend = options if "--ray" in options else (*ENGINE, *options)
    command = ("batch", tiny_folder, tmp_path / "prompts.jsonl", "--out", tmp_path / "a.jsonl", *backend)
    try:
        code = main([*map(str, command)])
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert code == 2, output.err
    assert output.out == ""
    for part in expected:
        assert part in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_every_command_and_row_of_the_documentation_is_correct(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "runs/quickstart")
    (rows,) = re.findall(r"```json\n(\{\"id\".*?)```", DOCS, re.S)
    (tmp_path / "prompts.jsonl").write_text(rows)
    commands = re.findall(r"^corral batch .*$", DOCS, re.M)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)[1:]
        assert parser().parse_args(words).verb == "batch"
        if not {"--ray", "--url"} & set(words):
            succeed(*words, *ENGINE, "--max-tokens", 8, cwd=tmp_path)
    shown = [json.loads(line) for line in re.findall(r"^\{\"index\".*\}$", DOCS, re.M)]
    written = [*read_rows(tmp_path / "answers.jsonl"), *read_rows(tmp_path / "voted.jsonl")[:1]]
    assert [row.keys() for row in shown] == [row.keys() for row in written]
