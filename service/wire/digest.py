"""The digest that tells a repeated push from another one (DESIGN §4, exactly once).

It covers the *values* in the session's dtype, in layout order, so that the same push in another
encoding (BF16, JSON, tensors in another order) is a replay; and which tensors were present, and
the canonical control values. Not a cryptographic hash: it guards against mistakes, not forgers.
"""

import struct
from collections.abc import Sequence

import numpy as np
import xxhash

from gradpost.protocol.dtypes import NUMPY, from_bf16
from service.wire.reader import Flat

BLOCK = 65536
"""Elements that are widened at a time: in the cache, and no second gradient in memory."""


def digest(
    flat: Flat, dtype: str, master: str, control: bytes, present: Sequence[bool] | None = None
) -> bytes:
    """The digest of a push: 16 bytes.

    Args:
        flat: The gradient in layout order, in `dtype` (BF16 as uint16, F16 as float16 or uint16).
        dtype: Its wire dtype, no wider than `master`; widening is exact.
        master: The session's dtype, "F32" or "F64".
        control: The canonical control values.
        present: Which tensors of the layout came; None: all.
    """
    hasher = xxhash.xxh3_128()
    marks = b"" if present is None or all(present) else np.packbits(present).tobytes()
    hasher.update(struct.pack("<QQ", len(control), len(marks)) + control + marks)
    if dtype == master:
        hasher.update(flat.view(np.uint8).data)
        return hasher.digest()
    with np.errstate(all="ignore"):  # a signalling NaN is the finite check's business
        for begin in range(0, flat.size, BLOCK):
            block = _widened(flat[begin : begin + BLOCK], dtype, NUMPY[master])
            hasher.update(block.view(np.uint8).data)
    return hasher.digest()


def _widened(block: Flat, dtype: str, to: np.dtype[np.generic]) -> Flat:
    """One block in the master dtype."""
    if dtype == "BF16":
        return from_bf16(block.view(np.uint16)).astype(to, copy=False)
    return block.view(NUMPY[dtype]).astype(to, copy=False)
