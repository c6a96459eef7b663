"""Plain inference of an OpenVINO model: ids → logits, with the keys and values of the ids before them kept.

The model is loaded when first needed, beside GenAI's copy: it takes the memory of its weights again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from corral.export_forms import OPENVINO_MODEL

PART_TOKENS = 256
"""Tokens per forward pass: their logits, [tokens, vocabulary], are all in memory."""


class Model:
    """An OpenVINO model for plain inference.

    Args:
        folder: holds `openvino_model.xml`.
        properties: of OpenVINO.
        vocabulary: ids are in range(vocabulary).
    """

    def __init__(self, folder: Path, properties: dict[str, Any], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._folder = folder
        self._properties = properties
        self._compiled: Any = None

    def new_inference(self) -> Inference:
        """Begin a text."""
        if self._compiled is None:
            import openvino as ov

            self._compiled = ov.Core().compile_model(self._folder / OPENVINO_MODEL, "CPU", self._properties)
        return Inference(self._compiled.create_infer_request())


class Inference:
    """One text, and the keys and values of what was computed of it."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.computed = 0
        """Ids so far."""

    def logits(self, ids: list[int]) -> Any:
        """Compute a text up to its end. Returns: [new ids, vocabulary] after each id that had not been computed, valid until
        the next call."""
        new = ids[self.computed :]
        positions = np.arange(self.computed, len(ids), dtype=np.int64)
        self._request.infer(
            {
                "input_ids": np.array([new], dtype=np.int64),
                "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
                "position_ids": positions[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        self.computed = len(ids)
        return self._request.get_output_tensor(0).data[0]
