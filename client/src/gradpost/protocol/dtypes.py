"""The four dtypes of the wire, and bfloat16 in plain NumPy."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES: Mapping[str, int] = MappingProxyType({"F64": 8, "F32": 4, "F16": 2, "BF16": 2})
"""Wire name → bytes of one element, widest first."""

NUMPY: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),  # storage only: NumPy has no bfloat16
    }
)

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def name_of(dtype: np.dtype[Any]) -> str:
    """The wire name of a NumPy dtype (bfloat16 is known by its name, without an import).

    Raises:
        ValueError: The dtype does not travel.
    """
    try:
        return _NAMES[dtype.name]
    except KeyError:
        raise ValueError(
            f"dtype {dtype.name} does not travel; use one of {', '.join(_NAMES)}."
        ) from None


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds float32 to bfloat16 bits, to nearest even; NaN stays NaN (quiet)."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    quiet = (bits >> 16) | 0x40
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, quiet, rounded).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widens bfloat16 bits to float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
