"""A key-value cache for continuous batching: rows start and end at any step, and differ in length.

Row r's token at position p lies in column p of row r, whatever the other rows hold, so no row is padded on the left and a
row can be replaced between two steps. The caller must mask the columns above a row's own position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_GROWTH = 64  # columns: growing copies the cache, which happens at every 64th step


class RowCache(Cache):
    """One buffer of keys and one of values for each layer, [rows, heads, columns, head size]."""

    def __init__(self, layers: int) -> None:
        self._layers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=[*self._layers])
        self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self.capacity = (0, 0)
        for layer in self._layers:
            layer.keys = layer.values = None

    def reserve(self, rows: int, columns: int) -> None:
        """Grow to this size. If one dimension must grow, the other shrinks to what is needed."""
        if rows > self.capacity[0] or columns > self.capacity[1]:
            # Many short rows, then few long ones: the maximum of both dimensions may be more than fits in memory.
            self.capacity = (rows, columns + _GROWTH)

    def set_columns(self, columns: Tensor, span: int) -> None:
        """Set where the next step's keys and values go: those of row i to columns[i]; all are below `span`."""
        self.targets = torch.arange(len(columns), device=columns.device), columns
        self.span = span

    def copy_prompt(self, prompts: DynamicCache, source: int, columns: int, rows: slice) -> None:
        """Copy the first `columns` of row `source` of another cache to each of `rows`."""
        layers: list[Any] = prompts.layers
        for layer, other in zip(self._layers, layers, strict=True):
            new = (other.keys, other.values)
            for buffer, prompt in zip(layer.buffers(*new), new, strict=True):
                buffer[rows, :, :columns] = prompt[source, :, :columns]

    def move_rows(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows onto other rows."""
        for buffer in self._buffers():
            buffer[targets] = buffer[sources]

    def zero_rows(self, rows: list[int]) -> None:
        """Zero rows that hold NaN: a mask would not keep it from the rows' next users (0 × NaN is NaN)."""
        for buffer in self._buffers():
            buffer[rows] = 0

    def _buffers(self) -> Iterator[Tensor]:
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                if buffer is not None:
                    yield buffer


class _Layer(DynamicLayer):
    """The part of a RowCache that belongs to one attention layer."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [rows, heads, 1, head size] at the columns set before. Returns: these rows' keys and values up to the span."""
        (rows, columns), span = self._cache.targets, self._cache.span
        keys, values = self.buffers(key_states, value_states)
        keys[rows, :, columns] = key_states[:, :, 0]
        values[rows, :, columns] = value_states[:, :, 0]
        return keys[: len(rows), :, :span], values[: len(rows), :, :span]

    def buffers(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's buffers at the reserved size; heads, dtype and device are those of `keys` and `values`."""
        buffers = self._resized(self.keys, keys), self._resized(self.values, values)
        self.keys, self.values = buffers
        return buffers

    def _resized(self, old: Tensor | None, like: Tensor) -> Tensor:
        rows, columns = self._cache.capacity
        if old is not None and old.shape[0] == rows and old.shape[2] == columns:
            return old
        # Zeros, as masked values must be numbers too.
        new = like.new_zeros(rows, like.shape[1], columns, like.shape[3])
        if old is not None:
            r, c = min(rows, old.shape[0]), min(columns, old.shape[2])
            new[:r, :, :c] = old[:r, :, :c]
        return new


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory of one token's keys and values in all layers."""
    config: Any = model.config
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * size * model.dtype.itemsize
