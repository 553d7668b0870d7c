"""A push_pull through our client and server, beside its floors, interleaved in one run.

Prints medians and ratios: for 10 M float32 parameters against the faster of two echoes of the same
bytes plus the kernel (floor 1.5), for 1 k against an empty FastAPI POST (floor 2).
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import urllib3

from benchmarks.echoes import receive
from gradpost import Buffer, Session
from kernels import cpu
from kernels.pool import Pool
from kernels.registry import RULES
from service.hyper import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
HYPER = BY_NAME["adam"].model_validate({"rule": "adam"}).model_dump()
SLICE = 1 << 20


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[None]:
    """A Python module that runs during the block."""
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # the server logs each request
    )  # fmt: skip
    try:
        yield
    finally:
        child.terminate()
        child.wait(60)


def await_port(port: int) -> None:
    """Returns when somebody listens."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise SystemExit(f"nobody listens on {port}")


class Peers:
    """The calls that are compared, for one number of parameters."""

    def __init__(self, size: int, ports: dict[str, int]) -> None:
        rng = np.random.default_rng(0)
        self.grads = {"w": rng.standard_normal(size).astype(np.float32)}
        self.view = memoryview(bytearray(4 * size))
        self.link = socket.create_connection(("127.0.0.1", ports["tcp"]))
        self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http = urllib3.PoolManager()
        self.asgi = f"http://127.0.0.1:{ports['asgi']}"
        self.into = Buffer()
        self.session = Session.create(
            f"http://127.0.0.1:{ports['ours']}",
            params={"w": np.zeros(size, np.float32)},
            rule="adam",
        )
        self.pool = Pool(2)
        self.arrays = [np.zeros(size, np.float32) for _ in range(3)]
        self.loop = cpu.kernel("adam", "F32", "F32")
        self.h = np.array(RULES["adam"].coefficients(HYPER, 5, 1e-3, ()), np.float32)

    def raw_tcp(self) -> None:
        """The bytes over a blocking socket, there and back."""
        body = self.grads["w"].view(np.uint8).data
        self.link.sendall(len(body).to_bytes(8, "little"))
        self.link.sendall(body)
        receive(self.link, self.view)

    def uvicorn_echo(self) -> None:
        """The bytes over bare uvicorn, there and back, read into place."""
        body: Any = self.grads["w"].view(np.uint8).data
        answer = self.http.request(
            "POST", f"{self.asgi}/echo", body=[body], preload_content=False,
            headers={"Content-Length": str(len(body))},
        )  # fmt: skip
        done = 0
        while done < len(body):
            done += answer.readinto(self.view[done : done + SLICE])
        answer.release_conn()

    def empty_post(self) -> None:
        """A FastAPI POST that does nothing."""
        self.http.request("POST", f"{self.asgi}/empty")

    def kernel(self) -> None:
        """The update alone, in this process."""
        p, m, v = self.arrays

        def program() -> Any:
            yield [
                lambda lo=lo, hi=hi: self.loop(p, p, self.grads["w"], (m, v), self.h, lo, hi)
                for lo, hi in cpu.chunks(0, p.size)
            ]

        self.pool.run(program())

    def push_pull(self) -> None:
        """Ours."""
        self.session.push_pull(self.grads, into=self.into)

    def close(self) -> dict[str, float]:
        """Ends the session; says how long its steps took in the lane."""
        steps = self.session.history(limit=200)
        self.session.delete()
        self.session.close()
        self.link.close()
        self.pool.close()
        return {
            "step in the lane": statistics.median(s["step_s"] for s in steps),
            "wait for the lane": statistics.median(s["queued_s"] for s in steps),
        }


def measure(size: int, repeats: int, ports: dict[str, int]) -> dict[str, float]:
    """Median seconds of each call, interleaved."""
    peers = Peers(size, ports)
    calls: dict[str, Callable[[], None]] = {
        "raw TCP echo": peers.raw_tcp,
        "uvicorn echo": peers.uvicorn_echo,
        "empty FastAPI POST": peers.empty_post,
        "kernel": peers.kernel,
        "push_pull": peers.push_pull,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 3):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn >= 3:
                times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return medians | peers.close()


def report(size: int, medians: dict[str, float]) -> dict[str, float]:
    """Prints one size; returns its ratios."""
    echo = min(medians["raw TCP echo"], medians["uvicorn echo"])
    floor = echo + medians["kernel"]
    ratios = {
        "push_pull / (faster echo + kernel)": medians["push_pull"] / floor,
        "push_pull / empty POST": medians["push_pull"] / medians["empty FastAPI POST"],
    }
    print(f"\n{size:,} float32 parameters, Adam")
    for name, seconds in medians.items():
        print(
            f"  {name:<22}{1e3 * seconds:>10.3f} ms{seconds / medians['push_pull']:>8.2f} of ours"
        )
    for name, ratio in ratios.items():
        print(f"  {name:<38}{ratio:>6.2f}")
    return ratios


def main() -> None:
    """Runs all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    repeats = {1000: 2000, 1_000_000: 100, 10_000_000: 25}
    if options.quick:
        repeats = {1000: 500, 1_000_000: 40, 10_000_000: 11}
    ports = {name: free_port() for name in ("tcp", "asgi", "ours")}
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(),
                             "python": platform.python_version()}  # fmt: skip
    with (
        process("benchmarks.echoes", "tcp", str(ports["tcp"])),
        process("benchmarks.echoes", "asgi", str(ports["asgi"])),
        process("service", "serve", GRADPOST_PORT=str(ports["ours"]), GRADPOST_LOG_LEVEL="info"),
    ):
        for port in ports.values():
            await_port(port)
        for size, count in repeats.items():
            medians = measure(size, count, ports)
            found[str(size)] = {"seconds": medians, "ratios": report(size, medians)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
