"""An independent oracle of every update rule: whole arrays, plain formulas, float64 or wider.

Written from the papers and torch's documentation, and deliberately naive. Never imported by what
is shipped, and never imports ``kernels``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def start(rule: str, hyper: Mapping[str, Any], p: np.ndarray) -> Arrays:
    """State before the first update, under torch's names."""
    zeros = np.zeros_like(p)
    if rule == "sgd":
        return {"momentum_buffer": zeros} if hyper["momentum"] else {}
    if rule == "momentum":
        return {"exp_avg": zeros}
    if rule == "adagrad":
        return {"sum": zeros + hyper["initial_accumulator_value"]}
    if rule == "adadelta":
        return {"square_avg": zeros, "acc_delta": zeros.copy()}
    if rule == "rmsprop":
        state = {"square_avg": zeros}
        if hyper["momentum"]:
            state["momentum_buffer"] = zeros.copy()
        if hyper["centered"]:
            state["grad_avg"] = zeros.copy()
        return state
    state = {"exp_avg": zeros, "exp_avg_sq": zeros.copy()}
    if hyper["amsgrad"]:
        state["max_exp_avg_sq"] = zeros.copy()
    return state


def step(
    rule: str,
    hyper: Mapping[str, Any],
    count: int,
    p: np.ndarray,
    g: np.ndarray,
    state: Arrays,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, Arrays]:
    """One update; ``count`` updates came before. Arguments are not changed."""
    lr = dtype(hyper["lr"])
    p, g = p.astype(dtype), g.astype(dtype)
    state = {name: value.astype(dtype) for name, value in state.items()}
    if hyper["maximize"]:
        g = -g
    if hyper["weight_decay"] and rule == "adamw":
        p = p * (1 - lr * dtype(hyper["weight_decay"]))
    elif hyper["weight_decay"]:
        g = g + dtype(hyper["weight_decay"]) * p
    return _RULES[rule](hyper, count, lr, p, g, state, dtype)


def _sgd(hyper, count, lr, p, g, state, dtype):
    if not hyper["momentum"]:
        return p - lr * g, {}
    mu = dtype(hyper["momentum"])
    if count == 0:
        buffer = mu * state["momentum_buffer"] + g
    else:
        buffer = mu * state["momentum_buffer"] + (1 - dtype(hyper["dampening"])) * g
    move = g + mu * buffer if hyper["nesterov"] else buffer
    return p - lr * move, {"momentum_buffer": buffer}


def _momentum(hyper, count, lr, p, g, state, dtype):
    beta = dtype(hyper["beta"])
    average = beta * state["exp_avg"] + (1 - beta) * g
    return p - lr * average, {"exp_avg": average}


def _adagrad(hyper, count, lr, p, g, state, dtype):
    rate = lr / (1 + count * dtype(hyper["lr_decay"]))
    total = state["sum"] + g * g
    return p - rate * g / (np.sqrt(total) + dtype(hyper["eps"])), {"sum": total}


def _rmsprop(hyper, count, lr, p, g, state, dtype):
    alpha, eps = dtype(hyper["alpha"]), dtype(hyper["eps"])
    after = {"square_avg": alpha * state["square_avg"] + (1 - alpha) * g * g}
    spread = after["square_avg"]
    if hyper["centered"]:
        after["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * g
        spread = np.maximum(spread - after["grad_avg"] ** 2, 0)
    root = np.sqrt(spread + eps) if hyper["eps_inside_sqrt"] else np.sqrt(spread) + eps
    move = g / root
    if hyper["momentum"]:
        move = after["momentum_buffer"] = dtype(hyper["momentum"]) * state["momentum_buffer"] + move
    return p - lr * move, after


def _adadelta(hyper, count, lr, p, g, state, dtype):
    rho, eps = dtype(hyper["rho"]), dtype(hyper["eps"])
    square = rho * state["square_avg"] + (1 - rho) * g * g
    delta = np.sqrt(state["acc_delta"] + eps) / np.sqrt(square + eps) * g
    moved = rho * state["acc_delta"] + (1 - rho) * delta * delta
    return p - lr * delta, {"square_avg": square, "acc_delta": moved}


def _adam(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    after = {"exp_avg": m, "exp_avg_sq": v}
    if hyper["amsgrad"]:
        v = after["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    m_hat = m / (1 - b1 ** (count + 1))
    v_hat = v / (1 - b2 ** (count + 1))
    return p - lr * m_hat / (np.sqrt(v_hat) + dtype(hyper["eps"])), after


_RULES = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adadelta": _adadelta,
    "adam": _adam,
    "adamw": _adam,
}
