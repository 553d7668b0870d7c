import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.sessions.layout import Layout
from service.wire.digest import BLOCK, digest
from service.wire.json import fill, tensors
from tests.wire.bodies import NUMPY

NARROWER = {"F64": ["F64", "F32", "F16", "BF16"], "F32": ["F32", "F16", "BF16"]}


def stored(flat: np.ndarray, dtype: str) -> np.ndarray:
    """A vector as the arena keeps it: BF16 as its bits."""
    cast = flat.astype(NUMPY[dtype])
    return cast.view(np.uint16) if dtype == "BF16" else cast


@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize("size", [0, 1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_the_same_values_in_any_dtype_have_one_digest(master: str, size: int) -> None:
    # Values that all four dtypes hold exactly, denormals of F16 and both zeros among them.
    values = np.random.default_rng(size).integers(-128, 128, size) * 2.0**-20
    values[::7] = -0.0
    found = {digest(stored(values, d), d, master, b"c") for d in NARROWER[master]}
    assert len(found) == 1
    assert len(found.pop()) == 16


@pytest.mark.parametrize("master", ["F32", "F64"])
def test_json_has_the_digest_of_its_values(master: str) -> None:
    values = np.array([1.5, -0.0, 0.25, 3.0])
    layout = Layout.of([("w", master, (4,))])
    flat = np.empty(4, NUMPY[master])
    fill(layout, tensors({"w": values.tolist()}, master), flat)
    for dtype in NARROWER[master]:
        assert digest(flat, master, master, b"") == digest(
            stored(values, dtype), dtype, master, b""
        )


def test_f16_may_come_as_its_bits() -> None:
    half = np.array([1.0, 2.0], np.float16)
    assert digest(half, "F16", "F32", b"") == digest(half.view(np.uint16), "F16", "F32", b"")


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8),
    position=st.integers(0, 7),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
@example(values=[math.inf], position=0, dtype="F32")
def test_one_other_bit_is_another_digest(values: list[float], position: int, dtype: str) -> None:
    with np.errstate(over="ignore"):
        flat = stored(np.array(values), dtype)
    other = flat.copy()
    raw = other.view(np.uint8)
    raw[position % raw.size] ^= 1
    with np.errstate(invalid="ignore"):  # infinity and one bit more is a signalling NaN
        if np.isnan(other.view(NUMPY[dtype]).astype(np.float64)).any():
            return
    assert digest(flat, dtype, "F64", b"") != digest(other, dtype, "F64", b"")


def test_control_and_presence_are_covered() -> None:
    flat = np.zeros(3, np.float32)
    seen = [
        digest(flat, "F32", "F32", b""),
        digest(flat, "F32", "F32", b"a"),
        digest(flat, "F32", "F32", b"b"),
        digest(flat, "F32", "F32", bytes(4)),
        digest(np.zeros(4, np.float32), "F32", "F32", b""),
        digest(flat, "F32", "F32", b"", [True, False]),
        digest(flat, "F32", "F32", b"", [False, True]),
        digest(flat, "F32", "F32", b"\x80"),
    ]
    assert len(set(seen)) == len(seen)
    assert digest(flat, "F32", "F32", b"", [True, True]) == seen[0]


def test_what_is_not_finite_has_a_digest_too() -> None:
    flat = np.array([np.nan, np.inf, -np.inf])
    signalling = np.array([0x7FA00000], np.uint32).view(np.float32)
    for dtype in NARROWER["F64"]:
        assert len(digest(stored(flat, dtype), dtype, "F64", b"")) == 16
    assert len(digest(signalling, "F32", "F64", b"")) == 16
    assert len(digest(np.array([0x7D00], np.uint16), "F16", "F32", b"")) == 16
    assert len(digest(np.array([np.nan], ml_dtypes.bfloat16), "BF16", "F32", b"")) == 16
