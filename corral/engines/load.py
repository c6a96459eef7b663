"""Engines by name: from a model folder to an Engine. Knows which engines there are, not how they work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from corral.engines.base import Engine

if TYPE_CHECKING:
    from corral.model.loading import DType


def load_engine(name: Literal["transformers"], folder: Path, *, dtype: DType, device: str) -> Engine:
    """Load a model folder into the engine of that name.

    Args:
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: the folder holds no model that can be loaded.
    """
    from corral.engines.transformers import TransformersEngine
    from corral.model.loading import load_model

    return TransformersEngine(load_model(folder, dtype=dtype, device=device), name=name)
