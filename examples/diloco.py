"""DiLoCo: four workers take many steps of Adam each, and push what those changed now and then.

Every worker runs Adam on its own quarter of the digits; after each 25 local steps it pushes
end - start, and the server takes one step of sgd with Nesterov momentum on the mean of the four
(Douillard et al. 2023). Beside it one trainer that runs the inner optimizer on all of the data.

``python -m examples.diloco``
"""

import numpy as np

import gradpost
from examples import digits, team
from examples.digits import Digits, Params

WORKERS = 4
ROUNDS = 40
EVERY = 25
BATCH = 32
LR = np.float32(1e-3)


class Adam:
    """The inner optimizer, in NumPy: Kingma & Ba 2015, Algorithm 1."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._m = {name: np.zeros_like(value) for name, value in params.items()}
        self._v = {name: np.zeros_like(value) for name, value in params.items()}
        self._t = 0

    def step(self, grads: Params) -> None:
        """Updates the parameters in place."""
        self._t += 1
        for name, g in grads.items():
            m, v = self._m[name], self._v[name]
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.001) * (g * g - v)
            m_hat = m / np.float32(1 - 0.9**self._t)
            v_hat = v / np.float32(1 - 0.999**self._t)
            self._params[name] -= LR * m_hat / (np.sqrt(v_hat) + np.float32(1e-8))


def shard(data: Digits, index: int) -> Digits:
    """Every fourth image."""
    return data._replace(train_x=data.train_x[index::WORKERS], train_y=data.train_y[index::WORKERS])


def worker(index: int, url: str, session: str, rounds: int, seed: int) -> float:
    """One worker's training; returns the accuracy of the outer model in the end."""
    data, params = digits.load(0), digits.init(seed)
    inner = Adam(params)
    dropout = digits.Dropout(seed * WORKERS + index)
    batches = digits.batches(shard(data, index), BATCH, seed * WORKERS + index)
    local = gradpost.LocalSteps(
        url, params, session, every=EVERY, rule="sgd", lr=0.7, momentum=0.9, nesterov=True,
        update={"mode": "sync", "workers": WORKERS, "round_timeout_s": 60}, worker=f"w{index}",
    )  # fmt: skip
    with local:
        for _ in range(rounds * EVERY):
            _, grads = digits.loss_and_grads(params, *next(batches), dropout)
            inner.step(grads)
            local.step()
    return digits.accuracy(params, data.test_x, data.test_y)


def alone(rounds: int, seed: int) -> float:
    """One trainer: as many steps of the inner optimizer, on all of the data."""
    data, params = digits.load(0), digits.init(seed)
    inner, dropout = Adam(params), digits.Dropout(seed)
    batches = digits.batches(data, BATCH, seed)
    for _ in range(rounds * EVERY):
        _, grads = digits.loss_and_grads(params, *next(batches), dropout)
        inner.step(grads)
    return digits.accuracy(params, data.test_x, data.test_y)


def train(rounds: int, seed: int) -> tuple[float, float]:
    """The accuracies of the workers' model and of one trainer's."""
    with team.server() as url:
        found = team.together(WORKERS, worker, url, "diloco", rounds, seed)
    return found[0], alone(rounds, seed)


if __name__ == "__main__":
    team.compare(__doc__ or "", ROUNDS, train)
