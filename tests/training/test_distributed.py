"""Two processes over gloo train as one does, end together, and resume with another number of processes.

One launch of two processes goes through `SCENARIOS` in order; the tests look at what it left.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import GateError, TrainingError
from corral.training import sharding
from corral.training.distributed import World, world_from_environment
from corral.training.loop import Trainer
from corral.training.step_metrics import StepMetrics
from tests.forked import Forked, rank_environments
from tests.training.guarded import make_guarded_trainer
from tests.training.tiny import make_tiny_trainer, read_metrics, run_until

# With packs of 110 tokens the two shares of a step make unequal numbers of passes.
SETTINGS: dict[str, Any] = {"steps": 6, "pack_length": 110}
SHARDED: dict[str, Any] = {**SETTINGS, "sharding": "full"}
FULL: dict[str, Any] = {**SETTINGS, "method": "full", "lr": 1e-3}
DROPOUT: dict[str, Any] = {**SETTINGS, "dropout": 0.2}

MakeTrainer = Callable[..., Trainer]
Scenario = Callable[[MakeTrainer, Path, World], Any]


def train_to_the_end(**settings: Any) -> Scenario:
    return lambda make_trainer, folder, _: train(make_trainer(folder, **settings), folder)


def train(trainer: Trainer, folder: Path) -> tuple[int, list[int]]:
    """Train and save the weights. Returns: steps, examples in each forward pass."""
    passes: list[int] = []
    score = trainer.scorer.score
    trainer.scorer.score = lambda examples, part: passes.append(len(examples)) or score(examples, part)
    outcome = trainer.run()
    weights = trainer.weights()
    if weights:
        torch.save(weights, folder / "weights.pt")
    return outcome.steps, passes


def stop_and_resume(resume_with: dict[str, Any], **settings: Any) -> Scenario:
    """Stopped after step 5 by a request to rank 1 only; resumed with other settings."""

    def scenario(make_trainer: MakeTrainer, folder: Path, world: World) -> Any:
        checks = iter(range(1, 1000))
        try:
            make_trainer(folder, **settings).run(should_stop=lambda: next(checks) >= 5 and world.rank == 1)
        except KeyboardInterrupt:
            if world.is_main:
                shutil.copytree(folder, folder.with_name(folder.name + "-at-5"))
            return train(make_trainer(folder, **resume_with), folder)
        raise AssertionError("it did not stop")

    return scenario


def stop_by_guards(base: Path, folder: Path, world: World, **settings: Any) -> str:
    """The message of the guards that stop a training of the taught model."""
    try:
        make_guarded_trainer(base, folder, lr=0.2, world=world, **settings).run()
    except GateError as error:
        return error.what
    raise AssertionError("it was not stopped")


def finish_twice(base: Path, folder: Path, world: World) -> dict[str, float | None]:
    """What rank 0 alone reads of the guards when a stage that was trained to the end, but not merged, goes on."""
    make_guarded_trainer(base, folder, steps=2, world=world).run()
    trainer = make_guarded_trainer(base, folder, steps=2, world=world)
    outcome = trainer.run()
    assert trainer.guards is not None
    return trainer.guards.figures(outcome.best_step) if world.is_main else {}


def nan_on_rank_1(make_trainer: MakeTrainer, folder: Path, world: World) -> Any:
    trainer = make_trainer(folder, **SETTINGS, held_out=0)

    def spoil() -> bool:
        if world.rank:
            next(iter(trainer.parameters.values())).data.fill_(float("nan"))
        return False

    trainer.run(should_stop=spoil)


# Name → settings; each runs in one process too, for comparison.
COMPARED: dict[str, dict[str, Any]] = {
    "adapter": SETTINGS,
    "all weights": FULL,
    "one row a step": {**SETTINGS, "batch_size": 1},
    "nf4": {**SETTINGS, "quantization": "nf4", "optimizer": "adamw_8bit"},
    "dpo": {**SETTINGS, "objective": "dpo"},
    "kto": {**SETTINGS, "objective": "kto"},
    "ulma, one row a step": {**SETTINGS, "objective": "ulma", "batch_size": 1},
    "early stopping": {**SETTINGS, "steps": 12, "lr": 2.0, "evaluate_every": 1, "early_stopping": 2},
}
SCENARIOS: dict[str, Scenario] = {
    **{name: train_to_the_end(**settings) for name, settings in COMPARED.items()},
    "adapter, sharded": train_to_the_end(**SHARDED),
    "adapter, sharded, gradient checkpointing": train_to_the_end(**SHARDED, gradient_checkpointing=True),
    "all weights, sharded": train_to_the_end(**FULL, sharding="full"),
    "one row a step, sharded": train_to_the_end(**SHARDED, batch_size=1),
    "dpo, sharded": train_to_the_end(**SHARDED, objective="dpo"),
    "kto, sharded": train_to_the_end(**SHARDED, objective="kto"),
    "dropout": train_to_the_end(**DROPOUT),
    "dropout, stopped": stop_and_resume(DROPOUT, **DROPOUT),
    "stopped, then sharded": stop_and_resume(SHARDED, **SETTINGS),
    "sharded, stopped, then not": stop_and_resume(SETTINGS, **SHARDED),
    "stopped with one process": train_to_the_end(**SHARDED),
    "nan on rank 1": nan_on_rank_1,
}


GUARDED: dict[str, dict[str, Any]] = {"guarded": {}, "guarded, sharded": {"sharding": "full"}}


def work(rows_file: Path, folder: Path) -> None:
    """One of the two processes: go through the scenarios and save what each returns."""
    rows, base, taught = pickle.loads(rows_file.read_bytes())
    results: dict[str, Any] = {}
    with world_from_environment() as world:
        for name, settings in GUARDED.items():
            results[name] = stop_by_guards(taught, folder / name, world, **settings)
        results["finished twice"] = finish_twice(taught, folder / "finished twice", world)

        def make_trainer(stage: Path, **settings: Any) -> Trainer:
            return make_tiny_trainer(stage, rows, base, world=world, **settings)

        for name, scenario in SCENARIOS.items():
            try:
                results[name] = scenario(make_trainer, folder / name, world)
            except TrainingError as error:
                results[name] = str(error)
        (folder / f"rank-{world.rank}").write_bytes(pickle.dumps(results))

        def die_at_a_checkpoint() -> bool:
            if world.rank and (folder / "killed" / "checkpoints").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        with world.peer_errors():
            make_trainer(folder / "killed", **SETTINGS).run(should_stop=die_at_a_checkpoint)


def launch(rows_file: Path, folder: Path) -> list[tuple[int, str]]:
    """Run `work` in two processes. Returns: exit code and standard error of each."""
    started = [Forked(work, rows_file, folder, env=environment) for environment in rank_environments()]
    return [(done.returncode, done.stderr) for done in [process.finish() for process in started]]


@pytest.fixture(scope="module")
def rows_file(
    encoded_rows: list[Any], tiny_folder: Path, taught_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_bytes(pickle.dumps((encoded_rows, tiny_folder, taught_folder)))
    return path


@pytest.fixture(scope="module")
def one_process(tiny_trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the same trainings with one process, and of one that was stopped."""
    folder = tmp_path_factory.mktemp("one")
    for name, settings in COMPARED.items():
        train(tiny_trainer(folder / name, **settings), folder / name)
    run_until(tiny_trainer(folder / "stopped", **SETTINGS), 5)
    return folder


