"""Half precision, its loss scale, and what is kept and fetched in a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corral.errors import TrainingError
from corral.training.checkpoint import TrainingState

START = TrainingState(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0, scale=2.0**16)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "state.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_learns_as_in_single_with_its_adapter_in_single(
    dtype: torch.dtype, training: Callable[..., Any], tmp_path: Path
) -> None:
    half, single = training(tmp_path / "a", dtype=dtype), training(tmp_path / "b")
    assert {p.dtype for p in half.parameters.values()} == {torch.float32}
    half.run()
    single.run()
    for ours, theirs in zip(lines(tmp_path / "a")[1:], lines(tmp_path / "b")[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    scale = state_of(tmp_path / "a")["scale"]
    assert scale == (2.0**16 if dtype == torch.float16 else 1.0)
    assert state_of(tmp_path / "b")["scale"] == 1.0


def test_the_loss_scale_changes_no_gradient_and_keeps_small_ones_from_vanishing(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    made = training(tmp_path, dtype=torch.float16, held_out=0)
    batch = [made.examples[i] for i in range(4)]
    units = made.objective.units

    def gradient(scale: float, shrink: float = 1.0) -> torch.Tensor:
        """Where each unit of the loss weighs `shrink`."""
        made.optimizer.zero_grad()
        made.objective = SimpleNamespace(loss=made.objective.loss, units=lambda e: units(e) / shrink)
        made._compute_gradients(batch, scale)
        return torch.cat([p.grad.flatten() for p in made.parameters.values()])

    def assert_parallel(one: torch.Tensor, other: torch.Tensor) -> None:
        assert torch.cosine_similarity(one, other, dim=0) > 0.9999

    expected, tiny = gradient(1.0), 2.0**-20
    assert expected.count_nonzero() > 1000
    assert_parallel(gradient(2.0**8), expected)
    assert gradient(1.0, tiny).count_nonzero() < 0.5 * expected.count_nonzero()
    assert_parallel(gradient(2.0**20, tiny), expected)


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halved(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    made = training(tmp_path, dtype=torch.float16, held_out=0)
    before = {name: p.detach().clone() for name, p in made.parameters.items()}
    state, line = made._step(replace(START, scale=2.0**40, steps_at_scale=7))
    assert (state.scale, state.steps_at_scale, state.step) == (2.0**39, 0, 1)
    assert line.grad_norm is None
    assert line.loss is not None
    assert all(torch.equal(p, before[name]) for name, p in made.parameters.items())
    state, line = made._step(replace(state, scale=2.0**16, steps_at_scale=1999))
    assert (state.scale, state.steps_at_scale) == (2.0**17, 0)
    assert line.grad_norm is not None
    assert not all(torch.equal(p, before[name]) for name, p in made.parameters.items())


def test_a_scale_that_fell_to_one_does_not_hide_gradients_that_are_no_numbers(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    made = training(tmp_path, dtype=torch.float16, held_out=0)
    first = next(iter(made.parameters.values()))
    first.register_hook(lambda g: g * torch.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        made._step(replace(START, scale=1.0))


def test_half_precision_resumes_with_its_scale_to_the_last_bit(training: Callable[..., Any], tmp_path: Path) -> None:
    def make(folder: Path) -> Any:
        made = training(folder, dtype=torch.float16, steps=6)
        steps = iter(range(1, 100))
        first = next(iter(made.parameters.values()))
        first.register_hook(lambda g: g * torch.inf if next(steps) == 2 else g)
        return made

    whole = make(tmp_path / "a")
    whole.run()
    asked = iter(range(1, 100))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b").run(should_stop=lambda: next(asked) == 3)
    resumed = training(tmp_path / "b", dtype=torch.float16, steps=6)
    resumed.run()
    assert state_of(tmp_path / "b")["scale"] == state_of(tmp_path / "a")["scale"] == 2.0**15
    for name, value in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], value)


class Kept:
    """Counts the bytes of tensors that autograd keeps for the backward pass, weights left out."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in weights | seen:
                seen.add(place)
                self.bytes += tensor.untyped_storage().nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(
    dropout: float, training: Callable[..., Any], tmp_path: Path
) -> None:
    found: dict[bool, Any] = {}
    for checkpointing in (False, True):
        made = training(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing, dropout=dropout)
        batch = [made.examples[i] for i in range(4)]
        made.model.train()
        kept = Kept(made.model)
        with kept.hooks:
            torch.manual_seed(1)
            made._pass_loss(batch)
        torch.manual_seed(1)
        loss, _ = made._compute_gradients(batch, 1.0)
        found[checkpointing] = kept.bytes, loss, {n: p.grad for n, p in made.parameters.items()}
    assert found[True][0] < 0.4 * found[False][0]
    assert found[True][1] == found[False][1]
    for name, gradient in found[False][2].items():
        assert torch.equal(found[True][2][name], gradient), name


class Fetches(TorchDispatchMode):
    """Counts transfers of single numbers from tensors to Python, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default  # pyright: ignore
        return func(*args, **(kwargs or {}))


def test_a_step_fetches_nothing_but_its_figures_however_many_passes_it_has(
    training: Callable[..., Any], tmp_path: Path
) -> None:
    counts: list[int] = []
    for pack_length in (4096, 1):
        made = training(tmp_path / str(pack_length), pack_length=pack_length, held_out=0)
        with Fetches() as fetches:
            made._step(replace(START, scale=1.0))
        counts.append(fetches.count)
    assert counts[0] == counts[1] <= 1
