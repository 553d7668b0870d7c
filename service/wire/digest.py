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
from service.wire.rows import Rows

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


def digest_rows(
    dense: Sequence[Flat],
    rows: Sequence[Rows],
    control: bytes,
    present: Sequence[bool] | None = None,
) -> bytes:
    """The digest of a push of which some tensors came as rows: 16 bytes, of what came alone.

    Args:
        dense: The rest of what came, in layout order, in the session's dtype.
        rows: By their entries; of the session's dtype too.
        control: The canonical control values.
        present: Which tensors of the layout came; None: all.
    """
    hasher = xxhash.xxh3_128(b"rows")
    marks = b"" if present is None or all(present) else np.packbits(present).tobytes()
    hasher.update(struct.pack("<QQQ", len(control), len(marks), len(rows)) + control + marks)
    for stretch in dense:
        hasher.update(stretch.view(np.uint8).data)
    for one in rows:
        hasher.update(struct.pack("<QQQ", one.entry, one.width, one.idx.size))
        hasher.update(one.idx.view(np.uint8).data)
        hasher.update(one.values.view(np.uint8).data)
    return hasher.digest()


def _widened(block: Flat, dtype: str, to: np.dtype[np.generic]) -> Flat:
    """One block in the master dtype."""
    if dtype == "BF16":
        return from_bf16(block.view(np.uint16)).astype(to, copy=False)
    return block.view(NUMPY[dtype]).astype(to, copy=False)
