"""Half precision, the loss scale, gradient checkpointing, and transfers from the GPU in a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corral.errors import TrainingError
from corral.training.checkpoint import TrainingState
from corral.training.loop import Trainer
from tests.training.tiny import newest_checkpoint, read_metrics, run_until

START = TrainingState(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0, scale=2.0**16)


def saved_scale(folder: Path) -> float:
    return json.loads((newest_checkpoint(folder) / "state.json").read_text())["scale"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_learns_as_in_float32_with_its_adapter_in_float32(
    dtype: str, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    half, single = tiny_trainer(tmp_path / "a", dtype=dtype), tiny_trainer(tmp_path / "b")
    assert {p.dtype for p in half.parameters.values()} == {torch.float32}
    half.run()
    single.run()
    for ours, theirs in zip(read_metrics(tmp_path / "a")[1:], read_metrics(tmp_path / "b")[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    assert saved_scale(tmp_path / "a") == (2.0**16 if dtype == "float16" else 1.0)
    assert saved_scale(tmp_path / "b") == 1.0


def test_the_loss_scale_changes_no_gradient_and_keeps_small_ones_from_vanishing(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, dtype="float16", held_out=0)
    batch = [trainer.examples[i] for i in range(4)]
    count = trainer.objective.counts

    def gradient(scale: float, shrink: float = 1.0) -> torch.Tensor:
        """The gradient with each unit of the loss weighted by `shrink`."""
        trainer.optimizer.zero_grad()
        trainer.objective.counts = lambda e: (count(e)[0] / shrink,)
        trainer._compute_gradients(batch, scale)
        return torch.cat([p.grad.flatten() for p in trainer.parameters.values()])

    def assert_parallel(one: torch.Tensor, other: torch.Tensor) -> None:
        assert torch.cosine_similarity(one, other, dim=0) > 0.9999

    expected, tiny = gradient(1.0), 2.0**-20
    assert expected.count_nonzero() > 1000
    assert_parallel(gradient(2.0**8), expected)
    assert gradient(1.0, tiny).count_nonzero() < 0.5 * expected.count_nonzero()
    assert_parallel(gradient(2.0**20, tiny), expected)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, dtype="float16", held_out=0)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    state, line = trainer._step(replace(START, scale=2.0**40, steps_at_scale=7))
    assert (state.scale, state.steps_at_scale, state.step) == (2.0**39, 0, 1)
    assert line.grad_norm is None
    assert line.loss is not None
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    state, line = trainer._step(replace(state, scale=2.0**16, steps_at_scale=1999))
    assert (state.scale, state.steps_at_scale) == (2.0**17, 0)
    assert line.grad_norm is not None
    assert not all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_with_a_scale_of_one_gradients_that_are_not_finite_stop_training(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, dtype="float16", held_out=0)
    first = next(iter(trainer.parameters.values()))
    first.register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        trainer._step(replace(START, scale=1.0))


def test_half_precision_resumes_with_its_scale_bit_for_bit(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def make(folder: Path) -> Any:
        trainer = tiny_trainer(folder, dtype="float16", steps=6)
        steps = iter(range(1, 100))
        first = next(iter(trainer.parameters.values()))
        first.register_hook(lambda g: g * torch.inf if next(steps) == 2 else g)
        return trainer

    whole = make(tmp_path / "a")
    whole.run()
    run_until(make(tmp_path / "b"), 3)
    resumed = tiny_trainer(tmp_path / "b", dtype="float16", steps=6)
    resumed.run()
    assert saved_scale(tmp_path / "b") == saved_scale(tmp_path / "a") == 2.0**15
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value)


class SavedBytes:
    """Counts the bytes of tensors that autograd keeps for the backward pass, without weights."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage().data_ptr()
            if storage not in weights | seen:
                seen.add(storage)
                self.bytes += tensor.untyped_storage().nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(
    dropout: float, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    results: dict[bool, Any] = {}
    for checkpointing in (False, True):
        trainer = tiny_trainer(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing, dropout=dropout)
        batch = [trainer.examples[i] for i in range(4)]
        trainer.model.train()
        saved = SavedBytes(trainer.model)
        with saved.hooks:
            torch.manual_seed(1)
            trainer.scorer.score(batch)
        torch.manual_seed(1)
        loss = trainer._compute_gradients(batch, 1.0)[0].loss
        results[checkpointing] = saved.bytes, loss, {n: p.grad for n, p in trainer.parameters.items()}
    assert results[True][0] < 0.4 * results[False][0]
    assert results[True][1] == results[False][1]
    for name, gradient in results[False][2].items():
        assert torch.equal(results[True][2][name], gradient), name


class TransferCounter(TorchDispatchMode):
    """Counts transfers of single numbers from tensors to Python, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default  # pyright: ignore
        return func(*args, **(kwargs or {}))


def test_a_step_transfers_only_its_metrics_however_many_passes_it_has(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    counts: list[int] = []
    for pack_length in (4096, 1):
        trainer = tiny_trainer(tmp_path / str(pack_length), pack_length=pack_length, held_out=0)
        with TransferCounter() as transfers:
            trainer._step(replace(START, scale=1.0))
        counts.append(transfers.count)
    assert counts[0] == counts[1] <= 1
