from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from corral.model.weight_rounding import GROUP, pack_int4, to_int4, to_int8

HALF = 0.51
"""Of a scale: rounding to nearest is out by half of it, and the scale itself is rounded to float16."""
TINY = float(np.finfo(np.float16).tiny)

values = st.floats(-60000, 60000, width=32)
small = st.floats(-1, 1, width=32)
rows = st.integers(1, 5)


@st.composite
def matrices(draw: st.DrawFn, multiple: int) -> Any:
    shape = draw(rows), multiple * draw(st.integers(1, 3))
    return draw(arrays.arrays(np.float32, shape, elements=st.one_of(values, small, st.just(0.0))))


@given(matrices(multiple=7))
@settings(max_examples=200, deadline=None)
def test_int8_is_out_by_half_a_scale_at_most(weight: Any) -> None:
    rounded = to_int8(weight)
    assert rounded.values.dtype == np.int8
    assert rounded.scales.dtype == np.float16
    assert rounded.scales.shape == (len(weight), 1)
    assert (np.abs(rounded.dequantise() - weight) <= HALF * rounded.scales.astype(np.float32)).all()


@given(matrices(multiple=GROUP))
@settings(max_examples=200, deadline=None)
def test_int4_is_out_by_half_a_scale_at_most_and_keeps_every_zero(weight: Any) -> None:
    rounded = to_int4(weight)
    assert rounded.values.max() <= 15
    assert rounded.zeros.max() <= 15
    restored = rounded.dequantise()
    assert restored.shape == weight.shape
    bound = HALF * np.repeat(rounded.scales.astype(np.float32)[..., 0], GROUP, axis=1)
    assert (np.abs(restored - weight) <= bound).all()
    assert (restored[weight == 0] == 0).all()


@given(matrices(multiple=GROUP))
@settings(max_examples=50, deadline=None)
def test_what_was_rounded_is_not_moved_again_by_more_than_its_scale_is(weight: Any) -> None:
    for to in (to_int8, to_int4):
        once = to(weight).dequantise()
        again = to(once).dequantise()
        assert np.abs(again - once).max() <= np.abs(weight).max() / 500 + TINY


def test_int8_equals_torchs_own_quantisation_by_row() -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    rounded = to_int8(weight.numpy())
    scales = torch.from_numpy(rounded.scales.astype(np.float32)).squeeze(1)
    assert torch.allclose(scales, weight.abs().amax(1) / 127, rtol=1e-3)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
    assert np.allclose(rounded.dequantise(), theirs.numpy(), atol=1e-6)


def test_int4_equals_torchs_own_quantisation_by_group() -> None:
    weight = torch.randn(16, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    rounded = to_int4(weight.numpy())
    groups = weight.reshape(-1, GROUP)
    scales = torch.from_numpy(rounded.scales.astype(np.float32)).reshape(-1)
    zeros = torch.from_numpy(rounded.zeros.astype(np.int32)).reshape(-1)
    spread = groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)
    assert torch.allclose(scales, spread / 15, rtol=1e-3)
    assert torch.equal(zeros, (-groups.amin(1).clamp(max=0) / scales).round().int())
    theirs = torch.fake_quantize_per_channel_affine(groups, scales, zeros, 0, 0, 15)
    assert np.allclose(rounded.dequantise(), theirs.reshape(weight.shape).numpy(), atol=1e-6)


@pytest.mark.parametrize("to", [to_int8, to_int4])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e-6, 1.0, -3.0, 60000.0, -60000.0])
def test_rows_of_one_value_stay_what_they_are(to: Any, value: float) -> None:
    restored = to(np.full((2, GROUP), value, np.float32)).dequantise()
    assert np.abs(restored - value).max() <= max(abs(value) * 1e-3, TINY / 2)


@pytest.mark.parametrize("to", [to_int8, to_int4])
def test_one_large_weight_spoils_its_own_row_or_group_only(to: Any) -> None:
    weight = np.full((2, 2 * GROUP), 0.01, np.float32)
    weight[0, 0] = 1000
    restored = to(weight).dequantise()
    assert np.allclose(restored[1], 0.01, rtol=1e-3)
    assert restored[0, 0] == pytest.approx(1000, rel=1e-3)
    assert (restored[0, GROUP:] == 0).all() == (to is to_int8), "int4 has a scale for each group"


@given(arrays.arrays(np.uint8, st.tuples(rows, st.integers(1, 40)), elements=st.integers(0, 15)))
@settings(deadline=None)
def test_packed_holds_each_number_in_its_half_of_a_byte(values: Any) -> None:
    packed = pack_int4(values)
    assert packed.dtype == np.uint8
    assert len(packed) == (values.size + 1) // 2
    unpacked = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    assert np.array_equal(unpacked[: values.size], values.reshape(-1))
    assert (unpacked[values.size :] == 0).all()


def test_packed_is_what_openvino_reads() -> None:
    import openvino as ov

    numbers = np.random.default_rng(0).integers(0, 16, (3, 2, GROUP)).astype(np.uint8)
    tensor = ov.Tensor(ov.Type.u4, [3, 2, GROUP])
    tensor.data.reshape(-1)[:] = pack_int4(numbers)
    constant = ov.opset15.constant(tensor)
    widened = ov.Model([ov.opset15.convert(constant, ov.Type.u8)], [], "widened")
    result = ov.Core().compile_model(widened, "CPU")({})[0]
    assert np.array_equal(result, numbers)
