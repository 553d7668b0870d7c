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
    if rule == "adamax":
        return {"exp_avg": zeros, "exp_inf": zeros.copy()}
    if rule == "asgd":
        return {"ax": zeros}
    if rule == "rprop":
        return {"prev": zeros, "step_size": zeros + hyper["lr"]}
    if rule == "lion":
        return {"exp_avg": zeros}
    if rule == "yogi":
        return {"exp_avg": zeros, "exp_avg_sq": zeros + hyper["initial_accumulator_value"]}
    if rule in ("lars", "muon"):
        return {"momentum_buffer": zeros}
    if rule == "adafactor" and p.ndim < 2:
        return {"variance": zeros}
    if rule == "adafactor":
        return {"row_var": zeros[..., :1].copy(), "col_var": zeros.sum(-2, keepdims=True)}
    state = {"exp_avg": zeros, "exp_avg_sq": zeros.copy()}
    if hyper.get("amsgrad"):
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
    if rule == "adafactor" and hyper["eps"][0] is None:
        hyper = {**hyper, "eps": (np.finfo(p.dtype).eps, hyper["eps"][1])}
    p, g = p.astype(dtype), g.astype(dtype)
    state = {name: value.astype(dtype) for name, value in state.items()}
    if hyper["maximize"]:
        g = -g
    if rule in ("lamb", "lars"):  # decay has a place of its own in them
        return _RULES[rule](hyper, count, lr, p, g, state, dtype)
    if _is_decoupled(rule, hyper):
        hyper = {**hyper, "before": p}
        p = p * (1 - lr * dtype(hyper["weight_decay"]))
    elif hyper["weight_decay"]:
        g = g + dtype(hyper["weight_decay"]) * p
    return _RULES[rule](hyper, count, lr, p, g, state, dtype)


def _is_decoupled(rule, hyper):
    return rule in ("adamw", "lion", "adafactor", "muon") or hyper.get(
        "decoupled_weight_decay", False
    )


def doubtful(
    rule: str, hyper: Mapping[str, Any], p: np.ndarray, g: np.ndarray, state: Arrays, ulp: float
) -> np.ndarray:
    """Where a rule takes the sign of what rounding in the arrays' dtype may turn or make 0."""
    p, g = p.astype(np.longdouble), g.astype(np.longdouble)
    kept = {name: value.astype(np.longdouble) for name, value in state.items()}
    decay = 0 if _is_decoupled(rule, hyper) else hyper["weight_decay"] * p
    g = -g if hyper["maximize"] else g
    rounding = 8 * ulp * (abs(g) + abs(decay)) if hyper["weight_decay"] else 0 * g
    g = g + decay
    if rule == "lion":
        b1 = hyper["betas"][0]
        old, new = b1 * kept["exp_avg"], (1 - b1) * g
        return abs(old + new) <= 8 * ulp * (abs(old) + abs(new)) + 4 * _tiny(ulp)
    if rule == "rprop":
        along = abs(g * kept["prev"])
        return (abs(g) < rounding) | (along < 4 * _tiny(ulp)) & (along > 0)
    if rule == "yogi":
        return abs(kept["exp_avg_sq"] - g * g) < 2 * abs(g) * rounding
    return np.zeros(p.shape, bool)


def _tiny(ulp):
    return 2.0**-149 if ulp > 1e-10 else 5e-324


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
    if not hyper["bias_correction"]:
        return p - lr * m / (np.sqrt(v) + dtype(hyper["eps"])), after
    m_hat = m / (1 - b1 ** (count + 1))
    v_hat = v / (1 - b2 ** (count + 1))
    return p - lr * m_hat / (np.sqrt(v_hat) + dtype(hyper["eps"])), after


