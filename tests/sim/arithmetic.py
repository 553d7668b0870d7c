"""What a session computes, once more: plain Python, one rounding where the contract has one.

Imports nothing of what is tested. Vectors are NumPy arrays whose float64 values are exact in the
dtype they stand for.
"""

import ctypes
import ctypes.util
import math

import numpy as np

MASTERS = {"F32": np.float32, "F64": np.float64}

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
fma = _libm.fma
fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
fmaf = _libm.fmaf
fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def norm(*groups):
    """The Euclidean norm as the blocks of DESIGN §6 add it: group by group."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for values in groups:
            total += _sum_of_squares(values)
    return math.sqrt(total) if total == total else math.nan


def _sum_of_squares(values):
    """Of one block: 512 lanes, then a fixed tree."""
    lanes = np.zeros(16 if values.size <= 16 else 512)
    assert values.size <= lanes.size, "one element a lane"
    lanes[: values.size] = values * values
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def rounded(values, master):
    """Float64 rounded once to the master dtype."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float64).astype(MASTERS[master])


def weighted(parts, divisor, master):
    """Σ weight·values ÷ divisor, added in the order given.

    Args:
        parts: (weight, values) of each.
        divisor: 1.0 for a sum.
        master: "F32" or "F64".
    """
    total = [0.0] * parts[0][1].size
    for weight, values in parts:
        total = [fma(weight, g, t) for g, t in zip(values.tolist(), total, strict=True)]
    return rounded([t / divisor for t in total], master)


def trimmed(columns, cut, master):
    """The mean without the `cut` least and greatest of each coordinate, added upwards."""
    found = []
    for column in columns:
        total = 0.0
        kept = sorted(column)[cut : len(column) - cut]
        for value in kept:
            total += value
        found.append(total / len(kept))
    return rounded(found, master)


def middle(columns, master):
    """The median of each coordinate; of an even number the mean of the two in the middle."""
    found = []
    for column in columns:
        ordered, half = sorted(column), len(column) // 2
        found.append(ordered[half] if len(column) % 2 else (ordered[half - 1] + ordered[half]) / 2)
    return rounded([value + 0.0 for value in found], master)


def sgd(params, gradient, lr, factor, master):
    """p - lr * (factor * g): the product with the factor is rounded, the rest is one fma.

    Args:
        params: Of the master dtype; not changed.
        gradient: Any dtype that widens exactly to the master.
        lr: In float64, rounded here.
        factor: The same: the gradient's scale and clip.
        master: "F32" or "F64".
    """
    to = MASTERS[master]
    with np.errstate(over="ignore", invalid="ignore"):
        moved = to(factor) * gradient.astype(to)
    one = fmaf if master == "F32" else fma
    slope = float(to(-lr))
    pairs = zip(moved.tolist(), params.tolist(), strict=True)
    return np.array([one(slope, g, p) for g, p in pairs], to)


def same_bits(ours, theirs):
    """Whether two vectors are equal to the bit; one NaN is as good as another."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    bits = f"u{ours.dtype.itemsize}"
    equal = (ours.view(bits) == theirs.view(bits)) | (np.isnan(ours) & np.isnan(theirs))
    return bool(equal.all())
