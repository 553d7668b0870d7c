"""Bodies made by hand, with nothing of the code under test."""

import json
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from service.sessions.layout import Layout

NUMPY: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SHAPES = {"w": (2, 3), "scalar": (), "none": (0, 3), "b": (5,), "one": (1,), "deep": (2, 1, 2)}
LAYOUT = Layout.of([(name, "F32", shape) for name, shape in SHAPES.items()])


def values(dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """One array per tensor of LAYOUT."""
    rng = np.random.default_rng(seed)
    return {n: np.asarray(rng.standard_normal(s)).astype(NUMPY[dtype]) for n, s in SHAPES.items()}


def flat_of(tensors: dict[str, np.ndarray], layout: Layout = LAYOUT) -> np.ndarray:
    """The vector in layout order."""
    return np.concatenate([np.ravel(tensors[e.name]) for e in layout.entries])


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A body with any header."""
    return len(header).to_bytes(8, "little") + header + data


def body_of(
    tensors: dict[str, np.ndarray], dtype: str, metadata: dict[str, str] | None = None
) -> bytes:
    """A sound body, the tensors in the order of the dict."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return framed(json.dumps(header).encode(), data)


class Destination:
    """An `acquire` that remembers what it was asked for."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.layout = layout
        self.asked: list[str] = []
        self.bytes = np.empty(0, np.uint8)

    def __call__(self, dtype: str) -> np.ndarray:
        self.asked.append(dtype)
        self.bytes = np.full(self.layout.size * NUMPY[dtype].itemsize, 0xA5, np.uint8)
        return self.bytes

    def flat(self) -> np.ndarray:
        """What arrived."""
        return self.bytes.view(NUMPY[self.asked[-1]])


def feed(reader: Any, body: bytes, cuts: list[int] | None = None) -> Any:
    """Feeds a body, cut at the given places, and ends it."""
    edges = [0, *sorted(cuts or []), len(body)]
    for begin, end in pairwise(edges):
        reader.feed(body[begin:end])
    reader.finish()
    return reader
