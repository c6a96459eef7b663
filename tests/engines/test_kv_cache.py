from __future__ import annotations

import torch
from transformers import DynamicCache

from corral.engines.kv_cache import RowCache, bytes_per_token
from tests.engines.tiny import tiny_llama

HEADS, SIZE = 2, 4


def step(cache: RowCache, columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to row i, at columns[i], keys that say (i, column) and values that are their negatives."""
    cache.reserve(len(columns), max(columns) + 1)
    cache.set_columns(torch.tensor(columns), max(columns) + 1)
    tagged = torch.tensor([[100.0 * i + column] for i, column in enumerate(columns)])
    keys = tagged[:, :, None, None].expand(-1, HEADS, 1, SIZE)
    return cache.update(keys, -keys, 0)


def test_each_row_grows_at_its_own_column_and_keeps_what_it_had() -> None:
    cache = RowCache(1)
    for i in range(200):
        keys, values = step(cache, [i, i + 50])
        assert keys.shape == values.shape == (2, HEADS, i + 51, SIZE)
        assert torch.equal(keys[0, 0, : i + 1, 0], torch.arange(i + 1.0))
        assert torch.equal(values[1, 1, 50:, 3], -100 - torch.arange(50.0, i + 51))
        assert not keys[1, :, :50].any()


def test_a_prompt_is_copied_to_all_its_rows_and_no_other() -> None:
    cache, prompts = RowCache(1), DynamicCache()
    keys = torch.arange(2.0 * HEADS * 7 * SIZE).reshape(2, HEADS, 7, SIZE)
    prompts.update(keys, -keys, 0)
    cache.reserve(4, 8)
    cache.copy_prompt(prompts, source=1, columns=5, rows=slice(1, 3))
    seen, _ = step(cache, [0, 5, 5, 0])
    for row in (1, 2):
        assert torch.equal(seen[row, :, :5], keys[1, :, :5])
    assert not seen[[0, 3], :, 1:].any()


def test_moved_rows_lie_where_they_were_sent() -> None:
    cache = RowCache(1)
    step(cache, [0, 0, 0, 0])
    cache.move_rows([3, 2], [0, 1])
    keys, _ = step(cache, [1, 1])
    assert keys[:, 0, 0, 0].tolist() == [300.0, 200.0]


def test_many_short_rows_then_a_long_one_do_not_add_up() -> None:
    cache = RowCache(1)
    step(cache, [0] * 100)
    step(cache, [1000])
    rows, columns = cache.capacity
    assert rows * columns < 2 * 1000


def test_bytes_per_token_are_those_of_a_real_cache() -> None:
    model, cache = tiny_llama(), DynamicCache()
    model(torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache, use_cache=True)
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in kept) == 5 * bytes_per_token(model)
