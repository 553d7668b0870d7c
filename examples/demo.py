"""Five optimizers, in a server, train a digit classifier over HTTP (`make demo`).

Starts a server on a free port of this machine and five trainer processes. A trainer computes
gradients in NumPy, posts them, and gets the parameters back; the optimizer and its state are the
server's. Writes the training cost as a picture and the accuracy as a table.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from tqdm import tqdm

from examples import digits
from gradpost import Buffer, RetryPolicy, Session
from gradpost.errors import GradpostError

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
BATCH = 128
REPORT_EVERY = 20
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdaGrad": {"rule": "adagrad", "lr": 0.02},
    "RMSProp": {"rule": "rmsprop", "lr": 0.001, "alpha": 0.99},
    "SGDNesterov": {"rule": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "AdaDelta": {"rule": "adadelta", "lr": 1.0, "rho": 0.95},
    "Adam": {"rule": "adam", "lr": 0.001},
}
Report = tuple[str, int, float | None, float | None]
"""Optimizer, steps done, mean loss since the last report, and at the end the accuracy."""


def train(name: str, url: str, steps: int, reports: "Queue[Report]") -> None:
    """One remote trainer: gradients out, parameters in."""
    data = digits.load(SEED)
    dropout = digits.Dropout(SEED)
    batches = digits.batches(data, BATCH, SEED)
    into, losses = Buffer(), []
    with Session.create(url, f"digits-{name.lower()}", params=digits.init(SEED), worker=name,
                        optimizer=OPTIMIZERS[name]) as session:  # fmt: skip
        params = session.pull(into=into)
        for step in range(1, steps + 1):
            x, y = next(batches)
            loss, grads = digits.loss_and_grads(params, x, y, dropout)
            _, params = session.push_pull(grads, loss=loss, into=into)
            losses.append(loss)
            if step % REPORT_EVERY == 0 or step == steps:
                reports.put((name, step, float(np.mean(losses)), None))
                losses = []
        reports.put((name, steps, None, digits.accuracy(params, data.test_x, data.test_y)))


@contextmanager
def server() -> Iterator[str]:
    """A server on a free port; ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADPOST_PORT": str(port), "GRADPOST_LOG_LEVEL": "warning"}
    environment.pop("GRADPOST_API_KEY", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _await(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Returns when the server answers; raises if it ends or takes a minute."""
    from urllib.error import URLError
    from urllib.request import urlopen

    end = time.monotonic() + 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit("The server ended before it was ready; see its message above.")
        try:
            with urlopen(f"{url}/health/live", timeout=5):
                return
        except URLError:
            time.sleep(0.1)
    raise SystemExit("The server did not answer within a minute.")


def prepare(url: str) -> None:
    """Has the server compile the five rules, which a fresh machine does once."""
    patient = RetryPolicy(deadline_s=300, attempt_s=300)
    one = {"w": np.zeros(1, np.float32)}
    for name, optimizer in tqdm(OPTIMIZERS.items(), desc="preparing kernels", leave=False):
        with Session.create(
            url, f"warm-{name.lower()}", params=one, optimizer=optimizer, policy=patient
        ) as session:
            session.push(one)
            session.delete()


def run(url: str, steps: int) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """Trains all five at once; returns their costs by step, and their accuracies."""
    # Five trainers share the cores with the server: no BLAS may take them all. Children inherit it.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = get_context("spawn")
    reports: Queue[Report] = context.Queue()
    trainers = {
        name: context.Process(target=train, args=(name, url, steps, reports), name=name)
        for name in OPTIMIZERS
    }
    for trainer in trainers.values():
        trainer.start()
    costs: dict[str, list[tuple[int, float]]] = {name: [] for name in OPTIMIZERS}
    accuracies: dict[str, float] = {}
    try:
        with tqdm(total=steps * len(OPTIMIZERS), unit="step", desc="training") as bar:
            while len(accuracies) < len(OPTIMIZERS):
                _collect(reports, trainers, costs, accuracies, bar)
    finally:
        for trainer in trainers.values():
            if len(accuracies) < len(OPTIMIZERS):
                trainer.terminate()
            trainer.join(30)
    return costs, accuracies


def _collect(
    reports: "Queue[Report]",
    trainers: dict[str, Any],
    costs: dict[str, list[tuple[int, float]]],
    accuracies: dict[str, float],
    bar: Any,
) -> None:
    """Takes one report, or finds that a trainer has failed."""
    from queue import Empty

    try:
        name, step, loss, accuracy = reports.get(timeout=1)
    except Empty:
        failed = [name for name, trainer in trainers.items() if trainer.exitcode not in (None, 0)]
        if failed:
            raise SystemExit(f"The trainer {failed[0]} failed; see its message above.") from None
        return
    if accuracy is not None:
        accuracies[name] = accuracy
        return
    assert loss is not None
    before = costs[name][-1][0] if costs[name] else 0
    costs[name].append((step, loss))
    bar.update(step - before)
    bar.set_postfix_str(
        "  ".join(f"{key} {rows[-1][1]:.3f}" for key, rows in costs.items() if rows)
    )


def plot(costs: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The training cost of the five, on a log scale."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, rows in costs.items():
        axes.plot(*zip(*rows, strict=True), label=name, linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("step (minibatches of 128)")
    axes.set_ylabel("training cost")
    axes.set_title("Digits, two hidden layers, dropout: five optimizers over HTTP")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Runs the demo; 1 if Adam stays below 97 % on the part that was held out."""
    parser = argparse.ArgumentParser(description="Five optimizers train digits over HTTP.")
    parser.add_argument("--steps", type=int, default=1500, help="minibatches per optimizer")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo.png")
    options = parser.parse_args()
    try:
        with server() as url:
            prepare(url)
            begun = time.perf_counter()
            costs, accuracies = run(url, options.steps)
            seconds = time.perf_counter() - begun
    except GradpostError as error:
        print(f"The demo stopped: {error}", file=sys.stderr)
        return 1
    plot(costs, options.out)
    print(f"\n{'optimizer':<14}{'final cost':>12}{'held-out accuracy':>20}")
    for name in sorted(accuracies, key=accuracies.__getitem__, reverse=True):
        print(f"{name:<14}{costs[name][-1][1]:>12.4f}{accuracies[name]:>19.1%}")
    total = options.steps * len(OPTIMIZERS)
    print(f"\n{total} steps over HTTP in {seconds:.1f} s. The picture is in {options.out}.")
    if accuracies["Adam"] < 0.97:
        print("Adam stayed below 97 %.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
