"""Which loops a rule can need: what is compiled at image build, or before ready."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

from gradpost.protocol.dtypes import DTYPES
from kernels import convert, cpu, reduce, rows, tensorwise
from kernels.registry import RULES

Combination = tuple[str, str, str]

GRADIENTS = {"F32": ("F32", "F16", "BF16"), "F64": ("F64", "F32", "F16", "BF16")}


def variants(rule: str) -> tuple[str, ...]:
    """The scalar functions that the options of a rule choose from; none if it is per tensor."""
    return () if RULES[rule].tensorwise else RULES[rule].variants or (rule,)


def combinations(
    rules: Iterable[str], masters: Iterable[str] = ("F32", "F64")
) -> list[Combination]:
    """All (variant, master dtype, gradient dtype) that sessions under these rules can need."""
    names = dict.fromkeys(variant for rule in rules for variant in variants(rule))
    return [
        (variant, master, gradient)
        for variant in names
        for master in masters
        for gradient in GRADIENTS[master]
    ]


def conversions(masters: Iterable[str] = ("F32", "F64")) -> list[tuple[str, str]]:
    """All (from, to) dtypes of uploads to, and pulls from, sessions in these dtypes."""
    pairs = [(master, other) for master in masters for other in DTYPES if other != master]
    return list(dict.fromkeys([*pairs, *((other, master) for master, other in pairs)]))


def warm(
    rules: Iterable[str],
    masters: Iterable[str] = ("F32", "F64"),
    stop: threading.Event | None = None,
) -> int:
    """Compiles, or loads from the cache, every loop these rules can need; returns how many.

    Args:
        rules: Names of rules.
        masters: Dtypes of sessions.
        stop: Once it is set, no further loop is begun.
    """
    rules, masters = tuple(rules), tuple(masters)
    gradients = dict.fromkeys(dtype for master in masters for dtype in GRADIENTS[master])
    loads: list[Callable[[], object]] = [
        *(partial(cpu.kernel, *names) for names in combinations(rules, masters)),
        *(
            partial(rows.kernel, rule, master)
            for rule in rules
            if rule in rows.VARIANTS  # which are named as the rules that may be lazy
            for master in masters
        ),
        *(partial(reduce.warm, [dtype]) for dtype in gradients),
        *(partial(convert.warm, *pair) for pair in conversions(masters)),
        *(
            partial(tensorwise.warm, rule, master, master)
            for rule in rules
            if RULES[rule].tensorwise
            for master in masters
        ),
    ]
    for count, load in enumerate(loads):
        if stop is not None and stop.is_set():
            return count
        load()
    return len(loads)
