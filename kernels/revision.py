"""Whether two servers compute the same bits: what a log that is replayed is bound to.

A change of these digests makes logs written before it unreplayable under that rule, so it is a
change that users hear of. `kernels.digests` says what is digested; ``make renew-digests`` writes
the table.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

import numpy as np

from kernels import blas

DIGESTS: Final[Mapping[str, str]] = {
    "sgd": "c9525f3fdd80cd73",
    "sgd others": "17bec5c9db90f2e3",
    "sgd_momentum": "93eea49b22c3e367",
    "sgd_momentum others": "c39945ddf0fb8afa",
    "sgd_nesterov": "9c7d91af7f5901af",
    "sgd_nesterov others": "6b396c9bd75b21b9",
    "momentum": "d3a2e411013da0dc",
    "momentum others": "25749081628a8b70",
    "adagrad": "267b01fd864498ff",
    "adagrad others": "2bd62f6b3b9c3385",
    "rmsprop": "2249a1371cf21f97",
    "rmsprop others": "529a39dd5ceca923",
    "rmsprop_centered": "df70b75a7c32ef7a",
    "rmsprop_centered others": "ac6de40aeee75dc2",
    "rmsprop_momentum": "65472f43b4dc3a0b",
    "rmsprop_momentum others": "6d2fc5539edcdc75",
    "rmsprop_centered_momentum": "0ba6434092922d74",
    "rmsprop_centered_momentum others": "be7655b47ce7ed98",
    "adadelta": "220ca9aa402d298c",
    "adadelta others": "b642d9c66b7d7fae",
    "adam": "6d787641065aec55",
    "adam others": "04a65a98448a403f",
    "adam_amsgrad": "0e1681853c5f6ea7",
    "adam_amsgrad others": "f2fbf050af6a2526",
    "adamax": "d58a9105e8be479d",
    "adamax others": "68abdb9914932773",
    "nadam": "1ba4d1d22a9e41a5",
    "nadam others": "02de7226e74372df",
    "radam": "6c2bb330393e0dcf",
    "radam others": "4df0e381d7a4b0bb",
    "asgd": "345aede0a6f07361",
    "asgd others": "ab3f545bae79f13a",
    "rprop": "0efc7caed4283d1e",
    "rprop others": "5fe94ddf1779b6b6",
    "lion": "934b058a6416ca5f",
    "lion others": "a472b860fe3cf250",
    "yogi": "6ef650e4b3bc2249",
    "yogi others": "bb42ffda08611adb",
    "lamb": "df79a90a3b89a2f5",
    "lars": "e4252e938888704b",
    "adafactor": "78e0f4b3af5da1f0",
    "muon": "e0c3f3407c51e3fc",
    "convert": "722323e22315b165",
    "average": "684c11e86cd17706",
    "accumulate": "194355bbec0b1fca",
    "robust": "75d3f8d8157109ba",
}
"""By the name of a scalar function or of a rule per tensor, and of the rest that a replay runs. A
scalar function has two rows: what every test run compiles of it, and its other loops."""

ROUNDS: Final = ("accumulate", "robust")
"""What a replay runs where contributions are added, or are sorted."""
_EVERY: Final = ("convert", "average")
"""What a replay runs under any rule."""
_FUNCTIONS: Final = {"adamw": "adam"}
"""Rules that run the function of another one."""
_SHAPES: Final = ((3, 5), (17, 64), (64, 64), (130, 33), (48, 1200), (1200, 48), (300, 301))


def of(rules: Iterable[str]) -> str:
    """The revision of what sessions under these rules run.

    Two servers that give the same string compute the same bits under them: a new rule, or another
    one of these, leaves it as it is. The matrix products of muon are
    the BLAS's, which has other code for other processors: a digest of some of them follows, and
    what holds of these holds, very likely, of all.

    Args:
        rules: Their names on the wire; and of `ROUNDS` what the sessions run of them.
    """
    names = {_FUNCTIONS.get(rule, rule) for rule in rules}
    text = "".join(
        f"{row} {digest}\n"
        for row, digest in sorted(DIGESTS.items())
        if row in _EVERY or _function(row) in names
    )
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{found}-{_products()}" if "muon" in names else found


def _function(row: str) -> str:
    """The rule of a row: `rmsprop` of `rmsprop_centered others`."""
    return row.partition(" ")[0].partition("_")[0]


@cache
def _products() -> str:
    """A digest of fixed products, in the form in which `kernels.tensorwise` takes them."""
    total = hashlib.sha256()
    for seed, shape in enumerate(_SHAPES):
        raw = np.asarray(np.random.PCG64(seed).random_raw(shape[0] * shape[1]), np.uint64)
        exact = (raw >> 40).astype(np.float64) * 2.0**-24 - 0.5  # in float32 too
        for kind in (np.float32, np.float64):
            x = exact.astype(kind).reshape(shape)
            wide = shape[0] <= shape[1]
            with blas.one_thread():
                gram = np.matmul(x if wide else x.T, x.T if wide else x)
                square = np.matmul(gram, gram)
                y = np.matmul(square if wide else x, x if wide else square)
            for array in (gram, square, y):
                total.update(array.tobytes())
    return total.hexdigest()[:16]
