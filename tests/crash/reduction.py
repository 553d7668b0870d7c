"""What a round makes of its contributions, in NumPy: no line of it is the server's.

A weight has few bits, so a weight times a gradient is exact in float64, and one addition of it
rounds as the server's fused multiply-add does.
"""

import math

import numpy as np

NUMPY = {"F64": np.float64, "F32": np.float32}


def reduced(model, members):
    """The gradient of a round, as a body for a session that applies each push on its own.

    Args:
        model: Of the session.
        members: (worker, sequence, weight), in the order in which they came.
    """
    rules = model.update
    if rules.get("order") == "worker":
        members = sorted(members)
    counted = [(model.gradient(*key), weight) for *key, weight in members if weight]
    grads = [({name: widened(dtype, data) for name, dtype, _, data in parts}, weight)
             for parts, weight in counted]  # fmt: skip
    parts = []
    for name, shape in model.tensors:
        if any(name in grad for grad, _ in grads):
            came = [(grad.get(name, np.zeros(math.prod(shape))), weight) for grad, weight in grads]
            whole = median(came) if rules.get("reduce") == "median" else mean(came)
            data = whole.astype(NUMPY[model.dtype]).tobytes()
            parts.append((name, model.dtype, shape, data))
    return model.body(parts)


def mean(came):
    total, weights = np.zeros_like(came[0][0]), 0.0
    for grad, weight in came:
        total += weight * grad
        weights += weight
    return total / weights


def median(came):
    rows = np.sort(np.stack([grad for grad, _ in came]), axis=0)
    middle = len(rows) // 2
    found = rows[middle] if len(rows) % 2 else (rows[middle - 1] + rows[middle]) / 2.0
    return found + 0.0


def widened(dtype, data):
    """Numbers of a body in float64."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(
            np.float64
        )  # fmt: skip
    return np.frombuffer(data, NUMPY[dtype]).astype(np.float64)