def _adamax(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    m = b1 * state["exp_avg"] + (1 - b1) * g
    u = np.maximum(b2 * state["exp_inf"], np.abs(g) + dtype(hyper["eps"]))
    return p - lr / (1 - b1 ** (count + 1)) * m / u, {"exp_avg": m, "exp_inf": u}


def _nadam(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    t = np.arange(1, count + 3).astype(dtype)
    mu = b1 * (1 - dtype(0.5) * dtype(0.96) ** (t * dtype(hyper["momentum_decay"])))
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    m_hat = mu[-1] * m / (1 - mu.prod()) + (1 - mu[-2]) * g / (1 - mu[:-1].prod())
    v_hat = v / (1 - b2 ** (count + 1))
    move = lr * m_hat / (np.sqrt(v_hat) + dtype(hyper["eps"]))
    return p - move, {"exp_avg": m, "exp_avg_sq": v}


def _radam(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    t = count + 1
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    m_hat = m / (1 - b1**t)
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    move = lr * m_hat
    if length > 5:
        above = (length - 4) * (length - 2) * longest
        below = (longest - 4) * (longest - 2) * length
        spread = (np.sqrt(v) + dtype(hyper["eps"])) / np.sqrt(1 - b2**t)
        move = move * np.sqrt(above / below) / spread
    return p - move, {"exp_avg": m, "exp_avg_sq": v}


def _asgd(hyper, count, lr, p, g, state, dtype):
    lambd, alpha, t0 = (dtype(hyper[name]) for name in ("lambd", "alpha", "t0"))
    eta = lr / (1 + lambd * lr * count) ** alpha
    mu = 1 / max(dtype(1), count - t0)
    p = p * (1 - lambd * eta) - eta * g
    return p, {"ax": state["ax"] + mu * (p - state["ax"])}


def _rprop(hyper, count, lr, p, g, state, dtype):
    (down, up), (least, most) = hyper["etas"], hyper["step_sizes"]
    along = np.sign(g) * np.sign(state["prev"])
    factor = np.where(along > 0, dtype(up), np.where(along < 0, dtype(down), dtype(1)))
    size = np.clip(state["step_size"] * factor, dtype(least), dtype(most))
    g = np.where(along < 0, 0, g)
    return p - np.sign(g) * size, {"prev": g, "step_size": size}


def _lion(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    move = lr * np.sign(b1 * state["exp_avg"] + (1 - b1) * g)
    return p - move, {"exp_avg": b2 * state["exp_avg"] + (1 - b2) * g}


def _yogi(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = state["exp_avg_sq"]
    v = v - (1 - b2) * np.sign(v - g * g) * g * g
    after = {"exp_avg": m, "exp_avg_sq": v}
    if hyper["bias_correction"]:
        m, v = m / (1 - b1 ** (count + 1)), v / (1 - b2 ** (count + 1))
    return p - lr * m / (np.sqrt(v) + dtype(hyper["eps"])), after


def _length(x):
    return np.sqrt((x * x).sum())


def _lamb(hyper, count, lr, p, g, state, dtype):
    b1, b2 = (dtype(beta) for beta in hyper["betas"])
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    after = {"exp_avg": m, "exp_avg_sq": v}
    if hyper["bias_correction"]:
        m, v = m / (1 - b1 ** (count + 1)), v / (1 - b2 ** (count + 1))
    r = m / (np.sqrt(v) + dtype(hyper["eps"])) + dtype(hyper["weight_decay"]) * p
    trust = _length(p) / _length(r) if _length(p) and _length(r) else 1
    return p - lr * trust * r, after


def _lars(hyper, count, lr, p, g, state, dtype):
    mu, wd = dtype(hyper["momentum"]), dtype(hyper["weight_decay"])
    trust = 1
    if _length(p) and _length(g):
        below = _length(g) + wd * _length(p) + dtype(hyper["eps"])
        trust = dtype(hyper["trust_coefficient"]) * _length(p) / below
    scaled = lr * trust * (g + wd * p)
    v = mu * state["momentum_buffer"] + scaled
    return p - (mu * v + scaled if hyper["nesterov"] else v), {"momentum_buffer": v}


def _adafactor(hyper, count, lr, p, g, state, dtype):
    least, scale = (dtype(eps) for eps in hyper["eps"])
    t = dtype(count + 1)
    beta = 1 - t ** dtype(hyper["beta2_decay"])
    if not p.size:
        return p, state
    if g.ndim < 2:
        v = beta * state["variance"] + (1 - beta) * g * g
        after = {"variance": v}
    else:
        rows = beta * state["row_var"] + (1 - beta) * (g * g).mean(-1, keepdims=True)
        cols = beta * state["col_var"] + (1 - beta) * (g * g).mean(-2, keepdims=True)
        v = rows * cols / np.maximum(rows.mean(-2, keepdims=True), least)
        after = {"row_var": rows, "col_var": cols}
    u = g / np.sqrt(np.maximum(v, least * least))
    u = u / np.maximum(1, np.sqrt((u * u).mean()) / dtype(hyper["d"]))
    before = hyper["before"]  # p without the decay
    alpha = max(scale, np.sqrt((before * before).mean())) * min(lr, 1 / np.sqrt(t))
    return p - alpha * u, after


def _muon(hyper, count, lr, p, g, state, dtype):
    mu = dtype(hyper["momentum"])
    buffer = mu * state["momentum_buffer"] + (1 - mu) * g
    x = mu * buffer + (1 - mu) * g if hyper["nesterov"] else buffer
    after = {"momentum_buffer": buffer}
    if not p.size:
        return p, after
    a, b, c = (dtype(one) for one in hyper["ns_coefficients"])
    x = x.T if p.shape[0] > p.shape[1] else x
    x = x / max(_length(x), dtype(hyper["eps"]))
    for _ in range(hyper["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if p.shape[0] > p.shape[1] else x
    rows, columns = p.shape
    ratio = np.sqrt(dtype(max(1, rows / columns)))
    if hyper["adjust_lr_fn"] == "match_rms_adamw":
        ratio = dtype(0.2) * np.sqrt(dtype(max(rows, columns)))
    return p - lr * ratio * x, after


_RULES = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adadelta": _adadelta,
    "adam": _adam,
    "adamw": _adam,
    "adamax": _adamax,
    "nadam": _nadam,
    "radam": _radam,
    "asgd": _asgd,
    "rprop": _rprop,
    "lion": _lion,
    "yogi": _yogi,
    "lamb": _lamb,
    "lars": _lars,
    "adafactor": _adafactor,
    "muon": _muon,
}
