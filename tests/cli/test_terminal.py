"""What a terminal shows: whole names, and a time left that follows the pace."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.table import Table

from corral.cli import cache_commands, main, parser
from corral.cli.terminal import Pace, TerminalProgress, show

NAME = "asset:a-model-with-a-long-name-7b-instruct"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_assets_are_listed_with_their_whole_names(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assets = cache_commands.assets(parser().parse_args(["assets"]))["assets"]
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert len(assets) > 5
    assert all(asset["name"] in shown for asset in assets)


def test_no_table_cuts_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    table = Table("name", "value", "more", box=None, show_header=False)
    table.add_row(NAME, "1", "x" * 20)
    show(table, Group(table))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "".join(shown.split()).count("x") == 40


@pytest.mark.parametrize(
    "command",
    ["batch m p --out", "run r --out", "plan r --out", "export m --out", "inspect r --html", "init"],
)
def test_an_address_is_no_place_for_results(command: str, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "s3://bucket/answers.jsonl"])
    assert ended.value.code == 2
    assert "s3://bucket/answers.jsonl is an address" in capsys.readouterr().err


def test_the_time_left_follows_a_changed_pace() -> None:
    pace = Pace()
    for step in range(101):
        pace.add(step, step * 1.0)
    assert pace.seconds_left(1000, 100.0) == pytest.approx(900)
    for step in range(1, 21):
        pace.add(100 + step, 100 + step * 10.0)
    assert pace.seconds_left(1000, 300.0) == pytest.approx(8800)
    assert pace.seconds_left(1000, 305.0) == pytest.approx(8795), "it goes on between steps"


def test_steps_longer_than_the_pace_is_measured_over_give_a_time_left() -> None:
    pace = Pace()
    for step in range(4):
        pace.add(step, step * 300.0)
    assert pace.seconds_left(10, 900.0) == pytest.approx(7 * 300)


def test_a_resumed_task_is_not_taken_for_a_fast_one() -> None:
    pace = Pace()
    pace.add(500, 1.0)
    assert pace.seconds_left(1000, 1.0) is None
    pace.add(501, 11.0)
    assert pace.seconds_left(1000, 11.0) == pytest.approx(499 * 10)


def test_plain_lines_say_how_much_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("corral.cli.terminal.time.monotonic", lambda: now[0])
    progress = TerminalProgress()
    progress.start("Training", 100)
    for done in (50, 51, 52):
        now[0] += 20.0
        progress.update(done, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "Training",
        "  Training: 50 of 100, loss 1",
        "  Training: 51 of 100, about 16 min 20 s left, loss 1",
        "  Training: 52 of 100, about 16 min 00 s left, loss 1",
    ]
