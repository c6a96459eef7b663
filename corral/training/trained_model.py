"""The weights of a training stage: what it starts from, the merged model it leaves, and whether that is what was trained.

- Quantised weights under an adapter are merged as they were trained: restored first, which no longer rounds anything. A merge
  into the model's full-precision weights gives another model; it is taken only where it has the lower held-out loss.
- NF4 and plain weights: adapter and merged model must give the same log-probabilities. LLM.int8 rounds inputs too, so the
  merged model is held to the restored weights by log-probabilities, and to the model that was trained by held-out loss.
- A model trained as a whole has float32 weights, whatever it is written in. The written ones must be those rounded, bit for
  bit, and give the log-probabilities of training as nearly as their dtype allows, and no higher loss.

Knows nothing about run directories, terminals or the order of stages.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError, TemplateError
from corral.export import contract
from corral.storage import new_directory, write_atomic, write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.data.example_store import Example
    from corral.export.contract import Check, Probe
    from corral.model.loading import DType
    from corral.model.quantisation import Quantization
    from corral.recipe import Train
    from corral.template import Template

ADAPTER = "adapter"
MERGED = "merged"
MERGING = "merging.json"
TRAINED = "trained.json"

INT8_MARGIN = 0.02
"""By how much (nats per token) the held-out loss of a merged model may exceed that of the int8 model it was trained as."""

ROUNDING_MARGIN = 0.03
"""By how much the loss of a whole model, served in 16 bits, may exceed that of its training (nats per token on the probes).
Rounding shifts it either way, by -0.012 to +0.005 in four trials on SmolLM2-135M in bfloat16."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a stage trains, and how.

    Args:
        folder: the model it starts from.
        config: the stage's settings.
        device: where to compute.
        dtype: what in, and what the result is written in.
    """

    folder: Path
    config: Train
    device: str
    dtype: DType

    @property
    def quantization(self) -> Quantization | None:
        """In what the frozen weights are held."""
        from corral.model.quantisation import Quantization

        kind = self.config.quantization
        return None if kind == "none" else Quantization(kind, self.config.int8_threshold)


@dataclass(frozen=True, slots=True)
class Measure:
    """What models are compared on: the validation rows of the stage, packed as in training."""

    rows: Sequence[Example]
    pack_length: int

    def logprobs(self, model: Any) -> list[list[float]]:
        """Log-probabilities of the trained tokens of each sequence of the rows."""
        import torch

        from corral.data.packing import pack_sequences
        from corral.model.packed_forward import target_logprobs

        model.eval()
        sequences = [s for row in self.rows for s in row.sequences]
        found: list[list[float]] = [[] for _ in sequences]
        for pack in pack_sequences([len(s.ids) for s in sequences], self.pack_length):
            positions = [[at for at, trained in enumerate(sequences[i].trained) if trained and at] for i in pack]
            with torch.inference_mode():
                values = target_logprobs(model, [sequences[i].ids for i in pack], positions)
            for i, value in zip(pack, values, strict=True):
                found[i] = value.tolist()
        return [values for values in found if values]

    def loss(self, model: Any) -> float:
        """Mean loss (nats per trained token) on the rows. Raises: ModelError (it is not a finite number)."""
        found = self.logprobs(model)
        loss = -sum(map(sum, found)) / sum(map(len, found))
        if not math.isfinite(loss):
            raise ModelError(
                f"the held-out loss of the merged model is {loss:g}",
                where="train.merge",
                hint="the adapter is kept; lower train.optimizer.lr, or raise the precision of model.dtype",
            )
        return loss


def load(start: Start) -> PreTrainedModel:
    """The model in the form it is trained in. Raises: MissingExtraError, ModelError."""
    from corral.model import loading

    if start.config.method == "full":
        return loading.load_model(start.folder, dtype="float32", device=start.device)
    return _load(start, quantised=True)


def _load(start: Start, *, quantised: bool) -> PreTrainedModel:
    from corral.model import loading

    quantization = start.quantization if quantised else None
    return loading.load_model(start.folder, dtype=start.dtype, device=start.device, quantization=quantization)


def trainable(model: PreTrainedModel, start: Start, *, seed: int) -> PeftModel | PreTrainedModel:
    """The loaded model with what is trained in it. Raises: ModelError (an adapter's target is not there)."""
    import torch

    from corral.model import adapters

    if start.config.method == "full":
        return adapters.train_all_weights(model, getattr(torch, start.dtype))
    return adapters.attach(model, start.config.lora, seed=seed)


def refuse_untrained(model: PreTrainedModel, template: Template) -> None:
    """Raises TemplateError if a template writes special tokens that an adapter on this model could not learn."""
    from corral.model.loading import untrained_special_tokens

    untrained = untrained_special_tokens(model, template.special_ids)
    if untrained:
        names = ", ".join(template.tokenizer.convert_ids_to_tokens(untrained))
        raise TemplateError(
            f"the template writes special tokens this model was never trained on: {names}",
            where="model.template",
            hint="use a template made of trained tokens, or start from an instruct model; adapters do not train embeddings",
        )


def load_trained(start: Start, stage: Path) -> PeftModel:
    """The model as it was trained: the adapter on weights in the form that they were held in."""
    from corral.model import adapters

    return adapters.load(load(start), stage / ADAPTER)


def _adapted(start: Start, adapter: Path, *, into: str) -> PeftModel:
    """The trained adapter on weights that it can be merged into: `dequantised` or `full` (of a quantised model), or `base`."""
    import torch

    from corral.model import adapters, quantisation

    model = _load(start, quantised=into == "dequantised")
    if into == "dequantised":
        quantisation.dequantise_model(model, getattr(torch, start.dtype))
    return adapters.load(model, adapter)


def merge(
    start: Start,
    stage: Path,
    template: Template,
    measure: Measure,
    *,
    licences: Sequence[Path],
    say: Callable[[str], None],
) -> None:
    """Merge the stage's adapter into `merged`, a folder that stands by itself; `merging.json` says into what.

    With `merge = "best"` both merged models are measured, and the one with the lower held-out loss is kept.

    Raises:
        StorageError, ModelError: as they say; an earlier `merged` then still stands.
    """
    from corral.model import merging

    names = ["base"] if start.quantization is None else ["dequantised"]
    if start.config.merge == "best":
        names.append("full")
    losses: dict[str, float] = {}
    chosen = names[0]
    for name in names:
        merged = merging.merge_adapter(_adapted(start, stage / ADAPTER, into=name))
        if len(names) > 1:
            losses[name] = measure.loss(merged)
        # A tie leaves the model that was trained.
        if name == names[0] or losses[name] < losses[chosen]:
            chosen = name
            with new_directory(stage / MERGED) as folder:
                merging.save_model(merged, template, folder, licences=licences)
        del merged
        gc.collect()
    write_json(stage / MERGING, {"into": chosen, "losses": losses, "rows": len(measure.rows)})
    if losses:
        say(_comparison(chosen, losses, len(measure.rows)))


def _comparison(chosen: str, losses: dict[str, float], rows: int) -> str:
    words = {"dequantised": "the dequantised weights", "full": "the full-precision weights"}
    figures = ", ".join(f"{loss:.4f} merged into {words[name]}" for name, loss in losses.items())
    return f"held-out loss on {rows} rows: {figures}; kept: {words[chosen]}"


def save_whole(
    model: PreTrainedModel,
    values: Mapping[str, torch.Tensor],
    scores: Sequence[Sequence[float]],
    start: Start,
    stage: Path,
    template: Template,
    licences: Sequence[Path],
) -> None:
    """Write a model that is trained as a whole as `merged`, and beside it what `checks` holds that to.

    Args:
        values: its parameters by name.
        scores: log-probabilities of the probes, computed by the model in training.
    """
    import torch

    from corral.model import merging

    dtype = getattr(torch, start.dtype)
    with new_directory(stage / MERGED) as folder:
        merging.save_model(model, template, folder, licences=licences, weights=values, dtype=dtype)
    write_atomic(stage / TRAINED, json.dumps({"probes": scores, "weights": _digests(values, dtype)}))


def _digests(values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, str]:
    """sha256 of the bytes of each tensor, rounded to a dtype."""
    import torch

    def digest(value: torch.Tensor) -> str:
        rounded = value.detach().to("cpu", dtype).contiguous()
        data: Any = rounded.view(torch.uint8).numpy()
        return hashlib.sha256(data).hexdigest()

    return {name: digest(value) for name, value in values.items()}


def checks(
    start: Start, stage: Path, candidate: Path, probe_set: Sequence[Probe], measure: Measure
) -> tuple[list[list[float]], list[Check]]:
    """Whether a copy of the stage's merged model is what was trained.

    Args:
        stage: the stage's directory.
        candidate: the copy.
        measure: with no rows, the probes stand in for them.

    Returns: the copy's log-probabilities of the probes, and the checks.
    """
    from corral.model import loading

    model = loading.load_model(candidate, dtype=start.dtype, device=start.device)
    merged = _measured(model, probe_set)
    if start.config.method == "full":
        return merged, _checks_of_whole(start, stage, model, merged)
    by_loss = start.config.quantization == "int8"
    merged_rows = measure.logprobs(model) if by_loss and measure.rows else merged
    del model
    gc.collect()
    tolerance = contract.TOLERANCES[start.dtype]
    merging = json.loads((stage / MERGING).read_text("utf-8"))
    if start.config.quantization == "nf4" and merging["into"] == "dequantised":
        adapted = load_trained(start, stage)  # restores its weights for each product, with the same result
    else:
        adapted = _adapted(start, stage / ADAPTER, into=merging["into"])
    trained = _measured(adapted, probe_set)
    del adapted
    gc.collect()
    found = [contract.compare_logprobs("adapter and merged model", trained, merged, tolerance)]
    if by_loss:
        adapted = load_trained(start, stage)
        rows = measure.logprobs(adapted) if measure.rows else _measured(adapted, probe_set)
        found.append(contract.compare_losses("held-out loss, merged and int8", merged_rows, rows, INT8_MARGIN))
    if merging["losses"]:
        losses = merging["losses"]
        detail = _comparison(merging["into"], losses, merging["rows"])
        found.append(contract.Check("choice of the merge", losses[merging["into"]] <= min(losses.values()), detail))
    return merged, found


def _checks_of_whole(start: Start, stage: Path, model: PreTrainedModel, served: list[list[float]]) -> list[Check]:
    """Whether a model, which gives the probes `served`, is what was trained as a whole and rounded to be written."""
    import torch

    kept = json.loads((stage / TRAINED).read_text("utf-8"))
    scores: list[list[float]] = kept["probes"]
    trained: dict[str, str] = kept["weights"]
    written = _digests(dict(model.named_parameters()), getattr(torch, start.dtype))
    others = sorted(name for name in trained.keys() | written.keys() if trained.get(name) != written.get(name))
    detail = f"{len(trained)} tensors are equal in {start.dtype}, bit for bit"
    if others:
        detail = f"{len(others)} of {len(trained)} tensors are not those that were trained, e.g. {others[0]}"
    found = [
        contract.Check("trained and saved weights", not others, detail, n=len(trained)),
        contract.compare_logprobs("trained and saved model", scores, served, contract.TOLERANCES[start.dtype]),
    ]
    if start.dtype != "float32":
        found.append(contract.compare_losses("loss, saved model and training", served, scores, ROUNDING_MARGIN))
    return found


def _measured(model: Any, probe_set: Sequence[Probe]) -> list[list[float]]:
    from corral.engines.transformers import TransformersEngine

    async def work() -> list[list[float]]:
        async with TransformersEngine(model) as engine:
            return await contract.measure(engine, probe_set)

    return asyncio.run(work())
