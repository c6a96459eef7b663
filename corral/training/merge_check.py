"""Checks that the merged model of a training stage is the model that was trained.

- NF4 and plain weights: adapter and merged model must give the same log-probabilities. LLM.int8 rounds inputs too, so the
  merged model is compared with the adapter on dequantised weights by log-probabilities, and with the model that was trained
  by held-out loss.
- Full fine-tuning has float32 weights, whatever the dtype of the written model. The written weights must be those rounded,
  bit for bit, and give the log-probabilities of training as nearly as their dtype allows, with no higher loss.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from corral.engines.base import run_engine
from corral.engines.transformers import TransformersEngine
from corral.export import contract
from corral.model import loading
from corral.training.trained_model import (
    MERGING_FILE,
    TRAINED_FILE,
    MergeBase,
    describe_choice,
    load_as_trained,
    load_for_merge,
    tensor_digests,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from corral.export.contract import Check, Probe
    from corral.training.trained_model import TrainingSetup, ValidationSet

INT8_MARGIN = 0.02
"""By how much (nats per token) the held-out loss of a merged model may exceed that of the int8 model it was trained as."""

ROUNDING_MARGIN = 0.03
"""By how much the loss of a fully fine-tuned model, written in 16 bits, may exceed that of its training (nats per token on
the probes). Rounding shifts it either way, by -0.012 to +0.005 in four trials on SmolLM2-135M in bfloat16."""


def check_merged_model(
    setup: TrainingSetup, stage: Path, candidate: Path, probes: Sequence[Probe], validation: ValidationSet
) -> tuple[list[list[float]], list[Check]]:
    """Compare a merged model with what the stage trained.

    Args:
        stage: the stage's directory.
        candidate: the model's folder.
        validation: if it has no rows, the probes are used instead.

    Returns: its log-probabilities of the probes, and the checks.
    """
    model = loading.load_model(candidate, dtype=setup.dtype, device=setup.device)
    merged = _probe_logprobs(model, probes)
    if setup.config.method == "full":
        return merged, _check_full_model(setup, stage, model, merged)
    by_loss = setup.config.quantization == "int8"
    merged_rows = validation.logprobs(model) if by_loss and validation.rows else merged
    del model
    gc.collect()
    record = json.loads((stage / MERGING_FILE).read_text("utf-8"))
    base: MergeBase = record["into"]
    if setup.config.quantization == "nf4" and base == "dequantised":
        adapted = load_as_trained(setup, stage)  # dequantises its weights for each product, with the same result
    else:
        adapted = load_for_merge(setup, stage, base)
    trained = _probe_logprobs(adapted, probes)
    del adapted
    gc.collect()
    tolerance = contract.TOLERANCES[setup.dtype]
    checks = [contract.compare_logprobs("adapter and merged model", trained, merged, tolerance)]
    if by_loss:
        adapted = load_as_trained(setup, stage)
        rows = validation.logprobs(adapted) if validation.rows else _probe_logprobs(adapted, probes)
        checks.append(contract.compare_losses("held-out loss, merged and int8", merged_rows, rows, INT8_MARGIN))
    if losses := record["losses"]:
        detail = describe_choice(base, losses, record["rows"])
        checks.append(contract.Check("choice of the merge", losses[base] <= min(losses.values()), detail))
    return merged, checks


def _check_full_model(
    setup: TrainingSetup, stage: Path, model: PreTrainedModel, written_scores: list[list[float]]
) -> list[Check]:
    """Compare the written model, and the log-probabilities it gives the probes, with `trained.json`."""
    record = json.loads((stage / TRAINED_FILE).read_text("utf-8"))
    scores: list[list[float]] = record["probes"]
    trained: dict[str, str] = record["weights"]
    written = tensor_digests(dict(model.named_parameters()), getattr(torch, setup.dtype))
    different = sorted(name for name in trained.keys() | written.keys() if trained.get(name) != written.get(name))
    detail = f"{len(trained)} tensors are equal in {setup.dtype}, bit for bit"
    if different:
        detail = f"{len(different)} of {len(trained)} tensors are not those that were trained, e.g. {different[0]}"
    tolerance = contract.TOLERANCES[setup.dtype]
    checks = [
        contract.Check("trained and saved weights", not different, detail, n=len(trained)),
        contract.compare_logprobs("trained and saved model", scores, written_scores, tolerance),
    ]
    if setup.dtype != "float32":
        name = "loss, saved model and training"
        checks.append(contract.compare_losses(name, written_scores, scores, ROUNDING_MARGIN))
    return checks


def _probe_logprobs(model: Any, probes: Sequence[Probe]) -> list[list[float]]:
    return run_engine(TransformersEngine(model), lambda engine: contract.measure(engine, probes))
