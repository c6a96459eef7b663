"""Plans of a tiny recipe: measured in real processes, one of which dies by `kill -9`, one for lack of memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corral import recipe as recipes
from corral.errors import DataError, InputError, ModelError
from corral.preflight import machine, planner
from corral.preflight.machine import MemoryLimit
from corral.preflight.plan import Plan, render
from corral.progress import Progress


class Listener(Progress):
    """Keeps the titles of what is done, and may do something at one of them."""

    def __init__(self, act: Callable[[str], None] = lambda _: None) -> None:
        self.titles: list[str] = []
        self._act = act

    def start(self, title: str, total: int | None) -> None:
        self.titles.append(title)
        self._act(title)


def make_recipe(folder: Path, model: Path, *settings: str, rows: int = 40) -> recipes.Recipe:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": "2. " * (i % 9 + 1)},
                ]
            }
        )
        for i in range(rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    text = f"""
        name = "tiny"
        model.base = "{model}"
        data.max_length = 128
        data.sources = [{{ path = "rows.jsonl" }}]
        data.split = {{ validation = 0.2, test = 0.2 }}
        train = [{{ steps = 12, batch_size = 4, evaluate_every = 5, lora.rank = 4 }}]
    """
    return recipes.parse(text, where="test", base=folder, overrides=settings)


def rendered(plan: Plan) -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(plan))
    return console.export_text()


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Listener, Path]:
    folder, listener = tmp_path_factory.mktemp("plan"), Listener()
    plan = planner.plan(make_recipe(folder, tiny_folder), folder / "runs" / "tiny", listener)
    return plan, listener, folder


def test_the_step_after_kill_9_gives_the_same_bits(measured: tuple[Plan, Listener, Path]) -> None:
    plan, listener, _ = measured
    (stage,) = plan.stages
    assert stage.tried is not None
    assert stage.tried.resumed is True
    first, second = stage.tried.raw
    assert first["loss"] == second["loss"]
    assert any("again, after kill -9" in title for title in listener.titles)


def test_measured_parts_are_those_of_the_model_and_sum_to_the_peak(measured: tuple[Plan, Listener, Path]) -> None:
    plan, _, _ = measured
    (stage,) = plan.stages
    assert stage.tried is not None
    figures = stage.tried.figures
    assert figures is not None
    assert figures.parts.total == figures.peak
    assert figures.parts.weights == 4 * (plan.weights + stage.trained) + 2 * 8 * 4  # and rotary frequencies, twice
    assert figures.parts.optimizer >= 12 * stage.trained  # gradients and two moments
    assert figures.tokens_per_second > 0
    assert figures.seconds > stage.work.tokens / figures.tokens_per_second
    assert plan.verdict == "fits"


def test_the_estimate_for_this_machine_is_near_what_was_measured(measured: tuple[Plan, Listener, Path]) -> None:
    plan, _, _ = measured
    off = plan.stages[0].estimate_error
    assert off is not None
    assert abs(off["memory"]) < 0.3
    assert f"{off['memory']:+.0%} in memory" in rendered(plan)


def test_nothing_is_left_beside_the_future_run(measured: tuple[Plan, Listener, Path]) -> None:
    assert [path.name for path in measured[2].iterdir()] == ["rows.jsonl"]


def test_a_plan_reads_well_in_a_terminal_and_as_json(measured: tuple[Plan, Listener, Path]) -> None:
    plan = measured[0]
    text = rendered(plan)
    assert max(map(len, text.splitlines())) <= 100
    for words in ("gradients and optimizer", "kill -9 and resume", "verdict: fits", "checkpoints", "tokens/s"):
        assert words in text
    values = json.loads(json.dumps(plan.to_json()))
    assert values["stages"][0]["train"]["lora"]["rank"] == 4
    assert values["verdict"] == "fits"


def test_too_little_memory_is_a_verdict_with_what_to_change(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_memory", lambda: MemoryLimit(40_000_000, 10**9, "a limit"))
    plan = planner.plan(make_recipe(tmp_path, tiny_folder), tmp_path / "run", Listener())
    (stage,) = plan.stages
    assert plan.verdict == stage.verdict == "does not fit"
    assert "ran out of memory while" in stage.reason
    assert "verdict: does not fit" in rendered(plan)


def test_a_child_killed_from_outside_leaves_the_verdict_undecided(tiny_folder: Path, tmp_path: Path) -> None:
    def kill(title: str) -> None:
        if title.endswith("training on the longest rows"):
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)

    plan = planner.plan(
        make_recipe(tmp_path, tiny_folder, "train.0.steps=4000", "train.0.batch_size=20"),
        tmp_path / "run",
        Listener(kill),
    )
    assert plan.verdict == "undecided"
    assert "it was killed while training on the longest rows" in plan.reasons[0]


def test_an_estimate_needs_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    plan = planner.plan(make_recipe(tmp_path, bare), tmp_path / "run", Listener(), device="t4")
    assert plan.estimated
    assert plan.verdict == "fits"
    assert plan.stages[0].tried is None
    assert any("not checked on this machine: its weights are not here" in note for note in plan.notes)
    assert "estimate for T4" in rendered(plan)
    with pytest.raises(ModelError):
        planner.plan(make_recipe(tmp_path, bare), tmp_path / "run", Listener())


def test_an_impossible_recipe_is_one_error(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no figure for the device 'abacus'"):
        planner.plan(make_recipe(tmp_path, tiny_folder), tmp_path / "run", Listener(), device="abacus")
    with pytest.raises(DataError):
        planner.plan(make_recipe(tmp_path, tiny_folder, rows=0), tmp_path / "run", Listener())
    with pytest.raises(ModelError, match="no linear layer called 'w_proj'"):
        planner.plan(
            make_recipe(tmp_path, tiny_folder, 'train.0.lora.targets=["w_proj"]'), tmp_path / "run", Listener()
        )


def test_a_batch_larger_than_the_rows_is_noted(tiny_folder: Path, tmp_path: Path) -> None:
    plan: Any = planner.plan(
        make_recipe(tmp_path, tiny_folder, "train.0.batch_size=200"), tmp_path / "run", Listener(), device="h100"
    )
    assert any("more than once" in note for note in plan.notes)
