"""Which kernels a rule can need: what is compiled at image build, or before ready."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kernels import cpu, reduce
from kernels.registry import RULES

Combination = tuple[str, str, str]

# The options that choose another scalar function. A rule ignores those that it does not have.
_FLAGS = ("nesterov", "maximize", "amsgrad", "centered", "eps_inside_sqrt")
_NUMBERS = {"momentum": (0.0, 0.9), "weight_decay": (0.0, 0.01)}
_REST: Mapping[str, Any] = {
    **{"lr": 0.001, "dampening": 0.0, "beta": 0.9, "betas": (0.9, 0.999), "eps": 1e-8},
    **{"alpha": 0.99, "rho": 0.9, "lr_decay": 0.0, "initial_accumulator_value": 0.0},
}
GRADIENTS = {"F32": ("F32", "F16", "BF16"), "F64": ("F64", "F32", "F16", "BF16")}


def _settings() -> Iterator[dict[str, Any]]:
    """Hyperparameters in every combination of the options that choose a scalar function."""
    flags = itertools.product((False, True), repeat=len(_FLAGS))
    for chosen in flags:
        for numbers in itertools.product(*_NUMBERS.values()):
            yield {**_REST, **dict(zip(_FLAGS, chosen, strict=True)),
                   **dict(zip(_NUMBERS, numbers, strict=True))}  # fmt: skip


def variants(rule: str) -> tuple[str, ...]:
    """Names of all scalar functions that a rule can need, sorted.

    Raises:
        KeyError: There is no such rule.
    """
    entry = RULES[rule]
    return tuple(sorted({entry.variant(hyper) for hyper in _settings()}))


def combinations(
    rules: Iterable[str], masters: Iterable[str] = ("F32", "F64")
) -> list[Combination]:
    """All (variant, master dtype, gradient dtype) that sessions under these rules can need."""
    return [
        (variant, master, gradient)
        for rule in rules
        for variant in variants(rule)
        for master in masters
        for gradient in GRADIENTS[master]
    ]


def warm(rules: Iterable[str], masters: Iterable[str] = ("F32", "F64")) -> int:
    """Compiles, or loads from the cache, every kernel these rules can need; returns how many."""
    masters = tuple(masters)
    wanted = combinations(rules, masters)
    cpu.warm(wanted)
    reduce.warm({gradient for master in masters for gradient in GRADIENTS[master]})
    return len(wanted)
