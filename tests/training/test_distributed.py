"""Two processes over gloo train as one does, end together, and go on where another number of processes stopped.

All of it is one launch of two processes, which go through `SCENES` in order; the tests look at what they left.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import TrainingError
from corral.training import sharding
from corral.training.distributed import World, world_from_environment
from tests.training.tiny import make_training

ROOT = Path(__file__).parent.parent.parent
SETTINGS: dict[str, Any] = {"steps": 8, "pack_length": 110}
FULL: dict[str, Any] = {**SETTINGS, "method": "full", "lr": 1e-3}
"""Packs of 110 tokens: the two shares of a step make unequal numbers of passes."""


def stop_after(step: int, world: World, rank: int = 1) -> Callable[[], bool]:
    """A request to stop that one process alone gets, after so many steps of its own."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= step and world.rank == rank


Scene = Callable[[Callable[..., Any], Path, World], Any]


def plain(**settings: Any) -> Scene:
    return lambda make, folder, _: keep(make(folder, **settings), folder)


def keep(training: Any, folder: Path) -> Any:
    outcome = training.run()
    weights = training.weights()
    if weights:
        torch.save(weights, folder / "weights.pt")
    return outcome.steps, training.passes_made


def stopped(then: dict[str, Any], **settings: Any) -> Scene:
    """Stopped by a request to the second process; goes on with other settings."""

    def scene(make: Callable[..., Any], folder: Path, world: World) -> Any:
        try:
            make(folder, **settings).run(should_stop=stop_after(5, world))
        except KeyboardInterrupt:
            shutil.copytree(folder, folder.with_name(folder.name + "-at-5")) if world.is_main else None
            return keep(make(folder, **then), folder)
        raise AssertionError("it did not stop")

    return scene


def poisoned(make: Callable[..., Any], folder: Path, world: World) -> Any:
    """A weight that is no number, on the second process alone."""
    training = make(folder, **SETTINGS, held_out=0)
    training.run(should_stop=lambda: poison(training) if world.rank else False)


def poison(training: Any) -> bool:
    with torch.no_grad():
        next(iter(training.parameters.values())).fill_(float("nan"))
    return False


NF4: dict[str, Any] = {**SETTINGS, "quantization": "nf4", "optimizer": "adamw_8bit"}
SHARDED = {**SETTINGS, "sharding": "full"}
SCENES: dict[str, Scene] = {
    "none": plain(**SETTINGS),
    "full": plain(**SHARDED),
    "checkpointed": plain(**SHARDED, gradient_checkpointing=True),
    "all weights, none": plain(**FULL),
    "all weights, full": plain(**FULL, sharding="full"),
    "one row a step": plain(**SHARDED, batch_size=1),
    "nf4": plain(**NF4),
    "dropout": plain(**SETTINGS, dropout=0.2),
    "dropout, stopped": stopped({**SETTINGS, "dropout": 0.2}, **SETTINGS, dropout=0.2),
    "none, then full": stopped(SHARDED, **SETTINGS),
    "full, then none": stopped(SETTINGS, **SHARDED),
    "from one": plain(**SHARDED),
    "early": plain(**SETTINGS | {"steps": 12, "lr": 2.0, "evaluate_every": 1, "early_stopping": 2}),
    "poisoned": poisoned,
}


def work(job: Path, folder: Path) -> None:
    """One process of two: go through the scenes, and note what became of each."""
    rows, vocabulary = pickle.loads(job.read_bytes())
    seen: dict[str, Any] = {}
    with world_from_environment() as world:

        def make(place: Path, **settings: Any) -> Any:
            training = make_training(place, rows, vocabulary, world=world, **settings)
            training.passes_made = count_passes(training)
            return training

        for name, scene in SCENES.items():
            try:
                seen[name] = scene(make, folder / name, world)
            except TrainingError as error:
                seen[name] = str(error)
        (folder / f"rank-{world.rank}").write_bytes(pickle.dumps(seen))
        with world.peer_errors():
            make(folder / "killed", **SETTINGS).run(should_stop=lambda: die_at_a_checkpoint(folder, world))


def die_at_a_checkpoint(folder: Path, world: World) -> bool:
    """The second process is killed in the middle; the end of everything."""
    if world.rank and (folder / "killed" / "checkpoints").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return False


def count_passes(training: Any) -> list[int]:
    made: list[int] = []
    forward = training._pass_loss
    training._pass_loss = lambda examples: made.append(len(examples)) or forward(examples)
    return made


def launch(job: Path, folder: Path) -> list[tuple[int, str]]:
    """Do the work in two processes. Returns: exit code and standard error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from pathlib import Path; from tests.training.test_distributed import work; "
    code += f"work(Path({str(job)!r}), Path({str(folder)!r}))"
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [(process.returncode, error) for process in started for error in [process.communicate()[1]]]


@pytest.fixture(scope="module")
def job(encoded_rows: list[Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "rows"
    path.write_bytes(pickle.dumps((encoded_rows, len(tiny_tokenizer))))
    return path


@pytest.fixture(scope="module")
def alone(encoded_rows: list[Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one process; and a run of one that was stopped."""
    folder = tmp_path_factory.mktemp("alone")

    def make(place: Path, **settings: Any) -> Any:
        return make_training(place, encoded_rows, len(tiny_tokenizer), **settings)

    for name in ("none", "all weights, none", "one row a step", "nf4", "early"):
        training = make(folder / name, **scenes_settings(name))
        training.passes_made = []
        keep(training, folder / name)
    with pytest.raises(KeyboardInterrupt):
        make(folder / "stopped", **SETTINGS).run(should_stop=stop_after(5, World(), rank=0))
    return folder


