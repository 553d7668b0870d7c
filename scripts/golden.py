"""Writes tests/golden/torch.npz: what torch makes of the same gradients, for tests without torch.

Run it in an environment that has torch 2.13 beside NumPy: ``python scripts/golden.py``. Everything
is float64 on one thread, torch's scalars too, so that only the formulas matter, not how a float32
loop rounds.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE, STEPS, SEED = 33, 12, 20260101
TARGET = Path(__file__).parents[1] / "tests" / "golden" / "torch.npz"

CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    ("sgd", "SGD", {"lr": 0.1}),
    ("sgd", "SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("sgd", "SGD", {"lr": 0.1, "momentum": 0.9}),
    ("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("sgd", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    ("adagrad", "Adagrad", {"lr": 0.1}),
    ("adagrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2}),
    ("adagrad", "Adagrad", {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1, "maximize": True}),
    ("rmsprop", "RMSprop", {"lr": 0.01}),
    ("rmsprop", "RMSprop", {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}),
    ("rmsprop", "RMSprop", {"lr": 0.01, "centered": True, "alpha": 0.9}),
    ("rmsprop", "RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "maximize": True}),
    ("adadelta", "Adadelta", {"lr": 1.0}),
    ("adadelta", "Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1, "maximize": True}),
    ("adam", "Adam", {"lr": 0.01}),
    ("adam", "Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    ("adam", "Adam", {"lr": 0.01, "betas": [0.5, 0.7], "eps": 0.01, "maximize": True}),
    ("adam", "Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("adamw", "AdamW", {"lr": 0.01}),
    ("adamw", "AdamW", {"lr": 0.01, "weight_decay": 0.5, "amsgrad": True, "maximize": True}),
    ("adamax", "Adamax", {"lr": 0.01}),
    ("adamax", "Adamax", {"lr": 0.01, "betas": [0.5, 0.7], "weight_decay": 0.1, "maximize": True}),
    ("nadam", "NAdam", {"lr": 0.01}),
    ("nadam", "NAdam", {"lr": 0.01, "momentum_decay": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("nadam", "NAdam", {"lr": 0.01, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    ("radam", "RAdam", {"lr": 0.01}),
    ("radam", "RAdam", {"lr": 0.01, "betas": [0.5, 0.9], "weight_decay": 0.1, "maximize": True}),
    ("radam", "RAdam", {"lr": 0.01, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    ("asgd", "ASGD", {"lr": 0.1}),
    ("asgd", "ASGD", {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 3.0, "weight_decay": 0.1}),
    ("asgd", "ASGD", {"lr": 0.1, "t0": 1.5, "maximize": True}),
    ("rprop", "Rprop", {"lr": 0.1}),
    ("rprop", "Rprop", {"lr": 0.1, "etas": [0.3, 1.7], "maximize": True}),
    ("rprop", "Rprop", {"lr": 0.1, "step_sizes": [0.09, 0.12]}),
]
STATE = (
    "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta",
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "ax", "prev", "step_size",
)  # fmt: skip
SCALARS = ("mu_product", "eta", "mu")


def _follow(name: str, options: dict[str, Any], start: Any, grads: Any) -> tuple[Any, Any]:
    p = torch.nn.Parameter(torch.tensor(start))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    optimizer = getattr(torch.optim, name)([p], foreach=False, **options)
    path = []
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return np.array(path), optimizer.state[p]


def main() -> None:
    """Runs every configuration and writes the file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(SEED)
    start = rng.standard_normal(SIZE)
    grads = rng.standard_normal((STEPS, SIZE)) * np.geomspace(1e-6, 1e3, SIZE)
    arrays: dict[str, Any] = {"start": start, "grads": grads}
    configs = []
    for index, (rule, name, options) in enumerate(CONFIGS):
        path, state = _follow(name, options, start, grads)
        kept = [key for key in STATE if torch.is_tensor(state.get(key))]
        arrays[f"{index}/params"] = path
        arrays.update({f"{index}/{key}": state[key].numpy() for key in kept})
        own = {**options, "eps_inside_sqrt": False} if rule == "rmsprop" else options
        scalars = {key: float(state[key]) for key in SCALARS if key in state}
        configs.append({"rule": rule, "options": own, "state": kept, "scalars": scalars})
    about = {"torch": torch.__version__.split("+")[0], "configs": configs}
    arrays["about"] = np.array(json.dumps(about))
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET.name}: {len(configs)} configurations, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
