"""The model of a training stage: how it is loaded, and the merged model that the stage leaves.

An adapter on quantised weights is merged into those weights, dequantised, which rounds nothing further. A merge into the
full-precision weights gives another model; it is kept only if its held-out loss is lower. `merge_check` compares the merged
model with the one that was trained.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from corral.data.packing import pack_sequences
from corral.errors import ModelError, TemplateError
from corral.model import adapters, full_finetuning, loading, merging, quantisation
from corral.model.adapter_files import AdapterFiles
from corral.model.loading import untrained_special_tokens
from corral.model.packed_forward import target_logprobs
from corral.model.quantisation import Quantization
from corral.run.promotion import MERGED_FOLDER
from corral.storage import new_directory, write_atomic, write_json
from corral.training.objectives import trained_positions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.data.example_store import Example
    from corral.model.loading import DType
    from corral.recipe import Train
    from corral.template import Template

ADAPTER_FOLDER = "adapter"
MERGING_FILE = "merging.json"
TRAINED_FILE = "trained.json"

MergeBase = Literal["base", "dequantised", "full"]
"""Weights an adapter can be merged into: those of a model that is not quantised; of a quantised one, the weights it was
trained on or the original ones."""


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """What a stage trains, and how.

    Args:
        folder: the model it starts from.
        config: the stage's settings.
        device: where to compute.
        dtype: in which to compute and to write the result.
        adapter: the folder of an adapter to train further; None: the stage begins with a fresh one.
    """

    folder: Path
    config: Train
    device: str
    dtype: DType
    adapter: Path | None = None

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen weights are quantised, if they are."""
        kind = self.config.quantization
        return None if kind == "none" else Quantization(kind, self.config.int8_threshold)


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """The stage's validation rows, packed as in training, on which models are compared."""

    rows: Sequence[Example]
    pack_length: int

    def logprobs(self, model: Any) -> list[list[float]]:
        """Log-probabilities of the trained tokens of each sequence that has any."""
        model.eval()
        sequences = [s for row in self.rows for s in row.sequences]
        results: list[list[float]] = [[] for _ in sequences]
        for pack in pack_sequences([len(s.ids) for s in sequences], self.pack_length):
            positions = [trained_positions(sequences[i]) for i in pack]
            with torch.inference_mode():
                values = target_logprobs(model, [sequences[i].ids for i in pack], positions)
            for i, value in zip(pack, values, strict=True):
                results[i] = value.tolist()
        return [values for values in results if values]

    def loss(self, model: Any) -> float:
        """Mean loss (nats per trained token) on the rows. Raises: ModelError (it is not finite)."""
        logprobs = self.logprobs(model)
        loss = -sum(map(sum, logprobs)) / sum(map(len, logprobs))
        if not math.isfinite(loss):
            raise ModelError(
                f"the held-out loss of the merged model is {loss:g}",
                where="train.merge",
                hint="the adapter is kept; lower train.optimizer.lr, or raise the precision of model.dtype",
            )
        return loss


def load_base(setup: TrainingSetup) -> PreTrainedModel:
    """The model the stage starts from, quantised as the stage says. Raises: MissingExtraError, ModelError."""
    return _load(setup, setup.quantization)


def _load(setup: TrainingSetup, quantization: Quantization | None) -> PreTrainedModel:
    dtype: DType = "float32" if setup.config.method == "full" else setup.dtype
    return loading.load_model(setup.folder, dtype=dtype, device=setup.device, quantization=quantization)


def make_trainable(model: PreTrainedModel, setup: TrainingSetup, *, seed: int) -> PeftModel | PreTrainedModel:
    """Attach the stage's adapter to the loaded model, fresh or as it was trained before, or make all weights trainable.

    Raises:
        ModelError: the model has no layer of a name that the adapter targets, or the adapter cannot be trained further.
    """
    if setup.config.method == "full":
        return full_finetuning.train_all_weights(model, getattr(torch, setup.dtype))
    if setup.adapter is not None:
        return adapters.resume(model, setup.adapter)
    return adapters.attach(model, setup.config.lora, seed=seed)


def check_special_tokens(model: PreTrainedModel, template: Template) -> None:
    """Raises TemplateError if the template writes special tokens that are untrained and that an adapter cannot learn."""
    untrained = untrained_special_tokens(model, template.special_ids)
    if untrained:
        names = ", ".join(template.tokenizer.convert_ids_to_tokens(untrained))
        raise TemplateError(
            f"the template writes special tokens this model was never trained on: {names}",
            where="model.template",
            hint="use a template made of trained tokens, or start from an instruct model; adapters do not train embeddings",
        )