@pytest.fixture(scope="module")
def two_processes(rows_file: Path, one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the scenarios, `rank-0` and `rank-1` with their results, and `exits` of the processes."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one_process / "stopped", folder / "stopped with one process")
    exits = launch(rows_file, folder)
    assert (folder / "rank-0").exists(), exits
    (folder / "exits").write_bytes(pickle.dumps(exits))
    return folder


def results(folder: Path, name: str) -> list[Any]:
    """What a scenario returned on each rank."""
    return [pickle.loads((folder / f"rank-{rank}").read_bytes())[name] for rank in range(2)]


def step_keys() -> set[str]:
    """Keys that every line of metrics.jsonl has; the others are the objective's own."""
    return {field.name for field in dataclasses.fields(StepMetrics)}


def assert_alike(folder: Path, expected: Path, weights: dict[str, Any] | None = None) -> None:
    """Assert that losses, norms and weights are equal to rounding."""
    ours, theirs = read_metrics(folder), read_metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "lr"):
            value = other[key] if other[key] is None else pytest.approx(other[key], rel=1e-4)
            assert line[key] == value, (line["step"], key)
        assert line["tokens"] == other["tokens"]
        assert line.keys() == other.keys()
        for key in line.keys() - step_keys():
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (line["step"], key)
    weights = weights or torch.load(folder / "weights.pt")
    expected_weights = torch.load(expected / "weights.pt")
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GUARDED)
def test_guards_stop_both_processes_with_what_they_say_to_one(
    name: str, two_processes: Path, taught_folder: Path, tmp_path: Path
) -> None:
    stop_by_guards(taught_folder, tmp_path, World())
    first, second = results(two_processes, name)
    assert first == second
    assert "chosen answers have become less likely" in first
    assert "basic prompts are answered badly" in first
    lines = read_metrics(two_processes / name)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    # At a rate that breaks a model, the rounding of the first sums has grown within four steps.
    assert lines[-1]["chosen_fall"] == pytest.approx(read_metrics(tmp_path)[-1]["chosen_fall"], rel=0.05)


