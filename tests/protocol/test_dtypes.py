"""The dtypes of the wire; bfloat16 against ml_dtypes, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from gradpost.protocol.dtypes import DTYPES, NUMPY, from_bf16, name_of, to_bf16


def test_sizes_and_names_agree():
    assert NUMPY.keys() == DTYPES.keys()
    for name, dtype in NUMPY.items():
        assert dtype.itemsize == DTYPES[name]
        if name != "BF16":
            assert name_of(dtype) == name
    assert name_of(np.dtype(ml_dtypes.bfloat16)) == "BF16"


@pytest.mark.parametrize("dtype", ["i4", "u2", "b1", "c8", "U3", "O", "f8,f8", "M8[s]"])
def test_what_does_not_travel_is_refused(dtype):
    with pytest.raises(ValueError, match="does not travel"):
        name_of(np.dtype(dtype))


def test_every_bfloat16_widens_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours = from_bf16(bits).view(np.uint32)
    np.testing.assert_array_equal(ours, bits.view(ml_dtypes.bfloat16).astype("f4").view(np.uint32))


def test_every_bfloat16_survives_the_way_there_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    back = to_bf16(from_bf16(bits))
    nan = np.isnan(from_bf16(bits))
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    np.testing.assert_array_equal(back[nan], bits[nan] | 0x40)


def test_rounding_is_to_nearest_even():
    bits = np.random.default_rng(3).integers(0, 1 << 32, 1 << 18, np.uint32)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = np.concatenate([high | low for low in (0x7FFF, 0x8000, 0x8001)])
    values = np.concatenate([bits, ties]).view(np.float32)
    with np.errstate(all="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    ours, nan = to_bf16(values), np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(from_bf16(ours[nan])).all()


def test_shapes_are_kept():
    assert to_bf16(np.ones((2, 0, 3), np.float32)).shape == (2, 0, 3)
    assert from_bf16(np.ones((2, 3), np.uint16)).shape == (2, 3)
    assert to_bf16(np.float32(1)).shape == ()
