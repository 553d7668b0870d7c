"""A server and some worker processes on this machine, for the examples of several trainers."""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Runs a server on a free port; gives its address once it is ready."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRADPOST_")}
    env |= {"GRADPOST_PORT": "0", "GRADPOST_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "service", "serve"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            while not _is_ready(url):
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=60):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False


def together(count: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """Runs work(index, *arguments) in so many processes at once; returns what each returns."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        futures = [pool.submit(work, index, *arguments) for index in range(count)]
        return [future.result() for future in futures]


def compare(about: str, rounds: int, train: Callable[[int, int], tuple[float, float]]) -> None:
    """Reads --rounds and --seed, trains, and prints both accuracies.

    Args:
        about: What `--help` says.
        rounds: Unless others are asked for.
        train: Given rounds and seed, the accuracy of those who share a model, and of one trainer.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    ours, single = train(chosen.rounds, chosen.seed)
    print(f"{chosen.rounds} rounds: {ours:.4f}   one trainer: {single:.4f}")