def load_trainable(setup: TrainingSetup, template: Template, *, seed: int) -> PeftModel | PreTrainedModel:
    """The model that the stage trains. Raises: MissingExtraError, ModelError, TemplateError (as `check_special_tokens`)."""
    model = load_base(setup)
    learns_embedding = setup.adapter is not None and AdapterFiles.read(setup.adapter).trains_embedding
    if setup.config.method == "lora" and not learns_embedding:
        check_special_tokens(model, template)
    return make_trainable(model, setup, seed=seed)


def load_as_trained(setup: TrainingSetup, stage: Path) -> PeftModel:
    """The stage's adapter on the base it was trained on, quantised as it was then."""
    return adapters.load(load_base(setup), stage / ADAPTER_FOLDER)


def load_for_merge(setup: TrainingSetup, stage: Path, base: MergeBase) -> PeftModel:
    """The stage's adapter on weights that it can be merged into."""
    model = _load(setup, setup.quantization if base == "dequantised" else None)
    if base == "dequantised":
        quantisation.dequantise_model(model, getattr(torch, setup.dtype))
    return adapters.load(model, stage / ADAPTER_FOLDER)


def save_merged_model(
    setup: TrainingSetup,
    stage: Path,
    template: Template,
    validation: ValidationSet,
    *,
    licences: Sequence[Path],
    report: Callable[[str], None],
) -> None:
    """Merge the stage's adapter and write the model to `merged`; `merging.json` says into which weights.

    With `merge = "best"` both merged models are measured, and the one with the lower held-out loss is kept.

    Raises:
        StorageError, ModelError: an earlier `merged` is untouched.
    """
    bases: list[MergeBase] = ["base"] if setup.quantization is None else ["dequantised"]
    if setup.config.merge == "best":
        bases.append("full")
    losses: dict[str, float] = {}
    chosen = bases[0]
    for base in bases:
        merged = merging.merge_adapter(load_for_merge(setup, stage, base))
        if len(bases) > 1:
            losses[base] = validation.loss(merged)
        # A tie keeps the model that was trained.
        if base == bases[0] or losses[base] < losses[chosen]:
            chosen = base
            with new_directory(stage / MERGED_FOLDER) as folder:
                merging.save_model(merged, template, folder, licences=licences)
        del merged
        gc.collect()
    write_json(stage / MERGING_FILE, {"into": chosen, "losses": losses, "rows": len(validation.rows)})
    if losses:
        report(describe_choice(chosen, losses, len(validation.rows)))


def describe_choice(chosen: str, losses: dict[str, float], rows: int) -> str:
    """Which of the merges with `merge = "best"` was kept, for people."""
    words = {"dequantised": "the dequantised weights", "full": "the full-precision weights"}
    figures = ", ".join(f"{loss:.4f} merged into {words[name]}" for name, loss in losses.items())
    return f"held-out loss on {rows} rows: {figures}; kept: {words[chosen]}"


def save_full_model(
    model: PreTrainedModel,
    values: Mapping[str, torch.Tensor],
    scores: Sequence[Sequence[float]],
    setup: TrainingSetup,
    stage: Path,
    template: Template,
    licences: Sequence[Path],
) -> None:
    """Write a fully fine-tuned model to `merged`, and to `trained.json` what `merge_check` compares it with.

    Args:
        values: its parameters by name.
        scores: log-probabilities of the probes, computed by the model in training.
    """
    dtype = getattr(torch, setup.dtype)
    with new_directory(stage / MERGED_FOLDER) as folder:
        merging.save_model(model, template, folder, licences=licences, weights=values, dtype=dtype)
    write_atomic(stage / TRAINED_FILE, json.dumps({"probes": scores, "weights": tensor_digests(values, dtype)}))


def tensor_digests(values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, str]:
    """sha256 of the bytes of each tensor, rounded to a dtype."""

    def digest(value: torch.Tensor) -> str:
        rounded = value.detach().to("cpu", dtype).contiguous()
        data: Any = rounded.view(torch.uint8).numpy()
        return hashlib.sha256(data).hexdigest()

    return {name: digest(value) for name, value in values.items()}
