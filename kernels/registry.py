"""What each rule keeps and needs: variants, state slots, and the coefficients of one step.

Hyperparameters arrive as a plain mapping of *effective* values, already validated
(service/hyper.py); names and meanings are in docs/optimizers.md. Coefficients are computed on the
host in float64, once per step and per update count; the loops receive them rounded to the master
dtype.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Hyper = Mapping[str, Any]


class Slot(NamedTuple):
    """One state array of a tensor's own shape and the master dtype."""

    name: str
    """torch's name, such as ``exp_avg``."""
    initial: float
    """The value of every element before the first update."""


@dataclass(frozen=True)
class Rule:
    """An update rule, as sessions see it.

    Attributes:
        name: the name on the wire, such as ``adam``.
        variant: gives the name of the scalar function in `kernels.rules` for these hyperparameters.
        slots: gives the state arrays, in the order in which the scalar function takes them.
        coefficients: ``(hyper, count, lr)`` to the float64 coefficients of one step, where count is
            the number of updates that this tensor has completed before it (0 at the first).
    """

    name: str
    variant: Callable[[Hyper], str]
    slots: Callable[[Hyper], tuple[Slot, ...]]
    coefficients: Callable[[Hyper, int, float], tuple[float, ...]]


def _tail(hyper: Hyper) -> tuple[float, float]:
    return float(hyper["weight_decay"]), -1.0 if hyper["maximize"] else 1.0


def _sgd_variant(hyper: Hyper) -> str:
    if not hyper["momentum"]:
        return "sgd"
    return "sgd_nesterov" if hyper["nesterov"] else "sgd_momentum"


def _sgd_slots(hyper: Hyper) -> tuple[Slot, ...]:
    return (Slot("momentum_buffer", 0.0),) if hyper["momentum"] else ()


def _sgd(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    if not hyper["momentum"]:
        return (-lr, *_tail(hyper))
    damped = 1.0 - hyper["dampening"] if count else 1.0  # torch takes the first gradient whole
    return (-lr, float(hyper["momentum"]), damped, *_tail(hyper))


def _momentum(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    return (-lr, float(hyper["beta"]), 1.0 - hyper["beta"], *_tail(hyper))


def _adagrad(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    return (-lr / (1.0 + count * hyper["lr_decay"]), float(hyper["eps"]), *_tail(hyper))


def _rmsprop_variant(hyper: Hyper) -> str:
    centered = "_centered" if hyper["centered"] else ""
    return f"rmsprop{centered}{'_momentum' if hyper['momentum'] else ''}"


def _rmsprop_slots(hyper: Hyper) -> tuple[Slot, ...]:
    names = ["square_avg"]
    names += ["momentum_buffer"] if hyper["momentum"] else []
    names += ["grad_avg"] if hyper["centered"] else []
    return tuple(Slot(name, 0.0) for name in names)


def _rmsprop(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    alpha, eps = float(hyper["alpha"]), float(hyper["eps"])
    inside, outside = (eps, 0.0) if hyper["eps_inside_sqrt"] else (0.0, eps)
    return (-lr, alpha, 1.0 - alpha, inside, outside, float(hyper["momentum"]), *_tail(hyper))


def _adadelta(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    return (-lr, float(hyper["rho"]), 1.0 - hyper["rho"], float(hyper["eps"]), *_tail(hyper))


def _adam_slots(hyper: Hyper) -> tuple[Slot, ...]:
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if hyper["amsgrad"] else ())
    return tuple(Slot(name, 0.0) for name in names)


def _bias(beta: float, updates: int) -> float:
    """Returns 1 - beta**updates without the cancellation that costs ten bits at beta = 0.999."""
    return -math.expm1(updates * math.log(beta)) if beta else 1.0


def _adam(hyper: Hyper, count: int, lr: float, *, decoupled: bool = False) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    step = lr / _bias(b1, count + 1)
    unbias = 1.0 / math.sqrt(_bias(b2, count + 1))
    wd, sign = _tail(hyper)
    decay, wd = (-lr * wd, 0.0) if decoupled else (0.0, wd)
    return (-step, b1, 1.0 - b1, b2, 1.0 - b2, unbias, float(hyper["eps"]), decay, wd, sign)


def _adamw(hyper: Hyper, count: int, lr: float) -> tuple[float, ...]:
    return _adam(hyper, count, lr, decoupled=True)


def _adam_variant(hyper: Hyper) -> str:
    return "adam_amsgrad" if hyper["amsgrad"] else "adam"


def _fixed(*names: str) -> Callable[[Hyper], tuple[Slot, ...]]:
    slots = tuple(Slot(name, 0.0) for name in names)
    return lambda hyper: slots


def _adagrad_slots(hyper: Hyper) -> tuple[Slot, ...]:
    return (Slot("sum", float(hyper["initial_accumulator_value"])),)


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sgd", _sgd_variant, _sgd_slots, _sgd),
        Rule("momentum", lambda hyper: "momentum", _fixed("exp_avg"), _momentum),
        Rule("adagrad", lambda hyper: "adagrad", _adagrad_slots, _adagrad),
        Rule("rmsprop", _rmsprop_variant, _rmsprop_slots, _rmsprop),
        Rule("adadelta", lambda hyper: "adadelta", _fixed("square_avg", "acc_delta"), _adadelta),
        Rule("adam", _adam_variant, _adam_slots, _adam),
        Rule("adamw", _adam_variant, _adam_slots, _adamw),
    )
}
"""Every rule by its name on the wire."""

COEFFICIENTS: Mapping[str, int] = {
    "sgd": 3, "sgd_momentum": 5, "sgd_nesterov": 5, "momentum": 5, "adagrad": 4, "adadelta": 6,
    "rmsprop": 8, "rmsprop_momentum": 8, "rmsprop_centered": 8, "rmsprop_centered_momentum": 8,
    "adam": 10, "adam_amsgrad": 10,
}  # fmt: skip
"""How many coefficients each scalar function takes."""
