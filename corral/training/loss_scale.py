"""The scale by which the loss of a float16 model is multiplied, so that its gradients do not vanish (Micikevicius et al. 2018,
arXiv 1710.03740). It is halved when gradients overflow, and doubled after 2,000 steps without overflow."""

from __future__ import annotations

from dataclasses import replace

from corral.training.checkpoint import TrainingState

INITIAL = 2.0**16
_GROWTH_STEPS = 2000


def updated(state: TrainingState, overflow: bool) -> TrainingState:
    """The state after a step whose gradients overflowed, or did not."""
    if overflow:
        return replace(state, scale=state.scale / 2, steps_at_scale=0)
    if state.steps_at_scale + 1 == _GROWTH_STEPS:
        return replace(state, scale=state.scale * 2, steps_at_scale=0)
    return replace(state, steps_at_scale=state.steps_at_scale + 1)
