"""The disk cache of compiled loops: one folder per content of this package and per version.

Numba's own cache looks only at the file of the compiled function, so that an edited rule would be
served from an old entry. Here the folder is named by a hash of every ``kernels/*.py`` and of the
versions that matter; the CPU's name and features are part of Numba's key inside it.
"""

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

Loop = Callable[..., Any]

_alive: list[Any] = []  # an entry point does not keep its machine code alive: its dispatcher does


def root() -> Path:
    """Returns where cache folders lie: NUMBA_CACHE_DIR, or gradpost/ in the user's cache folder."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gradpost"


@cache
def fingerprint() -> str:
    """Returns the hash that names the cache folder: sources of this package and versions."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    for version in (numba.__version__, llvmlite.__version__, np.__version__):
        digest.update(version.encode() + b"\0")
    digest.update(platform.python_version().encode())
    return digest.hexdigest()[:24]


class _Locator(_CacheLocator):
    """Tells Numba where a function's entries lie; our folder's name stands for the sources."""

    def get_cache_path(self) -> str:
        return str(root() / fingerprint())

    def get_source_stamp(self) -> str:
        return fingerprint()

    def get_disambiguator(self) -> str:
        return "0"

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "_Locator":
        return cls()


class _Files(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # type: ignore[list-item]  # noqa: RUF012


class _Cache(FunctionCache):
    _impl_class = _Files

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Loads; a folder that cannot be read is an empty one."""
        try:
            return super().load_overload(signature, target_context)  # type: ignore[no-untyped-call]
        except OSError:
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Saves, unless the folder cannot be written: then nothing is lost but time."""
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except OSError:
            self.disable()  # type: ignore[no-untyped-call]


def compile_cached(function: Callable[..., Any], signature: Any, *, nogil: bool) -> Loop:
    """Returns the compiled entry point of function for signature, from the disk cache if there.

    The entry point takes positional arguments of exactly these types and checks almost nothing.
    """
    dispatcher: Any = numba.njit(nogil=nogil, error_model="numpy")(function)
    with contextlib.suppress(OSError, RuntimeError):  # no folder: compile for this process only
        dispatcher._cache = _Cache(function)  # type: ignore[no-untyped-call]
    dispatcher.compile(signature)
    _alive.append(dispatcher)
    return dispatcher.overloads[signature].entry_point  # type: ignore[no-any-return]