def test_a_stage_that_was_trained_to_the_end_goes_on_with_what_rank_0_alone_reads_of_its_guards(
    two_processes: Path,
) -> None:
    figures, _ = results(two_processes, "finished twice")
    assert figures["basic_prompts"] == 12
    assert figures["logprob_chosen_before"] < 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter", "adapter"),
        ("adapter, sharded", "adapter"),
        ("adapter, sharded, gradient checkpointing", "adapter"),
        ("all weights", "all weights"),
        ("all weights, sharded", "all weights"),
        ("one row a step", "one row a step"),
        ("one row a step, sharded", "one row a step"),
        ("nf4", "nf4"),
        ("dpo", "dpo"),
        ("dpo, sharded", "dpo"),
        ("kto", "kto"),
        ("kto, sharded", "kto"),
        ("ulma, one row a step", "ulma, one row a step"),
        ("stopped, then sharded", "adapter"),
        ("sharded, stopped, then not", "adapter"),
        ("stopped with one process", "adapter"),
    ],
)
def test_two_processes_train_as_one_does(name: str, expected: str, two_processes: Path, one_process: Path) -> None:
    assert_alike(two_processes / name, one_process / expected)
    if expected == "all weights":
        assert "model.embed_tokens.weight" in torch.load(two_processes / name / "weights.pt")


def test_passes_are_equalised_only_where_layers_are_sharded(two_processes: Path) -> None:
    for name, equal in (("adapter", False), ("adapter, sharded", True)):
        (_, first), (_, second) = results(two_processes, name)
        assert (len(first) == len(second)) is equal


def test_dropout_differs_by_process_and_resumes_bit_for_bit(two_processes: Path) -> None:
    whole, resumed = (torch.load(two_processes / name / "weights.pt") for name in ("dropout", "dropout, stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len({step_seed(rank) for rank in range(4)}) == 4


def step_seed(rank: int) -> int:
    from types import SimpleNamespace

    return Trainer._step_seed(SimpleNamespace(world=World(rank, 4), seed=3), 7)  # pyright: ignore


@pytest.mark.parametrize("name", ["stopped, then sharded-at-5", "sharded, stopped, then not-at-5"])
def test_a_run_of_two_processes_resumes_with_one(
    name: str, two_processes: Path, one_process: Path, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(two_processes / name, tmp_path / "run"))
    assert read_metrics(folder)[-1]["step"] == 5
    trainer = tiny_trainer(folder, **SETTINGS)
    trainer.run()
    assert_alike(folder, one_process / "adapter", trainer.weights())


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_of_shards_is_that_of_one_process(name: str, two_processes: Path, one_process: Path) -> None:
    path = Path("checkpoints") / "step-000006" / name
    tensors, expected = load_file(two_processes / "adapter, sharded" / path), load_file(one_process / "adapter" / path)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in expected.items()}


def test_both_processes_stop_early_at_the_same_step(two_processes: Path, one_process: Path) -> None:
    (first, _), (second, _) = results(two_processes, "early stopping")
    assert first == second == read_metrics(one_process / "early stopping")[-1]["step"] < 12


def test_a_nan_on_one_process_stops_both_and_names_the_rows(two_processes: Path) -> None:
    first, second = results(two_processes, "nan on rank 1")
    assert first == second
    assert "loss is nan" in first
    assert "made row" in first


def test_when_one_process_is_killed_the_other_reports_it_and_ends(two_processes: Path) -> None:
    (code, error), (killed_code, _) = pickle.loads((two_processes / "exits").read_bytes())
    assert killed_code == -signal.SIGKILL
    assert code == 1
    assert "PeerError: another process of this run has ended" in error


def test_balancing_assigns_each_row_once_and_about_as_many_tokens_to_each_process() -> None:
    lengths = [7, 500, 3, 3, 480, 20, 90, 1, 512, 30]
    shares = sharding.balance_by_tokens(lengths, 3)
    assert sorted(i for share in shares for i in share) == list(range(10))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) < 40
    assert sharding.balance_by_tokens(lengths, 1) == [list(range(10))]
    assert sharding.balance_by_tokens([5], 2) == [[0], []]
