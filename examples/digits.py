"""A digit classifier in NumPy: two hidden layers, dropout, gradients by hand."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

F32 = NDArray[np.float32]
Params = dict[str, F32]


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], and labels; a quarter is held out."""

    train_x: F32
    train_y: NDArray[np.int64]
    test_x: F32
    test_y: NDArray[np.int64]


def load(seed: int) -> Digits:
    """scikit-learn's digits, split the same way for every seed."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16.0, y, test_size=0.25, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = split
    return Digits(train_x.astype(np.float32), train_y, test_x.astype(np.float32), test_y)


def init(seed: int, hidden: int = 128) -> Params:
    """He-initialised parameters of 64 -> hidden -> hidden -> 10."""
    rng = np.random.default_rng(seed)
    sizes = [64, hidden, hidden, 10]
    params: Params = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
        scale = np.sqrt(2.0 / fan_in)
        params[f"w{layer}"] = (rng.standard_normal((fan_in, fan_out)) * scale).astype(np.float32)
        params[f"b{layer}"] = np.zeros(fan_out, np.float32)
    return params


def batches(data: Digits, size: int, seed: int) -> Iterator[tuple[F32, NDArray[np.int64]]]:
    """Minibatches of the training part, shuffled anew in each pass, without end."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.train_x))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield data.train_x[chosen], data.train_y[chosen]


class Dropout:
    """Inverted dropout: 20 % of the inputs, 50 % of the hidden units (Kingma & Ba 2015, 6.2)."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def mask(self, shape: tuple[int, ...], drop: float) -> F32:
        """Zeros with probability `drop`, else 1 / (1 - drop)."""
        kept = self._rng.random(shape, np.float32) >= drop
        return kept.astype(np.float32) / np.float32(1.0 - drop)


def loss_and_grads(
    params: Params, x: F32, y: NDArray[np.int64], dropout: Dropout
) -> tuple[float, Params]:
    """Mean cross-entropy of one minibatch under dropout, and its gradient."""
    masks = [dropout.mask(x.shape, 0.2)]
    inputs = [x * masks[0]]
    for layer in (1, 2):
        active = np.maximum(inputs[-1] @ params[f"w{layer}"] + params[f"b{layer}"], 0)
        masks.append(dropout.mask(active.shape, 0.5))
        inputs.append(active * masks[-1])
    logp = _log_softmax(inputs[-1] @ params["w3"] + params["b3"])
    rows = np.arange(len(y))
    delta = np.exp(logp)
    delta[rows, y] -= 1
    delta /= len(y)
    grads: Params = {}
    for layer in (3, 2, 1):
        grads[f"w{layer}"] = inputs[layer - 1].T @ delta
        grads[f"b{layer}"] = delta.sum(axis=0)
        if layer > 1:
            delta = (delta @ params[f"w{layer}"].T) * masks[layer - 1] * (inputs[layer - 1] > 0)
    return float(-logp[rows, y].mean()), grads


def accuracy(params: Params, x: F32, y: NDArray[np.int64]) -> float:
    """Part of the images that is classified rightly, without dropout."""
    active = x
    for layer in (1, 2):
        active = np.maximum(active @ params[f"w{layer}"] + params[f"b{layer}"], 0)
    return float(((active @ params["w3"] + params["b3"]).argmax(axis=1) == y).mean())


def _log_softmax(logits: NDArray[Any]) -> F32:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: F32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
