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
Scalars = tuple[float, ...]
Shape = tuple[int, ...]


def _own(shape: Shape) -> Shape | None:
    return shape


class Slot(NamedTuple):
    """One state array of a tensor, of the master dtype."""

    name: str
    """torch's name, such as ``exp_avg``."""
    initial: float | None
    """The value of every element before the first update; None: the lr of that update."""
    shape: Callable[[Shape], Shape | None] = _own
    """Its shape for a tensor's; None: such a tensor has none. Elementwise rules: the tensor's."""


def _none(hyper: Hyper, lr: float) -> Scalars:
    return ()


def _unchanged(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> Scalars:
    return scalars


@dataclass(frozen=True)
class Rule:
    """An update rule, as sessions see it.

    Attributes:
        name: the name on the wire, such as ``adam``.
        variant: gives the name of the scalar function in `kernels.rules` for these hyperparameters.
        slots: gives the state arrays, in the order in which the scalar function takes them.
        coefficients: ``(hyper, count, lr, scalars)`` to the float64 coefficients of one step, where
            count is the number of updates that this tensor has completed before it (0 at the
            first).
        variants: all names that ``variant`` can give; by default the rule's own.
        scalars: names of the float64 scalars that a tensor keeps beside its arrays, as torch names
            them; at most two, for most rules none.
        start: ``(hyper, lr)`` to their values before the first update; lr is that of this update.
        advance: ``(hyper, count, lr, scalars)`` to their values after an update that had count
            updates before it.
        tensorwise: the rule needs whole tensors: its function, of the same name, stands in
            `kernels.tensorwise`; it has no scalar function and no coefficients.
        dims: how many dimensions a tensor must have; None: any number.
    """

    name: str
    variant: Callable[[Hyper], str]
    slots: Callable[[Hyper], tuple[Slot, ...]]
    coefficients: Callable[[Hyper, int, float, Scalars], tuple[float, ...]]
    variants: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    start: Callable[[Hyper, float], Scalars] = _none
    advance: Callable[[Hyper, int, float, Scalars], Scalars] = _unchanged
    tensorwise: bool = False
    dims: int | None = None


def _tail(hyper: Hyper) -> tuple[float, float]:
    return float(hyper["weight_decay"]), -1.0 if hyper["maximize"] else 1.0


def _decays(hyper: Hyper, lr: float, *, decoupled: bool) -> tuple[float, float, float]:
    """Returns what decoupled decay adds of p, the L2 decay, and the sign."""
    wd, sign = _tail(hyper)
    return (-lr * wd, 0.0, sign) if decoupled else (0.0, wd, sign)


def _sgd_variant(hyper: Hyper) -> str:
    if not hyper["momentum"]:
        return "sgd"
    return "sgd_nesterov" if hyper["nesterov"] else "sgd_momentum"


def _sgd_slots(hyper: Hyper) -> tuple[Slot, ...]:
    return (Slot("momentum_buffer", 0.0),) if hyper["momentum"] else ()


def _sgd(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    if not hyper["momentum"]:
        return (-lr, *_tail(hyper))
    damped = 1.0 - hyper["dampening"] if count else 1.0  # torch takes the first gradient whole
    return (-lr, float(hyper["momentum"]), damped, *_tail(hyper))


def _momentum(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return (-lr, float(hyper["beta"]), 1.0 - hyper["beta"], *_tail(hyper))


def _adagrad(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return (-lr / (1.0 + count * hyper["lr_decay"]), float(hyper["eps"]), *_tail(hyper))


def _rmsprop_variant(hyper: Hyper) -> str:
    centered = "_centered" if hyper["centered"] else ""
    return f"rmsprop{centered}{'_momentum' if hyper['momentum'] else ''}"


def _rmsprop_slots(hyper: Hyper) -> tuple[Slot, ...]:
    names = ["square_avg"]
    names += ["momentum_buffer"] if hyper["momentum"] else []
    names += ["grad_avg"] if hyper["centered"] else []
    return tuple(Slot(name, 0.0) for name in names)


def _rmsprop(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    alpha, eps = float(hyper["alpha"]), float(hyper["eps"])
    inside, outside = (eps, 0.0) if hyper["eps_inside_sqrt"] else (0.0, eps)
    return (-lr, alpha, 1.0 - alpha, inside, outside, float(hyper["momentum"]), *_tail(hyper))


def _adadelta(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return (-lr, float(hyper["rho"]), 1.0 - hyper["rho"], float(hyper["eps"]), *_tail(hyper))


def _adam_slots(hyper: Hyper) -> tuple[Slot, ...]:
    names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if hyper["amsgrad"] else ())
    return tuple(Slot(name, 0.0) for name in names)


def _bias(beta: float, updates: int) -> float:
    """Returns 1 - beta**updates without the cancellation that costs ten bits at beta = 0.999."""
    return -math.expm1(updates * math.log(beta)) if beta else 1.0


def corrections(hyper: Hyper, count: int, lr: float) -> tuple[float, float]:
    """Returns lr/(1 - b1**t) and 1/sqrt(1 - b2**t); lr and 1 without bias correction."""
    if not hyper["bias_correction"]:
        return lr, 1.0
    b1, b2 = hyper["betas"]
    return lr / _bias(b1, count + 1), 1.0 / math.sqrt(_bias(b2, count + 1))


def _adam_like(hyper: Hyper, count: int, lr: float, *, decoupled: bool) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    step, unbias = corrections(hyper, count, lr)
    decays = _decays(hyper, lr, decoupled=decoupled)
    return (-step, b1, 1.0 - b1, b2, 1.0 - b2, unbias, float(hyper["eps"]), *decays)


def _adam(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return _adam_like(hyper, count, lr, decoupled=hyper["decoupled_weight_decay"])


def _adamw(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return _adam_like(hyper, count, lr, decoupled=True)


def _adam_variant(hyper: Hyper) -> str:
    return "adam_amsgrad" if hyper["amsgrad"] else "adam"


def _adamax(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    step = lr / _bias(b1, count + 1)
    return (-step, b1, 1.0 - b1, b2, float(hyper["eps"]), *_tail(hyper))


def _nadam_mu(hyper: Hyper, update: int) -> float:
    """Returns nadam's momentum in an update, counted from 1: it rises from beta/2 to beta."""
    schedule = 1.0 - 0.5 * 0.96 ** (update * hyper["momentum_decay"])
    return float(hyper["betas"][0] * schedule)


def _nadam(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    mu, following = _nadam_mu(hyper, count + 1), _nadam_mu(hyper, count + 2)
    product = scalars[0] * mu
    now, ahead = (1.0 - mu) / (1.0 - product), following / (1.0 - product * following)
    unbias = 1.0 / math.sqrt(_bias(b2, count + 1))
    decays = _decays(hyper, lr, decoupled=hyper["decoupled_weight_decay"])
    moments = b1, 1.0 - b1, b2, 1.0 - b2, unbias, float(hyper["eps"])
    return (-lr * now, ahead / now, *moments, *decays)


def _nadam_start(hyper: Hyper, lr: float) -> Scalars:
    return (1.0,)


def _nadam_advance(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> Scalars:
    return (scalars[0] * _nadam_mu(hyper, count + 1),)


def _langevin(x: float) -> float:
    """Returns coth(x) - 1/x for x from 0 to 1, by its continued fraction."""
    below = 25.0
    for odd in range(23, 1, -2):
        below = odd + x * x / below
    return x / below


def _length(beta: float, updates: int) -> float:
    """Returns radam's rho_t: how many gradients the average of squares holds, in effect.

    That is rho_inf - 2*t*beta**t/(1 - beta**t), two numbers near 2000 whose difference may be 5;
    with beta = exp(-2*x) it is coth(x) - t*coth(t*x) + t, where the poles cancel.
    """
    x = -math.log(beta) / 2 if beta else math.inf
    if updates * x > 1:
        return (1 + beta) / (1 - beta) - 2 * updates * beta**updates / _bias(beta, updates)
    return _langevin(x) - updates * _langevin(updates * x) + updates


def _radam(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    slope, base = 0.0, 1.0
    full, rho = (1 + b2) / (1 - b2), _length(b2, count + 1)
    if rho > 5:
        rectified = (rho - 4) * (rho - 2) * full / ((full - 4) * (full - 2) * rho)
        slope = 1.0 / math.sqrt(rectified * _bias(b2, count + 1))
        base = slope * hyper["eps"]
    step = lr / _bias(b1, count + 1)
    decays = _decays(hyper, lr, decoupled=hyper["decoupled_weight_decay"])
    return (-step, b1, 1.0 - b1, b2, 1.0 - b2, slope, base, *decays)


def _asgd(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    eta, mu = scalars
    return (-eta, -eta * hyper["lambd"], mu, float(mu == 1), *_tail(hyper))


def _asgd_start(hyper: Hyper, lr: float) -> Scalars:
    return (lr, 1.0)


def _asgd_advance(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> Scalars:
    eta = lr * (1 + hyper["lambd"] * lr * (count + 1)) ** -hyper["alpha"]
    return (eta, 1.0 / max(1.0, count + 1 - hyper["t0"]))


def _rprop(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    return (*map(float, (*hyper["etas"], *hyper["step_sizes"])), 0.0, *_tail(hyper))


def _lion(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    return (-lr, b1, 1.0 - b1, b2, 1.0 - b2, *_decays(hyper, lr, decoupled=True))


def _yogi(hyper: Hyper, count: int, lr: float, scalars: Scalars) -> tuple[float, ...]:
    b1, b2 = hyper["betas"]
    step, unbias = corrections(hyper, count, lr)
    return (-step, b1, 1.0 - b1, 1.0 - b2, unbias, float(hyper["eps"]), *_tail(hyper))


def _yogi_slots(hyper: Hyper) -> tuple[Slot, ...]:
    initial = float(hyper["initial_accumulator_value"])
    return (Slot("exp_avg", 0.0), Slot("exp_avg_sq", initial))


def _rprop_slots(hyper: Hyper) -> tuple[Slot, ...]:
    return (Slot("prev", 0.0), Slot("step_size", None))


def _fixed(*names: str) -> Callable[[Hyper], tuple[Slot, ...]]:
    slots = tuple(Slot(name, 0.0) for name in names)
    return lambda hyper: slots


def _rows(shape: Shape) -> Shape | None:
    return (*shape[:-1], 1) if len(shape) > 1 else None


def _columns(shape: Shape) -> Shape | None:
    return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None


def _vector(shape: Shape) -> Shape | None:
    return shape if len(shape) < 2 else None


def _adafactor_slots(hyper: Hyper) -> tuple[Slot, ...]:
    shapes = {"row_var": _rows, "col_var": _columns, "variance": _vector}
    return tuple(Slot(name, 0.0, shape) for name, shape in shapes.items())


def _tensorwise(
    name: str, slots: Callable[[Hyper], tuple[Slot, ...]], dims: int | None = None
) -> Rule:
    return Rule(
        name, lambda hyper: name, slots, lambda hyper, count, lr, scalars: (),
        tensorwise=True, dims=dims,
    )  # fmt: skip


def _adagrad_slots(hyper: Hyper) -> tuple[Slot, ...]:
    return (Slot("sum", float(hyper["initial_accumulator_value"])),)


_ADAM = ("adam", "adam_amsgrad")
_RMSPROP = ("rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_centered_momentum")

RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sgd", _sgd_variant, _sgd_slots, _sgd, ("sgd", "sgd_momentum", "sgd_nesterov")),
        Rule("momentum", lambda hyper: "momentum", _fixed("exp_avg"), _momentum),
        Rule("adagrad", lambda hyper: "adagrad", _adagrad_slots, _adagrad),
        Rule("rmsprop", _rmsprop_variant, _rmsprop_slots, _rmsprop, _RMSPROP),
        Rule("adadelta", lambda hyper: "adadelta", _fixed("square_avg", "acc_delta"), _adadelta),
        Rule("adam", _adam_variant, _adam_slots, _adam, _ADAM),
        Rule("adamw", _adam_variant, _adam_slots, _adamw, _ADAM),
        Rule("adamax", lambda hyper: "adamax", _fixed("exp_avg", "exp_inf"), _adamax),
        Rule(
            "nadam", lambda hyper: "nadam", _fixed("exp_avg", "exp_avg_sq"), _nadam,
            scalars=("mu_product",), start=_nadam_start, advance=_nadam_advance,
        ),
        Rule("radam", lambda hyper: "radam", _fixed("exp_avg", "exp_avg_sq"), _radam),
        Rule(
            "asgd", lambda hyper: "asgd", _fixed("ax"), _asgd,
            scalars=("eta", "mu"), start=_asgd_start, advance=_asgd_advance,
        ),
        Rule("rprop", lambda hyper: "rprop", _rprop_slots, _rprop),
        Rule("lion", lambda hyper: "lion", _fixed("exp_avg"), _lion),
        Rule("yogi", lambda hyper: "yogi", _yogi_slots, _yogi),
        _tensorwise("lamb", _fixed("exp_avg", "exp_avg_sq")),
        _tensorwise("lars", _fixed("momentum_buffer")),
        _tensorwise("adafactor", _adafactor_slots),
        _tensorwise("muon", _fixed("momentum_buffer"), dims=2),
    )
}  # fmt: skip
"""Every rule by its name on the wire."""

COEFFICIENTS: Mapping[str, int] = {
    "sgd": 3, "sgd_momentum": 5, "sgd_nesterov": 5, "momentum": 5, "adagrad": 4, "adadelta": 6,
    "rmsprop": 8, "rmsprop_momentum": 8, "rmsprop_centered": 8, "rmsprop_centered_momentum": 8,
    "adam": 10, "adam_amsgrad": 10, "adamax": 7, "nadam": 11, "radam": 10, "asgd": 6, "rprop": 7,
    "lion": 8, "yogi": 8,
}  # fmt: skip
"""How many coefficients each scalar function takes."""