def scenes_settings(name: str) -> dict[str, Any]:
    return {
        "none": SETTINGS,
        "all weights, none": FULL,
        "one row a step": {**SETTINGS, "batch_size": 1},
        "nf4": NF4,
        "early": {**SETTINGS, "steps": 12, "lr": 2.0, "evaluate_every": 1, "early_stopping": 2},
    }[name]


@pytest.fixture(scope="module")
def two(job: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(alone / "stopped", folder / "from one")
    ended = launch(job, folder)
    assert (folder / "rank-0").exists(), ended
    (folder / "ended").write_bytes(pickle.dumps(ended))
    return folder


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def notes(folder: Path, name: str) -> list[Any]:
    return [pickle.loads((folder / f"rank-{rank}").read_bytes())[name] for rank in range(2)]


def assert_alike(folder: Path, expected: Path, weights: dict[str, Any] | None = None) -> None:
    """Losses, norms and weights are equal to rounding."""
    ours, theirs = curve(folder), curve(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "lr"):
            wanted = other[key] if other[key] is None else pytest.approx(other[key], rel=1e-4)
            assert line[key] == wanted, (line["step"], key)
        assert line["tokens"] == other["tokens"]
    found = weights or torch.load(folder / "weights.pt")
    right = torch.load(expected / "weights.pt")
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "full", "checkpointed"])
def test_two_processes_train_as_one_does(name: str, two: Path, alone: Path) -> None:
    assert_alike(two / name, alone / "none")


@pytest.mark.parametrize("name", ["all weights, none", "all weights, full"])
def test_so_they_do_when_all_weights_are_trained(name: str, two: Path, alone: Path) -> None:
    assert_alike(two / name, alone / "all weights, none")
    assert "model.embed_tokens.weight" in torch.load(two / name / "weights.pt")


def test_a_process_without_rows_in_a_step_changes_nothing(two: Path, alone: Path) -> None:
    assert_alike(two / "one row a step", alone / "one row a step")


def test_so_they_do_on_quantised_weights_with_moments_in_8_bits(two: Path, alone: Path) -> None:
    assert_alike(two / "nf4", alone / "nf4")


def test_passes_are_unequal_and_made_equal_only_where_layers_are_sharded(two: Path) -> None:
    (_, first), (_, second) = notes(two, "none")
    assert len(first) != len(second)
    (_, first), (_, second) = notes(two, "full")
    assert len(first) == len(second)


def test_each_process_drops_out_by_itself_and_resumes_to_the_last_bit(two: Path) -> None:
    whole, resumed = (torch.load(two / name / "weights.pt") for name in ("dropout", "dropout, stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    numbers = {make_random(rank) for rank in range(4)}
    assert len(numbers) == 4


def make_random(rank: int) -> int:
    from types import SimpleNamespace

    from corral.training.loop import Trainer

    return Trainer._step_seed(SimpleNamespace(world=World(rank, 4), seed=3), 7)  # pyright: ignore


@pytest.mark.parametrize("name", ["none, then full", "full, then none", "from one"])
def test_a_run_goes_on_with_another_sharding_and_from_one_process(name: str, two: Path, alone: Path) -> None:
    assert_alike(two / name, alone / "none")


@pytest.mark.parametrize("name", ["none, then full-at-5", "full, then none-at-5"])
def test_a_run_of_two_processes_goes_on_with_one(
    name: str, two: Path, alone: Path, training: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(two / name, tmp_path / "run"))
    assert curve(folder)[-1]["step"] == 5
    made = training(folder, **SETTINGS)
    made.run()
    assert_alike(folder, alone / "none", made.weights())


def test_a_checkpoint_of_shards_is_that_of_one_process(two: Path, alone: Path) -> None:
    ours, theirs = (folder / "checkpoints" / "step-000008" for folder in (two / "full", alone / "none"))
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        found, wanted = load_file(ours / name), load_file(theirs / name)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def test_both_end_early_at_the_same_step(two: Path, alone: Path) -> None:
    (first, _), (second, _) = notes(two, "early")
    assert first == second == curve(alone / "early")[-1]["step"] < 12


def test_a_number_that_is_none_on_one_process_stops_both_and_names_the_rows(two: Path) -> None:
    first, second = notes(two, "poisoned")
    assert first == second
    assert "loss is nan" in first
    assert "made row" in first


def test_when_one_process_is_killed_the_other_says_so_and_ends(two: Path) -> None:
    (code, error), (other, _) = pickle.loads((two / "ended").read_bytes())
    assert other == -signal.SIGKILL
    assert code == 1
    assert "PeerError: another process of this run has ended" in error


def test_shares_hold_each_row_once_and_about_as_many_tokens() -> None:
    lengths = [7, 500, 3, 3, 480, 20, 90, 1, 512, 30]
    found = sharding.balance_by_tokens(lengths, 3)
    assert sorted(place for share in found for place in share) == list(range(10))
    tokens = [sum(lengths[i] for i in share) for share in found]
    assert max(tokens) - min(tokens) < 40
    assert sharding.balance_by_tokens(lengths, 1) == [list(range(10))]
    assert sharding.balance_by_tokens([5], 2) == [[0], []]
