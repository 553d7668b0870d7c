"""Parameters in another dtype than the session's: copies, paid for while they live."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpost.protocol.dtypes import DTYPES, NUMPY
from kernels import convert, cpu
from service.errors import Overloaded, TensorMismatch
from service.limits import Budget
from service.sessions.lane import Program, on_pool
from service.sessions.session import Session
from service.sessions.versions import Version
from service.wire.reader import EntryLike

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """Tensors one after another, each in its own dtype; `release` once nobody reads them."""

    data: Bytes
    budget: Budget

    def release(self) -> None:
        """Gives the memory back to the budget."""
        self.budget.release(self.data.size)


async def converted(
    session: Session, version: Version, entries: Sequence[EntryLike], dtypes: Sequence[str]
) -> Packed:
    """Copies tensors of a held version, each into its own dtype.

    Raises:
        Overloaded: The budget has no room for the copy now.
        TensorMismatch: A finite value does not fit the asked-for dtype.
    """
    sizes = [entry.size * DTYPES[d] for entry, d in zip(entries, dtypes, strict=True)]
    shared = session.shared
    if not shared.budget.try_reserve(sum(sizes)):
        raise Overloaded(
            f"No memory for a copy of {sum(sizes)} bytes in another dtype now; ask again after the "
            f"pause, or pull in {session.spec.dtype}, which needs none.",
            retry_after_s=1,
            bytes=sum(sizes),
        )
    try:
        data = np.empty(sum(sizes), np.uint8)
        await on_pool(shared.pool, _fill(data, version, session.spec.dtype, entries, dtypes))
    except BaseException:
        shared.budget.release(sum(sizes))
        raise
    return Packed(data, shared.budget)


def _fill(
    data: Bytes, version: Version, master: str, entries: Sequence[EntryLike], dtypes: Sequence[str]
) -> Program[None]:
    at = 0
    for entry, dtype in zip(entries, dtypes, strict=True):
        place = data[at : at + entry.size * DTYPES[dtype]]
        at += place.size
        # Behind a tensor of odd length in a narrower dtype: views may be unaligned, loops may not.
        into: NDArray[Any] = place if place.ctypes.data % DTYPES[dtype] == 0 else place.copy()
        source = version.flat[entry.offset : entry.offset + entry.size]
        fits = yield [
            partial(convert.convert, source, master, into.view(NUMPY[dtype]), dtype, lo, hi)
            for lo, hi in cpu.chunks(0, entry.size)
        ]
        if not all(fits):
            raise TensorMismatch(
                f"{entry.name!r} holds values too large for {dtype}; pull it in a wider dtype.",
                names=[entry.name],
            )
        if into is not place:
            place[:] = into
