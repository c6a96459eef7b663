"""Products through oneDNN equal torch's, whatever the shape."""

from __future__ import annotations

import pytest
import torch

from corral.model.compute.cpu_matmul import times_transposed


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (5, 0), (1, 64)])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_equal_plain_ones(rows: tuple[int, ...], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 48, generator=generator)
    weight = torch.randn(96, 48, generator=generator)
    if transposed:
        weight = weight.T.contiguous().T
    torch.testing.assert_close(times_transposed(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
