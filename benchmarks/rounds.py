"""Rounds per second for some workers, and what pushes cost that wait for their round.

One driver with a socket for each worker: every worker pushes with `Prefer: wait` and gets the
summary when its round is over. Beside it, in the same run, one worker in `async`: a round of N
is at best N of its pushes. Then a thousand pushes wait for a round that stays open: resident memory
of the server for each of them, and the latency of another session's pushes with and without them.

``python -m benchmarks.rounds [--json FILE]``
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKERS = (1, 2, 4, 8, 16)
SIZES = (1_000, 1_000_000)
ROUNDS = {1_000: 200, 1_000_000: 20}
WAITING = 1000
PUSHES = 1500
"""Fewer have no p99 worth the name: of 300 it was 0.3 to 2.6 times that of before."""
OCTET = "application/octet-stream; dtype=F32"


class Connection:
    """A keep-alive connection that sends one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Sends a request; its answer is read by `receive`."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        self._writer.write(body)
        await self._writer.drain()

    async def receive(self) -> dict[str, Any]:
        """The JSON of the answer, with its status."""
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length:")[2].partition("\r\n")[0]
        body = await self._reader.readexactly(int(length or 0))
        return {**(json.loads(body) if body else {}), "status": int(head.split()[1])}

    async def call(self, method: str, path: str, body: bytes, **headers: str) -> dict[str, Any]:
        """A request and its answer."""
        await self.send(method, path, body, headers)
        return await self.receive()


class Server:
    """A server process."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("GRADPOST_")}
        env |= {
            "GRADPOST_PORT": "0", "GRADPOST_LOG_LEVEL": "error", "GRADPOST_MAX_CONNECTIONS": "5000",
            "GRADPOST_MAX_WORKERS": "5000", "GRADPOST_MAX_UPLOADS": "5000",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"], env=env, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().split()[-1]
        self.port = int(url.rsplit(":", 1)[1])
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health/ready", timeout=60):
                    return
            except urllib.error.HTTPError:
                time.sleep(0.01)

    def resident(self) -> int:
        """Bytes of memory that the process has in use."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> None:
        """Stops it."""
        self.process.terminate()
        self.process.wait()


async def make(port: int, name: str, size: int, update: Mapping[str, Any]) -> None:
    """Creates a session of Adam with zeros."""
    call = Connection(port).call
    spec = {"optimizer": {"rule": "adam"}, "update": update}
    path = f"/v1/sessions/{name}"
    done = await call(
        "PUT", path, json.dumps(spec).encode(), **{"content-type": "application/json"}
    )
    assert done["status"] == 201, done
    header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}})
    body = len(header).to_bytes(8, "little") + header.encode() + bytes(4 * size)
    kind = {"content-type": "application/vnd.safetensors"}
    done = await call("PUT", f"{path}/params", body, **kind)
    assert done["status"] == 200, done


async def rounds(server: Server, size: int, workers: int) -> dict[str, float]:
    """Rounds per second, beside pushes per second of one worker in async."""
    name, plain = f"sync-{size}-{workers}", f"async-{size}-{workers}"
    update = {"mode": "sync", "workers": workers, "round_timeout_s": 60}
    await make(server.port, name, size, update)
    await make(server.port, plain, size, {})
    connections = [Connection(server.port) for _ in range(workers)]
    single = Connection(server.port)
    body = bytes(4 * size)
    headers = {"content-type": OCTET, "prefer": "wait=30"}
    taken: dict[str, list[float]] = {name: [], plain: []}

    async def one(worker: int, step: int) -> None:
        query = f"worker=w{worker}&sequence={step}&base_version=1-{step}"
        path = f"/v1/sessions/{name}/steps?{query}"
        done = await connections[worker].call("POST", path, body, **headers)
        assert (done["status"], done["version"]) == (200, step + 1), done

    for step in range(1, ROUNDS[size] + 5):
        begun = time.perf_counter()
        await asyncio.gather(*[one(worker, step) for worker in range(workers)])
        middle = time.perf_counter()
        query = f"worker=w&sequence={step}&base_version=1-{step}"
        await single.call("POST", f"/v1/sessions/{plain}/steps?{query}", body, **headers)
        if step > 4:
            taken[name].append(middle - begun)
            taken[plain].append(time.perf_counter() - middle)
    for session in (name, plain):
        await single.call("DELETE", f"/v1/sessions/{session}", b"")
    round_s, push_s = (statistics.median(taken[one]) for one in (name, plain))
    return {
        "size": size,
        "workers": workers,
        "rounds_per_s": 1 / round_s,
        "round_over_pushes": round_s / (workers * push_s),
        "async_push_s": push_s,
    }


