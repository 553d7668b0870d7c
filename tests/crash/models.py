"""The sessions of the workload. A key alone says what its push holds, so nothing need be kept."""

import json
import math
import zlib
from typing import NamedTuple

import numpy as np

RAW, SAFE = "application/octet-stream; dtype={}", "application/vnd.safetensors"
SIZES = {"F64": 8, "F32": 4, "BF16": 2}


class Body(NamedTuple):
    content_type: str
    data: bytes


class Model(NamedTuple):
    """A session to be trained.

    Attributes:
        name: Its id.
        spec: What it is created with, beside durability.
        tensors: Name and shape of each, in the order of the flat vector.
        named: Pushes name their tensors, and some leave some out.
        ends: It is deleted and created anew all the time.
        weights: Of contributions, where there are rounds; each is the weight of as many keys. Few
            bits, so that a weight times a gradient is exact in float64.
    """

    name: str
    spec: dict
    tensors: tuple
    named: bool = False
    ends: bool = False
    weights: tuple = (1.0,)

    @property
    def dtype(self):
        return self.spec.get("dtype", "F32")

    @property
    def mode(self):
        return self.update.get("mode", "async")

    @property
    def update(self):
        return self.spec.get("update", {})

    @property
    def lr(self):
        return self.spec["optimizer"]["lr"]

    def upload(self, mark):
        """Parameters of the whole model; `mark` makes them different ones."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), mark])
        return safetensors(
            [(name, self.dtype, shape, numbers(rng, shape, self.dtype, 1.0))
             for name, shape in self.tensors]
        )  # fmt: skip

    def inline(self, mark):
        """The same as JSON members, for a creation in one call."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), mark])
        return {name: rng.normal(0.0, 1.0, shape).tolist() for name, shape in self.tensors}

    def weight(self, worker, sequence):
        """Of a key; 0: it is a pass."""
        return self.weights[zlib.crc32(f"{worker} {sequence}".encode()) % len(self.weights)]

    def push(self, worker, sequence):
        """The body of a key's push."""
        if self.weight(worker, sequence) == 0:
            return Body(None, b"")
        return self.body(self.gradient(worker, sequence))

    def body(self, parts):
        """Tensors, of which only those of a model that names them may lack some, as a body."""
        if self.named:
            return safetensors(parts)
        return Body(RAW.format(parts[0][1]), b"".join(data for *_, data in parts))

    def gradient(self, worker, sequence):
        """The gradient of a key: (name, dtype, shape, bytes) of each tensor."""
        seed = zlib.crc32(f"{self.name} {worker}".encode())
        rng = np.random.default_rng([seed, sequence])
        dtype = "BF16" if rng.random() < 0.1 else self.dtype
        if self.dtype == "F64" and rng.random() < 0.3:
            dtype = "F32"
        chosen = self.tensors
        if self.named and rng.random() < 0.3:
            keep = 1 + rng.integers(len(chosen) - 1)
            chosen = [chosen[at] for at in sorted(rng.permutation(len(chosen))[:keep])]
        return [(name, dtype, shape, numbers(rng, shape, dtype, 0.5)) for name, shape in chosen]


MODELS = (
    Model(
        "a",
        {"optimizer": {"rule": "adam", "lr": 0.01}, "clip": {"global_norm": 20.0}, "log_slots": 6},
        (("w", (50, 60)), ("b", (10,))),
    ),
    Model(
        "b",
        {
            "optimizer": {"rule": "nadam", "lr": 0.02},
            "groups": [
                {"name": "bias", "params": ["*.bias"], "rule": "sgd", "lr": 0.1, "momentum": 0.9}
            ],
            "missing": "skip",
            "ema": {"decay": 0.9},
            "log_slots": 6,
        },
        (("in", (8, 16)), ("out", (16, 3)), ("in.bias", (16,)), ("out.bias", (3,))),
        named=True,
    ),
    Model(
        "c",
        {"optimizer": {"rule": "rmsprop", "lr": 0.001}, "dtype": "F64", "log_slots": 4},
        (("w", (7,)), ("b", (3,))),
        ends=True,
    ),
)
SYNC = {"mode": "sync", "lease_s": 1.0}
ARRIVAL = Model(
    "arrival",
    {
        "optimizer": {"rule": "adam", "lr": 0.01}, "clip": {"global_norm": 9.0}, "log_slots": 16,
        "update": {**SYNC, "workers": 3, "min_contributions": 2, "round_timeout_s": 0.15},
    },
    (("w", (50, 20)), ("b", (10,))),
    weights=(0.0, 0.5, 1.0, 1.0, 2.0, 3.0, 1.0, 2.0),
)  # fmt: skip
"""Rounds that nobody's absence holds up: they shrink, and time out or are abandoned."""
WORKER = Model(
    "worker",
    {
        "optimizer": {"rule": "sgd", "lr": 0.1, "momentum": 0.9}, "missing": "skip",
        "log_slots": 16,
        "update": {**SYNC, "workers": 3, "quorum": 2, "round_timeout_s": 0.2, "order": "worker",
                   "max_norm": 8.3},
    },
    (("in", (8, 16)), ("out", (16, 3)), ("in.bias", (16,)), ("out.bias", (3,))),
    named=True,
    weights=(1.0, 0.5, 2.0),
)  # fmt: skip
"""Rounds that two of three workers close: the third is late."""
MEDIAN = Model(
    "median",
    {
        "optimizer": {"rule": "rmsprop", "lr": 0.001}, "dtype": "F64", "log_slots": 12,
        "update": {**SYNC, "workers": 2, "min_contributions": 2, "round_timeout_s": 0.1,
                   "reduce": "median", "on_lost": "wait"},
    },
    (("w", (7,)), ("b", (3,))),
    weights=(0.0, 1.0),
)  # fmt: skip
"""Half of the contributions are passes, and so some rounds are skipped."""
BOUNDED = Model(
    "bounded",
    {
        "optimizer": {"rule": "adam", "lr": 0.01}, "log_slots": 6,
        "update": {"mode": "bounded", "slack": 1, "lease_s": 1.0},
    },
    (("w", (40, 30)), ("b", (10,))),
)  # fmt: skip
IN_ROUNDS = (ARRIVAL, WORKER, MEDIAN, BOUNDED)


def numbers(rng, shape, dtype, scale):
    """Normal numbers as bytes of a dtype."""
    found = rng.normal(0.0, scale, math.prod(shape))
    if dtype == "F64":
        return found.tobytes()
    if dtype == "F32":
        return found.astype(np.float32).tobytes()
    return (found.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def safetensors(parts):
    """A safetensors body of (name, dtype, shape, bytes)."""
    header, at = {}, 0
    for name, dtype, shape, data in parts:
        header[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)],
        }  # fmt: skip
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return Body(SAFE, b"".join([len(text).to_bytes(8, "little"), text, *(p[3] for p in parts)]))


def tensors_of(body):
    """The tensors of a safetensors body and its metadata: {name: (dtype, shape, bytes)}, {}."""
    begin = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(body[8:begin])
    facts = header.pop("__metadata__", {})
    return {
        name: (one["dtype"], tuple(one["shape"]), body[begin:][slice(*one["data_offsets"])])
        for name, one in header.items()
    }, facts
