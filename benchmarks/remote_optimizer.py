"""A step of `RemoteOptimizer` beside a plain `push_pull` of the same arrays, in one run.

Prints medians over HTTP on loopback, and ratios (the aim is 1.15). What a step adds is torch's own
wrapper, a look at each group and parameter, and one copy of the received parameters into the
model; that copy is measured alone as well. The calls alternate in random order. Needs torch.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.push_pull import await_port, free_port, process
from gradpost import Buffer, Session
from gradpost.torch import RemoteOptimizer

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "1 k parameters, 4 tensors": [(30, 20), (20,), (20, 18), (20,)],
    "10 M parameters, 8 tensors": [(1250, 1000)] * 8,
}


class Peers:
    """The calls that are compared, for one model."""

    def __init__(self, shapes: list[tuple[int, ...]], url: str) -> None:
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.optimizer = RemoteOptimizer(self.params, url, rule="adam")
        for param in self.params:
            param.grad = torch.randn(param.shape)
        named = list(enumerate(self.params))
        self.grads = {f"param.{at}": p.grad.numpy() for at, p in named if p.grad is not None}
        self.into = Buffer()
        self.session = Session.create(
            url, params={f"param.{at}": p.detach().numpy() for at, p in named},
            optimizer={"rule": "adam", "preset": "torch"},
        )  # fmt: skip
        self.received = self.session.pull(into=self.into)

    def push_pull(self) -> None:
        """Arrays there and back."""
        self.session.push_pull(self.grads, into=self.into)

    def step(self) -> None:
        """The same by way of torch."""
        self.optimizer.step()

    def copy(self) -> None:
        """What was received, into the model."""
        with torch.no_grad():
            for param, array in zip(self.params, self.received.values(), strict=True):
                np.copyto(param.numpy(), array)

    def close(self) -> None:
        """Ends both sessions."""
        for session in (self.session, self.optimizer.session):
            session.delete()
            session.close()


def measure(shapes: list[tuple[int, ...]], repeats: int, url: str) -> dict[str, float]:
    """Median seconds of each call, interleaved, and the median of step / push_pull in each turn."""
    peers = Peers(shapes, url)
    calls: dict[str, Callable[[], None]] = {
        "push_pull": peers.push_pull, "step": peers.step, "copy": peers.copy,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for turn in range(repeats + 5):
        for name in order.sample(list(calls), len(calls)):  # none always follows another
            begun = time.perf_counter()
            calls[name]()
            if turn >= 5:
                times[name].append(time.perf_counter() - begun)
    peers.close()
    found = {name: statistics.median(samples) for name, samples in times.items()}
    pairs = zip(times["step"], times["push_pull"], strict=True)
    found["ratio of pairs"] = statistics.median(step / plain for step, plain in pairs)
    found["ratio"] = found["step"] / found["push_pull"]
    return found


def main() -> None:
    """Runs both sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    repeats = [300, 11] if options.quick else [2000, 41]
    port = free_port()
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(),
                             "machine": platform.processor() or platform.machine()}  # fmt: skip
    environment = {"GRADPOST_PORT": str(port), "GRADPOST_LOG_LEVEL": "error"}
    with process("service", "serve", **environment):
        await_port(port)
        for (title, shapes), count in zip(SHAPES.items(), repeats, strict=True):
            medians = measure(shapes, count, f"http://127.0.0.1:{port}")
            found[title] = medians
            print(f"\n{title}, float32, Adam, {count} turns")
            for name in ("push_pull", "step", "copy"):
                print(f"  {name:<12}{1e3 * medians[name]:>10.3f} ms")
            print(f"  step / push_pull{medians['ratio']:>9.3f}"
                  f"   (median of pairs {medians['ratio of pairs']:.3f})")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
