"""A training stage on another device: it is not trained again, keeps its passes, and says what to do when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from corral import recipe as recipes
from corral.errors import OutOfMemoryError
from corral.interrupts import Interrupts
from corral.model.device import Placement
from corral.pipeline import execution, train_stage
from corral.pipeline.context import RunContext
from corral.pipeline.train_stage import TrainStage
from corral.progress import Progress
from corral.run.directory import Run
from corral.system import MemoryLimit
from corral.training.passes import Passes
from tests.conftest import write_workspace


def context_of(run: Path, *settings: str) -> RunContext:
    text = (run / "recipe.toml").read_text("utf-8")
    recipe = recipes.parse(text, where="test", base=run.parent, overrides=settings)
    return RunContext(Run(run), recipe, Progress(), Interrupts())


def inputs(run: Path, *settings: str, placement: Placement | None = None) -> dict[str, Any]:
    context = context_of(run, *settings)
    if placement is not None:
        context.placement = placement
    return TrainStage(context, 1).inputs({})


def test_a_stage_records_its_passes(finished_run: Path) -> None:
    passes = Passes.read(finished_run / "train-1-sft")
    assert passes is not None
    assert (passes.pack_length, passes.gradient_checkpointing, passes.dtype) == (512, False, "float32")
    assert passes.memory is not None
    assert 0 < passes.estimate < passes.memory
    assert passes.fallbacks == ()
    assert json.loads((finished_run / "environment.json").read_text())["notes"] == []


def test_neither_the_device_nor_the_passes_make_a_stage_train_again(finished_run: Path) -> None:
    before = inputs(finished_run)
    assert inputs(finished_run, placement=Placement("cuda", "bfloat16")) == before
    assert inputs(finished_run, "train.0.pack_length=200", "train.0.gradient_checkpointing=true") == before
    assert inputs(finished_run, "train.0.steps=9") != before
    assert inputs(finished_run, 'model.dtype="bfloat16"') != before


def test_a_resumed_stage_keeps_the_passes_that_it_began_with_unless_the_recipe_says_otherwise(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_copy / "train-1-sft"
    Passes(2048, True, "float32", 1, 2).write(folder)

    def chosen(*settings: str) -> Passes:
        return TrainStage(context_of(run_copy, *settings), 1)._choose_passes(folder)  # pyright: ignore[reportPrivateUsage]

    kept = chosen()
    assert (kept.pack_length, kept.gradient_checkpointing) == (2048, True)
    given = chosen("train.0.pack_length=256", "train.0.gradient_checkpointing=false")
    assert (given.pack_length, given.gradient_checkpointing) == (256, False)
    monkeypatch.setattr(train_stage, "memory_limit", lambda _: MemoryLimit(10**6, 10**6, "a limit"))
    (folder / "passes.json").unlink()
    tight = chosen()
    assert tight.gradient_checkpointing
    assert not tight.fits


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_settings_that_need_less(
    failure: Exception, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise failure

    write_workspace(tmp_path, tiny_folder)
    monkeypatch.setattr("corral.training.scorer.target_logprobs", fail)
    recipe = recipes.load(tmp_path / "r.toml", ["train.0.pack_length=4096"])
    with pytest.raises(OutOfMemoryError) as caught:
        execution.execute(recipe, tmp_path / "run", Progress())
    assert caught.value.exit_code == 1
    assert caught.value.what.startswith("out of memory while training on cpu: ")
    assert "\n" not in caught.value.what
    hint = caught.value.hint or ""
    for setting in (
        "train.0.pack_length=2048",
        "train.0.gradient_checkpointing=true",
        "quantization=nf4",
        "corral plan",
    ):
        assert setting in hint


def test_a_real_allocation_that_fails_is_out_of_memory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_workspace(tmp_path, tiny_folder)
    monkeypatch.setattr("corral.training.scorer.target_logprobs", lambda *_: torch.empty(2**60))
    with pytest.raises(OutOfMemoryError):
        execution.execute(recipes.load(tmp_path / "r.toml", ()), tmp_path / "run", Progress())
