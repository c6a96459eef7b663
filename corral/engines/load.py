"""Engines by name: from a model folder to an Engine. Knows which engines there are; does not know how they work."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from corral.engines.base import Engine
from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType

Name: TypeAlias = Literal["transformers", "openvino"]
ENGINES: tuple[Name, ...] = get_args(Name)


def default_engine(device: str) -> Name:
    """The fastest engine for a device that is installed."""
    return "openvino" if device == "cpu" and find_spec("openvino_genai") else "transformers"


def load_engine(name: Name, folder: Path, *, dtype: DType, device: str) -> Engine:
    """Load a model folder into the engine of that name.

    Args:
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: the folder holds no model that can be loaded, or the engine does not compute on that device.
        MissingExtraError: the engine's packages are not installed.
    """
    if name == "openvino":
        if device != "cpu":
            raise ModelError(
                f"the openvino engine computes on the CPU, not on {device!r}",
                hint='use engine = "transformers", or device = "cpu"',
            )
        from corral.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(folder, dtype=dtype)
    from corral.engines.transformers import TransformersEngine
    from corral.model.loading import load_model

    return TransformersEngine(load_model(folder, dtype=dtype, device=device), name=name)
