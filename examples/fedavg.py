"""FedAvg: four sites train on their own digits, and push what their local steps changed.

Each site has a quarter of the data and keeps it. After ten passes of local steps it pushes
end - start, weighted by how many images it has; the server takes the weighted mean as one step of
sgd with lr 1 (McMahan et al. 2017). Beside it one trainer that has all the data.

``python -m examples.fedavg``
"""

import numpy as np

import gradpost
from examples import digits, team
from examples.digits import Digits, Params

SITES = 4
ROUNDS = 12
PASSES = 4
BATCH = 16
LR = 0.1


def shard(data: Digits, index: int, count: int) -> Digits:
    """One site's part: unequal ones, as sites have them."""
    edges = np.cumsum([0, *np.arange(1, count + 1)]) * len(data.train_x) // sum(range(1, count + 1))
    own = slice(edges[index], edges[index + 1])
    return data._replace(train_x=data.train_x[own], train_y=data.train_y[own])


def local_steps(params: Params, data: Digits, steps: int, seed: int) -> None:
    """Plain sgd, in place."""
    dropout, batches = digits.Dropout(seed), digits.batches(data, BATCH, seed)
    for _ in range(steps):
        _, grads = digits.loss_and_grads(params, *next(batches), dropout)
        for name, grad in grads.items():
            params[name] -= np.float32(LR) * grad


def site(index: int, url: str, session: str, rounds: int, seed: int) -> float:
    """One site's training; returns the accuracy of the model that all share in the end."""
    data = digits.load(0)
    own = shard(data, index, SITES)
    params = digits.init(seed)
    local = gradpost.LocalSteps(
        url, params, session, every=1, weight=len(own.train_x), rule="sgd", lr=1.0,
        update={"mode": "sync", "workers": SITES, "round_timeout_s": 60}, worker=f"site{index}",
    )  # fmt: skip
    with local:
        for turn in range(rounds):
            steps = PASSES * len(own.train_x) // BATCH
            local_steps(params, own, steps, seed * 1000 + turn * SITES + index)
            local.step()
    return digits.accuracy(params, data.test_x, data.test_y)


def alone(rounds: int, seed: int) -> float:
    """One trainer that has all of the data, for as many passes over it."""
    data, params = digits.load(0), digits.init(seed)
    local_steps(params, data, rounds * PASSES * len(data.train_x) // BATCH, seed)
    return digits.accuracy(params, data.test_x, data.test_y)


def train(rounds: int, seed: int) -> tuple[float, float]:
    """The accuracies of the sites' model and of one trainer's."""
    with team.server() as url:
        found = team.together(SITES, site, url, "fedavg", rounds, seed)
    return found[0], alone(rounds, seed)


if __name__ == "__main__":
    team.compare(__doc__ or "", ROUNDS, train)
