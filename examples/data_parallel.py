"""Data-parallel training of a small torch model: N processes, one optimizer on a server.

Every process computes the gradient of its own part of each batch and steps a `RemoteOptimizer`; the
server takes one step of Adam on the mean of all N, so that all have the same model after it.

``python -m examples.data_parallel --workers 4`` (needs torch)
"""

import argparse

import numpy as np
import torch

from examples import digits, team
from gradpost.torch import RemoteOptimizer

STEPS = 400
BATCH = 64


def model(seed: int) -> torch.nn.Module:
    """Two hidden layers; the same for every process, though only the first one's counts."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )  # fmt: skip


def batch(data: digits.Digits, step: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The whole batch of a step, the same in every process."""
    return np.random.default_rng(step).integers(0, len(data.train_x), BATCH)


def worker(index: int, url: str, session: str, workers: int, steps: int) -> float:
    """One process; returns the accuracy in the end."""
    torch.set_num_threads(1)
    data, net = digits.load(0), model(0)
    update = {"mode": "sync", "workers": workers, "round_timeout_s": 60, "order": "worker"}
    optimizer = RemoteOptimizer(
        net, url, session, rule="adam", lr=3e-3, update=update, worker=f"w{index}"
    )
    for step in range(steps):
        own = batch(data, step)[index::workers]
        optimizer.zero_grad()
        logits = net(torch.from_numpy(data.train_x[own]))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.train_y[own]))
        loss.backward()
        optimizer.step()
    optimizer.close()
    return accuracy(net, data)


def accuracy(net: torch.nn.Module, data: digits.Digits) -> float:
    """Part of the images held out that is classified rightly."""
    with torch.no_grad():
        found = net(torch.from_numpy(data.test_x)).argmax(dim=1).numpy()
    return float((found == data.test_y).mean())


def train(workers: int, steps: int) -> list[float]:
    """The accuracy that each process reaches: they have one model."""
    with team.server() as url:
        return team.together(workers, worker, url, "parallel", workers, steps)


def main() -> None:
    """Trains and prints what is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    found = train(chosen.workers, chosen.steps)
    print(f"{chosen.workers} workers, {chosen.steps} steps: {found[0]:.4f}")


if __name__ == "__main__":
    main()
