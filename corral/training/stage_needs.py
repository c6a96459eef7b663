"""What the stages of a run need, computed from a model's `config.json`: bytes on the disk, room in its context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from corral.errors import InputError
from corral.model.folder import read_json
from corral.training.memory_estimate import BYTES, MOMENT_BYTES, ModelShape

if TYPE_CHECKING:
    from corral.export_forms import ExportForm
    from corral.recipe import Train

_EXPORT_BYTES: Mapping[str, float] = {
    "f32": 4,
    "f16": 2,
    "q8_0": 1.07,
    "q4_0": 0.63,
    "int8": 1.02,
    "int4": 0.65,
}
OTHER_FILES = 50_000_000
"""Of answers and the report."""


def stage_bytes(shape: ModelShape, train: Train, dtype: str, checkpoint: int | None = None) -> dict[str, int]:
    """Bytes that a training stage takes, by purpose.

    Args:
        dtype: of the merged model.
        checkpoint: bytes of one checkpoint, if it was measured.
    """
    trained, model = shape.trained_weights(train), shape.weights * BYTES[dtype]
    estimated = int(trained * (4 + MOMENT_BYTES[train.optimizer.kind]))
    full = train.method == "full"
    return {
        "checkpoints": 3 * (checkpoint or estimated),  # two are kept while the third is written
        **({} if full else {"adapters": 3 * 4 * trained}),
        "merged model": model * (2 if full or train.merge == "best" else 1),
    }


def export_bytes(shape: ModelShape, form: ExportForm) -> int:
    """Bytes of an exported form."""
    return int(shape.weights * _EXPORT_BYTES[form.type])


def check_context(folder: Path, tokens: int, setting: str) -> int | None:
    """Raises InputError if so many tokens, which a setting asks for, are more than the model in a folder can read.

    Returns: how many it can read; None if its config does not say.
    """
    context = read_json(folder / "config.json").get("max_position_embeddings")
    if not isinstance(context, int):
        return None
    if tokens > context:
        raise InputError(
            f"{tokens:,} tokens do not fit into the model's context of {context:,}",
            where=setting,
            hint=f"set it to {context} or less, or start from a model with a longer context",
        )
    return context
