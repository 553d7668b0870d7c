"""Every rule with every option worth telling apart, and how to run one through the kernels."""

from typing import Any

import numpy as np

from kernels import convert, cpu
from kernels.registry import RULES

DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0, "dampening": 0, "nesterov": False},
    "momentum": {"lr": 1e-3, "beta": 0.9},
    "adagrad": {"lr": 0.01, "lr_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "rmsprop": {
        "lr": 0.01, "alpha": 0.99, "eps": 1e-8, "eps_inside_sqrt": True,
        "momentum": 0, "centered": False,
    },
    "adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6},
    "adam": {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False,
        "decoupled_weight_decay": False, "bias_correction": True,
    },
    "adamw": {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "bias_correction": True,
    },
    "adamax": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    "nadam": {
        "lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3,
        "decoupled_weight_decay": False,
    },
    "radam": {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "decoupled_weight_decay": False,
    },
    "asgd": {"lr": 0.01, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6},
    "rprop": {"lr": 0.01, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99)},
    "yogi": {
        "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "initial_accumulator_value": 1e-6,
        "bias_correction": False,
    },
}  # fmt: skip
COMMON: dict[str, list[dict[str, Any]]] = {
    rule: [{}, {"weight_decay": 0.1}, {"maximize": True}, {"maximize": True, "weight_decay": 0.1}]
    for rule in DEFAULTS
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    "momentum": [{"beta": 0.0}, {"beta": 0.99, "lr": 0.1}],
    "adagrad": [{"lr_decay": 0.1}, {"initial_accumulator_value": 0.1, "eps": 1e-3}],
    "rmsprop": [
        {"eps_inside_sqrt": False},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps_inside_sqrt": False},
    ],
    "adadelta": [{"rho": 0.95, "eps": 1e-3, "lr": 0.1}],
    "adam": [
        {"amsgrad": True, "weight_decay": 0.1},
        {"amsgrad": True, "bias_correction": False},
        {"betas": (0.0, 0.9)},
        {"bias_correction": False, "eps": 1e-3},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "adamw": [
        {"amsgrad": True},
        {"weight_decay": 0.0},
        {"lr": 0.1, "eps": 1e-3},
        {"bias_correction": False},
    ],
    "adamax": [{"betas": (0.5, 0.6), "eps": 1e-3}, {"betas": (0.0, 0.0)}],
    "nadam": [
        {"momentum_decay": 0.5},
        {"betas": (0.0, 0.0), "momentum_decay": 0},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "radam": [
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "asgd": [{"lambd": 0.1, "alpha": 0.5, "lr": 0.1}, {"t0": 2}, {"t0": 0, "lambd": 0}],
    "rprop": [{"etas": (0.1, 3.0)}, {"step_sizes": (0.009, 0.011)}, {"lr": 100}],
    "lion": [{"betas": (0.0, 0.5), "weight_decay": 0.5}],
    "yogi": [{"bias_correction": True}, {"betas": (0.5, 0.5), "initial_accumulator_value": 1.0}],
}
TENSORWISE: dict[str, dict[str, Any]] = {
    "lamb": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "bias_correction": True},
    "lars": {"lr": 1.0, "momentum": 0.9, "nesterov": False, "trust_coefficient": 1e-3, "eps": 0},
    "adafactor": {"lr": 0.01, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0},
    "muon": {
        "lr": 1e-3, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": 5,
        "ns_coefficients": (3.4445, -4.775, 2.0315), "adjust_lr_fn": "original",
    },
}  # fmt: skip
COMMON |= {
    rule: [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}]
    for rule in TENSORWISE
}
OPTIONS |= {
    "lamb": [{"bias_correction": False}, {"betas": (0.0, 0.5), "eps": 1e-3, "lr": 0.1}],
    "lars": [
        {"nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.0, "eps": 1e-3},
        {"trust_coefficient": 0.1, "lr": 0.3},
    ],
    "adafactor": [
        {"beta2_decay": -1.0},
        {"d": 1.5, "eps": (1e-30, 1e-3)},
        {"eps": (0.1, 0.5), "lr": 1.0},
        {"beta2_decay": 0},
    ],
    "muon": [
        {"nesterov": False, "momentum": 0.8},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 6},
        {"ns_coefficients": (3.4, -4.7, 2.0), "eps": 0},
        {"ns_steps": 0, "momentum": 0.0},
    ],
}
TENSORWISE_CASES = [(rule, extra) for rule in TENSORWISE for extra in COMMON[rule] + OPTIONS[rule]]
CASES = [(rule, extra) for rule in DEFAULTS for extra in COMMON[rule] + OPTIONS[rule]]

# Each pair costs a compilation of every variant (half a second for both forms): all pairs are seen
# with a few rules, all rules with a few pairs.
PAIRS = [("F32", "F32"), ("F64", "F64"), ("F32", "BF16")]
ALL_PAIRS = [(master, grad) for master in ("F32", "F64") for grad in ("F64", "F32", "F16", "BF16")]
NUMPY = {"F32": np.float32, "F64": np.float64}


def hyper(rule: str, **extra: Any) -> dict[str, Any]:
    base = {"weight_decay": 0.01 if rule == "adamw" else 0, "maximize": False}
    return {**(DEFAULTS | TENSORWISE)[rule], **base, **extra}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """values (float64) as a gradient on the wire."""
    out = np.empty(values.size, {**cpu.GRADS, "F16": np.uint16}[dtype])
    convert.convert(np.ascontiguousarray(values, np.float64), "F64", out, dtype, 0, values.size)
    return out


def decode(wire: np.ndarray, dtype: str) -> np.ndarray:
    """A gradient on the wire as float64."""
    out = np.empty(wire.size, np.float64)
    convert.convert(wire, dtype, out, "F64", 0, wire.size)
    return out


def scalars(rule: str, h: dict[str, Any], count: int) -> tuple[float, ...]:
    """The scalars before update count, from 0; the lr has never changed."""
    entry, lr = RULES[rule], float(h["lr"])
    values = entry.start(h, lr)
    for done in range(count if entry.scalars else 0):
        values = entry.advance(h, done, lr, values)
    return values


def coefficients(rule: str, h: dict[str, Any], count: int, master: str) -> np.ndarray:
    values = RULES[rule].coefficients(h, count, float(h["lr"]), scalars(rule, h, count))
    return np.array(values, NUMPY[master])


def slots(rule: str, h: dict[str, Any], size: int, master: str) -> tuple[np.ndarray, ...]:
    return tuple(
        np.full(size, h["lr"] if slot.initial is None else slot.initial, NUMPY[master])
        for slot in RULES[rule].slots(h)
    )


def names(rule: str, h: dict[str, Any]) -> list[str]:
    return [slot.name for slot in RULES[rule].slots(h)]


def kernel(rule: str, h: dict[str, Any], master: str, grad: str) -> cpu.Kernel:
    return cpu.kernel(RULES[rule].variant(h), master, grad)
