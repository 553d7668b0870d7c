"""Products of matrices on one thread of NumPy's BLAS, so that their bits do not vary with threads.

The pool runs several tensors at once; a BLAS with threads of its own beside it is slower, not
faster (40 to 57 against 85 to 100 GFLOP/s on two busy cores). OpenBLAS, which NumPy's wheels
bring, is told so for as long as anyone multiplies; another BLAS (MKL, Accelerate) keeps its own
number of threads.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

_NAMES: Final = (
    "scipy_openblas_{}_num_threads64_",
    "scipy_openblas_{}_num_threads",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


def _switches() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """How to read and how to set the threads of OpenBLAS; None with another BLAS."""
    try:
        library = ctypes.CDLL(np.linalg._umath_linalg.__file__)
    except (AttributeError, OSError):
        return None
    for name in _NAMES:
        if hasattr(library, name.format("set")):
            return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


_lock = threading.Lock()
_found = _switches()
_inside = 0
_before = 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Holds OpenBLAS to one thread; for the whole process, until the last one leaves."""
    global _inside, _before
    if _found is None:
        yield
        return
    read, write = _found
    with _lock:
        if not _inside:
            _before = read()
            write(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                write(_before)
