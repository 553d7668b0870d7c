"""What every loop computes, as a digest: from these comes the table in `kernels.revision`.

Two builds with equal digests compute equal bits, whatever the processor. Inputs are made of bits
and coefficients are rounded to float32, so that no digest depends on the last bit of the C
library's powers and exponentials: a log holds those numbers and a replay does not compute them.
Whoever changes what is digested changes the revision too, though every loop stays as it was.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import permutations, product
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kernels import accumulate, average, convert, cpu, robust, tensorwise
from kernels.cache import Loop
from kernels.registry import RULES, Hyper, Scalars

Array = npt.NDArray[Any]
Outcome = Iterator[Array]

GRADIENTS: Final = {"F32": ("F32", "F16", "BF16"), "F64": ("F64", "F32", "F16", "BF16")}
"""The gradient dtypes of each master dtype: none is wider."""
USUAL: Final = (("F32", "F32"), ("F64", "F64"), ("F32", "BF16"))
"""The pairs of dtypes that every test run compiles of every rule; the others take minutes."""
PARTS: Final = ((0, 4099), (4099, 5000))
"""Calls of a loop: more than a block and less than one, neither a whole number of vectors."""
SIZE: Final = PARTS[-1][1]
SHAPES: Final = ((4099,), (61, 67), (67, 61), (3, 21, 35))
COUNTS: Final = (0, 1, 5, 20, 1000)
"""Updates before each step: past the thresholds of radam and asgd."""
LR: Final = 0.01

_EXPONENTS: Final = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}
_STORED: Final[Mapping[str, str]] = {"F64": "f8", "F32": "f4", "F16": "u2", "BF16": "u2"}
_FRACTIONS: Final = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}

_HYPER: Final[Hyper] = {
    "momentum": 0.0, "dampening": 0.5, "nesterov": False, "beta": 0.9, "betas": (0.9, 0.999),
    "eps": 1e-8, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "alpha": 0.75, "rho": 0.9,
    "centered": False, "eps_inside_sqrt": True, "amsgrad": False, "decoupled_weight_decay": False,
    "bias_correction": True, "momentum_decay": 0.004, "lambd": 0.001, "t0": 2.0,
    "etas": (0.5, 1.2), "step_sizes": (0.004, 0.0115), "trust_coefficient": 0.001,
    "beta2_decay": -0.8, "d": 1.0, "ns_coefficients": (3.4445, -4.775, 2.0315),
    "adjust_lr_fn": "original",
    # No product of matrices: those are the BLAS's, of which `kernels.revision.of` takes care.
    "ns_steps": 0,
}  # fmt: skip
_COMMON: Final[tuple[Hyper, ...]] = (
    {"weight_decay": 0.1, "maximize": False},
    {"weight_decay": 0.0, "maximize": True},
)
_OPTIONS: Final[Mapping[str, tuple[Hyper, ...]]] = {
    "sgd": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (
        *(
            {"momentum": momentum, "centered": centered, "eps_inside_sqrt": inside}
            for momentum, centered, inside in product((0.0, 0.9), (False, True), (False, True))
        ),
        {"centered": True, "alpha": 0.0},
    ),
    "adam": ({}, {"amsgrad": True}),
    "adamw": ({}, {"amsgrad": True}),
    "nadam": ({}, {"decoupled_weight_decay": True}),
    "radam": ({}, {"decoupled_weight_decay": True}),
    "lars": ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "adafactor": ({"eps": (None, 1e-3)}, {"eps": (0.5, 0.5)}),
    "yogi": ({}, {"betas": (0.9, 0.0), "initial_accumulator_value": 0.0}),
    "muon": ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
}
"""Options by which the numbers take another way through a loop; for other rules there are none."""


class Case(NamedTuple):
    """Something compiled, and what it makes of fixed inputs."""

    name: str
    """Such as ``adam F32 BF16 clamped``."""
    entry: str
    """The row of the table that it belongs to."""
    run: Callable[[], Outcome]
    """Compiles or loads it, and gives the arrays that it has written."""


def configurations(rule: str) -> list[Hyper]:
    """The hyperparameters under which a rule is digested."""
    options = _OPTIONS.get(rule, ({},))
    return [{**_HYPER, **option, **common} for option in options for common in _COMMON]


def coefficients(rule: str, hyper: Hyper) -> Iterator[tuple[float, ...]]:
    """The coefficients of each step, not yet rounded."""
    entry = RULES[rule]
    scalars: Scalars = entry.start(hyper, LR)
    for count in COUNTS:
        yield entry.coefficients(hyper, count, LR, scalars)
        scalars = _rounded(entry.advance(hyper, count, LR, scalars))


def _rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(np.float32(number)) for number in numbers)


@cache
def values(dtype: str, seed: int, size: int = SIZE, *, tame: bool = False) -> Array:
    """Finite numbers, made of bits, most of them near 1.

    A sixteenth are zeros and denormals; an eighth are smaller and have few digits but for a last
    one, so that some lie beside the middle between two numbers of a narrower dtype.

    Args:
        dtype: F64, F32, F16 or BF16; the last two as uint16.
        seed: Of the generator, whose stream of bits NumPy never changes.
        size: How many.
        tame: Otherwise another sixteenth are of any size, or of the largest.
    """
    exponents, fractions = _EXPONENTS[dtype], _FRACTIONS[dtype]
    raw = np.asarray(np.random.PCG64(seed).random_raw(2 * size), np.uint64)
    one, other = raw[:size], raw[size:]
    top = (1 << exponents) - 1  # would be infinite
    near, kind, choice = top // 2 + 1, (other >> 32) % 32, ((other >> 8) % 32).astype(np.int64)
    fraction, exponent = one >> (64 - fractions), near - choice % 8
    few = (kind >= 4) & (kind < 8)
    rest = np.left_shift(1, np.maximum(fractions - choice, 1)) - 2
    fraction[few] &= ~rest[few].astype(np.uint64)
    exponent[few] = np.maximum(near - choice, 0)[few]
    exponent[kind < 2] = 0
    fraction[kind == 0] = 0
    if not tame:
        exponent = np.where(kind == 2, ((other >> 16) % top).astype(np.int64), exponent)
        exponent[kind == 3] = top - 1
    width = 1 + exponents + fractions
    bits = (other % 2 << (width - 1)) | (exponent.astype(np.uint64) << fractions) | fraction
    return bits.astype(f"u{width // 8}").view(_STORED[dtype])


def _elementwise(rule: str, hyper: Hyper, master: str, grad: str, *, clamped: bool) -> Outcome:
    loop = _loop(RULES[rule].variant(hyper), master, grad, clamped=clamped)
    kind = _STORED[master]
    p, spare = values(master, 0).copy(), np.zeros(SIZE, kind)
    state = tuple(
        np.full(SIZE, LR if slot.initial is None else slot.initial, kind)
        for slot in RULES[rule].slots(hyper)
    )
    for step, numbers in enumerate(coefficients(rule, hyper)):
        h = np.array((*_rounded(numbers), 0.5) if clamped else _rounded(numbers), kind)
        copy = step % 2 == 0  # from one array to another, and in place
        after = spare if copy else p
        g = values(grad, step // 2 + 1)  # each twice, for signs that turn on equality
        yield np.array([loop(p, after, g, *state, h, lo, hi, copy) for lo, hi in PARTS])
        if copy:
            p, spare = spare, p
    yield from (p, *state)


@cache
def _loop(variant: str, master: str, grad: str, *, clamped: bool) -> Loop:
    # Not `cpu.kernel`, which compiles a twin that releases the GIL: around the same machine code,
    # in as many seconds.
    return cpu._compile(variant, master, grad, clamped=clamped, nogil=False)


def _tensorwise(rule: str, hyper: Hyper, master: str, grad: str) -> Outcome:
    dims = RULES[rule].dims
    for shape in SHAPES:
        if dims in (None, len(shape)):
            yield from _tensor(rule, hyper, master, grad, shape)


def _tensor(rule: str, hyper: Hyper, master: str, grad: str, shape: tuple[int, ...]) -> Outcome:
    size = math.prod(shape)
    # A tensor's norm would be that of its largest elements, beside which the others do not count.
    p = values(master, 0, size, tame=True).copy()
    spare = np.zeros_like(p)
    shapes = [(slot.initial, slot.shape(shape)) for slot in RULES[rule].slots(hyper)]
    state = tuple(
        np.full(math.prod(part), initial, p.dtype) for initial, part in shapes if part is not None
    )
    for step, count in enumerate(COUNTS):
        wire = values(grad, step + 1, size, tame=True)
        g = tensorwise.gradient(wire, grad, master, hyper, 0.75, None if step % 2 else 0.5)
        numbers = _rounded(tensorwise.numbers(rule, hyper, count))
        copy = step % 2 == 0
        after = spare if copy else p
        finite = tensorwise.step(rule, p, after, g, state, shape, hyper, LR, numbers)
        yield np.array([finite])
        if copy:
            p, spare = spare, p
    yield from (p, *state)


def _converted(source: str, target: str) -> Outcome:
    out = np.zeros(SIZE, _STORED[target])
    yield np.array([convert.convert(values(source, 0), source, out, target, 0, SIZE)])
    yield out


def _averaged(dtype: str) -> Outcome:
    mean = values(dtype, 0).copy()
    for step in range(len(COUNTS)):
        average.ema(values(dtype, step + 1), mean, 0.99, dtype, 0, SIZE)
    yield mean


def _summed(dtype: str, master: str) -> Outcome:
    total, out = np.zeros(SIZE), np.zeros(SIZE, _STORED[master])
    for step in range(len(COUNTS)):
        accumulate.add(total, values(dtype, step), dtype, 0.75 - step, 0, SIZE)
    yield total
    accumulate.finish(total, 3.0, out, master, 0, SIZE)
    yield out


def _middle(dtype: str, master: str) -> Outcome:
    held = [robust.Held(values(dtype, step), dtype, 0.75) for step in range(6)]
    out = np.zeros(SIZE, _STORED[master])
    for count in (5, 6):
        robust.median(held[:count], out, master, 0, SIZE)
        yield out.copy()
        robust.trimmed_mean(held[:count], 0.2, out, master, 0, SIZE)
        yield out.copy()


def _all(
    run: Callable[..., Outcome], under: Iterable[tuple[str, Hyper]], *rest: str, **how: bool
) -> Outcome:
    for rule, hyper in under:
        yield from run(rule, hyper, *rest, **how)


def _elementwise_cases() -> Iterator[Case]:
    by_variant: dict[str, list[tuple[str, Hyper]]] = {}
    for rule, entry in RULES.items():
        for hyper in () if entry.tensorwise else configurations(rule):
            by_variant.setdefault(entry.variant(hyper), []).append((rule, hyper))
    for variant, under in by_variant.items():
        for master, clamped in product(GRADIENTS, (False, True)):
            for grad in GRADIENTS[master]:
                usual = not clamped and (master, grad) in USUAL
                yield Case(
                    f"{variant} {master} {grad}{' clamped' if clamped else ''}",
                    variant if usual else f"{variant} others",
                    partial(_all, _elementwise, under, master, grad, clamped=clamped),
                )


def _tensorwise_cases() -> Iterator[Case]:
    for rule in (rule for rule in RULES if RULES[rule].tensorwise):
        under = [(rule, hyper) for hyper in configurations(rule)]
        for master, grads in GRADIENTS.items():
            for grad in grads:
                run = partial(_all, _tensorwise, under, master, grad)
                yield Case(f"{rule} {master} {grad}", rule, run)


@cache
def cases() -> Mapping[str, Case]:
    """Everything that a replay may run, by its name; nothing is compiled yet."""
    conversions = permutations(_STORED, 2)
    found = (
        *_elementwise_cases(),
        *_tensorwise_cases(),
        *(Case(f"convert {a} {b}", "convert", partial(_converted, a, b)) for a, b in conversions),
        *(Case(f"average {a}", "average", partial(_averaged, a)) for a in GRADIENTS),
        *(
            Case(f"{name} {grad} {master}", name, partial(run, grad, master))
            for name, run in (("accumulate", _summed), ("robust", _middle))
            for master, grads in GRADIENTS.items()
            for grad in grads
        ),
    )
    return {case.name: case for case in found}


def digest(name: str) -> str:
    """The digest of what a case comes to, 16 hex digits."""
    total = hashlib.sha256()
    for array in cases()[name].run():
        if array.dtype.kind == "f":
            # Which of its many patterns a NaN has is the order of operands, which LLVM chooses.
            array[np.isnan(array)] = np.nan
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def table(found: Mapping[str, str]) -> dict[str, str]:
    """The rows of `kernels.revision.DIGESTS` that these digests of cases make, whole rows only."""
    rows: dict[str, list[str]] = {}
    for case in cases().values():
        rows.setdefault(case.entry, []).append(case.name)
    return {
        entry: hashlib.sha256(
            "".join(f"{name} {found[name]}\n" for name in names).encode()
        ).hexdigest()[:16]
        for entry, names in rows.items()
        if found.keys() >= set(names)
    }