async def latencies(server: Server, name: str, first: int) -> list[float]:
    """Seconds of pushes to a small session, one after another."""
    connection, body, found = Connection(server.port), bytes(4000), []
    for sequence in range(first, first + PUSHES):
        query = f"worker=w&sequence={sequence}&base_version=1-1"
        begun = time.perf_counter()
        done = await connection.call(
            "POST", f"/v1/sessions/{name}/steps?{query}", body, **{"content-type": OCTET}
        )
        assert done["status"] == 200, done
        found.append(time.perf_counter() - begun)
    return found


def p99(values: list[float]) -> float:
    """The 99th of a hundred."""
    return sorted(values)[int(0.99 * len(values))]


async def waiting(server: Server) -> dict[str, float]:
    """What pushes cost that wait: memory for each, and the latency of others."""
    update = {"mode": "sync", "workers": WAITING + 1, "round_timeout_s": 600}
    await make(server.port, "waiting", 1000, update)
    await make(server.port, "other", 1000, {})
    await latencies(server, "other", 1)
    alone = await latencies(server, "other", 1 + PUSHES)
    connections = [Connection(server.port) for _ in range(WAITING)]
    body, idle = bytes(4000), server.resident()
    for at, connection in enumerate(connections):  # what a connection itself costs comes before
        await connection.call("GET", f"/v1/sessions/waiting/workers/x{at}", b"")
    connected = server.resident()
    headers = {"content-type": OCTET, "prefer": "wait=60"}
    for at, connection in enumerate(connections):
        query = f"worker=w{at}&sequence=1&base_version=1-1"
        await connection.send("POST", f"/v1/sessions/waiting/steps?{query}", body, headers)
    while True:
        path = "/v1/sessions/waiting/rounds/1"
        found = await Connection(server.port).call("GET", path, b"")
        if found["contributions"] == WAITING:
            break
        await asyncio.sleep(0.1)
    held = server.resident()
    crowded = await latencies(server, "other", 1 + 2 * PUSHES)
    again = Connection(server.port)
    query = "worker=last&sequence=1&base_version=1-1"
    begun = time.perf_counter()
    path = f"/v1/sessions/waiting/steps?{query}"
    await again.call("POST", path, body, **{"content-type": OCTET})
    for connection in connections:
        done = await connection.receive()
        assert done["applied"], done
    return {
        "waiting": WAITING,
        "bytes_per_connection": (connected - idle) / WAITING,
        "bytes_per_waiting_push": (held - connected) / WAITING,
        "p99_alone_s": p99(alone),
        "p99_ratio": p99(crowded) / p99(alone),
        "median_ratio": statistics.median(crowded) / statistics.median(alone),
        "all_answered_s": time.perf_counter() - begun,
    }


def main() -> None:
    """Prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    server = Server()
    found: dict[str, Any] = {"rounds": []}
    try:
        for size in SIZES:
            for workers in WORKERS:
                row = asyncio.run(rounds(server, size, workers))
                found["rounds"].append(row)
                print(
                    f"{size:>9} params {workers:>3} workers {row['rounds_per_s']:9.1f} rounds/s   "
                    f"round / (workers x async push) {row['round_over_pushes']:.2f}",
                    flush=True,
                )
        found["waiting"] = asyncio.run(waiting(server))
        for name, value in found["waiting"].items():
            print(f"{name:24} {value:.4g}")
    finally:
        server.end()
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
