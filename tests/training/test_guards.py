"""Guards stop a stage that breaks its model: a tiny one, taught to answer a few prompts, is trained too hard on pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import CheckpointError, GateError
from corral.training.guards import relative_fall
from corral.training.loop import Trainer
from tests.training.guarded import PROMPTS, make_guarded_trainer
from tests.training.tiny import load_trainable, read_metrics, run_until

HARD = 0.2
"""A learning rate that breaks the model in four steps."""
MakeGuarded = Callable[..., Trainer]


@pytest.fixture
def guarded(taught_folder: Path) -> MakeGuarded:
    """Creates a trainer of the taught model with guards, in a folder; see `make_guarded_trainer` for its settings."""
    return partial(make_guarded_trainer, taught_folder)


def stop(trainer: Trainer) -> GateError:
    with pytest.raises(GateError) as caught:
        trainer.run()
    return caught.value


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "basic_prompts.jsonl").read_text("utf-8").splitlines()]


def kept(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "kept.pt")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("settings", [{}, {"method": "full", "lr": 1e-5}], ids=str)
def test_guards_leave_a_sound_training_as_it_is_bit_for_bit(
    settings: dict[str, Any], guarded: MakeGuarded, tmp_path: Path
) -> None:
    trainers = [guarded(tmp_path / str(flag), with_guards=flag, **settings) for flag in (True, False)]
    for trainer in trainers:
        trainer.run()
    assert_equal(*(trainer.weights() for trainer in trainers))
    assert_equal(*(kept(tmp_path / str(flag)) for flag in (True, False)))
    lines = [line for line in read_metrics(tmp_path / "True") if line["eval_loss"] is not None]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert all(line["basic_prompts_passed"] >= 11 for line in lines)
    assert lines[0]["chosen_fall"] == 0
    assert {answer["step"] for answer in answers(tmp_path / "True")} == {0, 4, 8}


def test_a_rate_that_breaks_the_model_stops_the_stage_with_figures_prompts_and_rows(
    guarded: MakeGuarded, tmp_path: Path
) -> None:
    error = stop(guarded(tmp_path, lr=HARD))
    assert error.exit_code == 4
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 4
    assert last["chosen_fall"] > 0.2
    assert f"fell by {last['chosen_fall']:.0%}" in error.what
    faulty = [a for a in answers(tmp_path) if a["step"] == 4 and a["fault"]]
    assert f"{len(faulty)} of 12 basic prompts are answered badly" in error.what
    assert faulty[0]["fault"] in str(error.where)
    assert "made row" in str(error.where)
    assert "--set train.1.optimizer.lr=0.05" in str(error.hint)
    assert "guards." not in str(error.hint), "no limit accepts that all prompts fail"


@pytest.mark.full
def test_a_rate_that_is_doubled_until_it_breaks_the_model_is_stopped(guarded: MakeGuarded, tmp_path: Path) -> None:
    rates = [2e-4 * 2**i for i in range(12)]
    stopped: list[float] = []
    for rate in rates:
        try:
            guarded(tmp_path / str(rate), lr=rate).run()
        except GateError:
            stopped.append(rate)
            break
    assert rates[0] not in stopped
    assert stopped
    assert stopped[0] <= 2 * HARD


def test_the_weights_from_before_the_first_step_are_kept_if_no_evaluation_passed(
    guarded: MakeGuarded, tmp_path: Path
) -> None:
    trainer = guarded(tmp_path, lr=HARD)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    stop(trainer)
    assert_equal(kept(tmp_path), before)


def test_a_stage_that_was_stopped_says_the_same_again_without_a_step(guarded: MakeGuarded, tmp_path: Path) -> None:
    first = stop(guarded(tmp_path, lr=HARD))
    lines, given = read_metrics(tmp_path), answers(tmp_path)
    again = guarded(tmp_path, lr=HARD)
    steps: list[int] = []
    with pytest.raises(GateError) as caught:
        again.run(on_step=lambda metrics: steps.append(metrics.step))
    assert str(caught.value) == str(first)
    assert steps == []
    assert read_metrics(tmp_path) == lines
    assert answers(tmp_path) == given


def test_with_higher_limits_it_goes_on_as_if_it_had_never_been_stopped(guarded: MakeGuarded, tmp_path: Path) -> None:
    limits = {"chosen_fall": 0.999, "failing_prompts": 0.999}
    settings: dict[str, Any] = {"lr": 0.02}
    uninterrupted = guarded(tmp_path / "whole", limits=limits, **settings)
    uninterrupted.run()
    stop(guarded(tmp_path / "stopped", limits={"chosen_fall": 0.0, "failing_prompts": 0.0}, **settings))
    resumed = guarded(tmp_path / "stopped", limits=limits, **settings)
    resumed.run()
    assert_equal(resumed.weights(), uninterrupted.weights())
    assert_equal(kept(tmp_path / "stopped"), kept(tmp_path / "whole"))
    assert answers(tmp_path / "stopped") == answers(tmp_path / "whole")


def test_the_limit_that_is_proposed_accepts_a_fall_beyond_the_size_of_the_log_probability(
    guarded: MakeGuarded, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"lr": 1.0, "steps": 4, "dpo": {"sft_weight": 0.0}, "prompts": ["Tell me more."]}
    hint = str(stop(guarded(tmp_path, **settings)).hint)
    assert read_metrics(tmp_path)[-1]["chosen_fall"] > 1
    limit = float(hint.partition("or go on from here with --set train.1.guards.chosen_fall=")[2])
    assert guarded(tmp_path, limits={"chosen_fall": limit}, **settings).run().steps == 4


def test_a_stage_goes_on_with_the_basic_prompts_that_it_began_with(guarded: MakeGuarded, tmp_path: Path) -> None:
    run_until(guarded(tmp_path), 2)
    said: list[str] = []
    guarded(tmp_path, prompts=["Tell me more."], say=said.append).run()
    assert [line for line in said if "names other basic prompts than when this stage began" in line]
    assert {answer["prompt"] for answer in answers(tmp_path) if answer["step"] == 8} <= set(PROMPTS)
    assert read_metrics(tmp_path)[-1]["basic_prompts_passed"] >= 11


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": [1]}'])
def test_a_stage_that_goes_on_without_what_was_measured_before_it_is_refused_with_the_way_out(
    content: str | None, guarded: MakeGuarded, tmp_path: Path
) -> None:
    run_until(guarded(tmp_path, steps=4), 2)
    path = tmp_path / "guards.json"
    path.unlink()
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match="missing" if content is None else "damaged") as caught:
        guarded(tmp_path, steps=4).run()
    assert caught.value.where == str(path)
    shutil.rmtree(tmp_path / "checkpoints")
    guarded(tmp_path, steps=4).run()


def test_without_a_good_answer_among_the_rows_it_says_that_nothing_watches_them(
    guarded: MakeGuarded, tmp_path: Path
) -> None:
    said: list[str] = []
    trainer = guarded(tmp_path, objective="ulma", steps=1, say=said.append)
    trainer.held_out = trainer.held_out[1:2]  # the second of three is bad
    trainer.run()
    assert "basic prompts well, in up to 8 tokens" in said[0]
    assert "none of the 1 row that this stage is evaluated on has a good answer" in said[1]


def test_an_interrupted_stage_is_stopped_where_an_uninterrupted_one_is(guarded: MakeGuarded, tmp_path: Path) -> None:
    whole = stop(guarded(tmp_path / "whole", lr=HARD))
    run_until(guarded(tmp_path / "resumed", lr=HARD), 2)
    resumed = stop(guarded(tmp_path / "resumed", lr=HARD))
    assert resumed.what == whole.what
    assert answers(tmp_path / "resumed") == answers(tmp_path / "whole")


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_without_held_out_rows_the_rows_that_are_trained_on_are_watched(
    objective: str, guarded: MakeGuarded, tmp_path: Path
) -> None:
    trainer = guarded(tmp_path, lr=HARD, held_out=0, objective=objective)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert "made row" in str(stop(trainer).where)
    lines = read_metrics(tmp_path)
    assert all(line["eval_loss"] is None for line in lines)
    assert lines[-1]["chosen_fall"] > 0.2
    assert_equal(kept(tmp_path), before)


def test_without_the_fine_tuning_term_chosen_answers_fall_further(guarded: MakeGuarded, tmp_path: Path) -> None:
    falls: list[float] = []
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        guarded(
            folder, lr=0.03, dpo={"sft_weight": weight}, limits={"chosen_fall": 0.999, "failing_prompts": 0.999}
        ).run()
        falls.append(read_metrics(folder)[-1]["chosen_fall"])
    assert falls[0] > falls[1] + 0.02


def test_prompts_that_the_start_model_answers_badly_do_not_count(
    guarded: MakeGuarded, tiny_folder: Path, tmp_path: Path
) -> None:
    """The random model says nothing of use, and is not stopped for it."""
    said: list[str] = []
    trainer = guarded(tmp_path, steps=4)
    trained = guarded(tmp_path, steps=4)
    trained.guards = trainer.guards
    assert trained.guards is not None
    trained.guards._say = said.append  # pyright: ignore[reportPrivateUsage]
    trained.model.load_state_dict(load_trainable(tiny_folder, trained.config).state_dict())
    trained.run()
    assert "answers none of 12 basic prompts well" in said[0]
    assert "basic_prompts_passed" not in read_metrics(tmp_path)[-1]


def test_the_figures_of_the_kept_weights_are_known_afterwards(guarded: MakeGuarded, tmp_path: Path) -> None:
    trainer = guarded(tmp_path)
    outcome = trainer.run()
    assert trainer.guards is not None
    figures = trainer.guards.figures(outcome.best_step)
    line = next(line for line in read_metrics(tmp_path) if line["step"] == outcome.best_step)
    assert figures["basic_prompts"] == 12
    assert figures["basic_prompts_passed"] == line["basic_prompts_passed"]
    assert figures["chosen_fall"] == line["chosen_fall"]


def test_a_fall_is_a_share_of_the_size_before_which_is_at_least_a_nat() -> None:
    assert relative_fall(-100, -130) == pytest.approx(0.3)
    assert relative_fall(-100, -90) == pytest.approx(-0.1)
    assert relative_fall(-0.01, -0.11) == pytest.approx(0.1)
