"""A durable push at the storage alone, beside what the disk allows, interleaved in one run.

Prints medians and ratios: sealing and committing one record against a bare write of the same bytes
into preallocated blocks and one fdatasync (aim 1.25 from 4 MB); then group commits of 8 threads at
4 kB against one thread.

Run it on the disk that is meant: `python -m benchmarks.durable_push --folder PATH`.
"""

import argparse
import json
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from service.storage.header import Key, Kind, Shape
from service.storage.journal import Journal
from service.storage.ring import Slot
from service.storage.store import Store

SIZES = (4_000, 400_000, 4_000_000, 40_000_000)
PAGE = 4096
LAP = 4
"""Slots of each file, so laps are short: the first one also initialises the blocks."""
THREADS = 8
FLUSH_S = 0.1


class Floor:
    """A preallocated file that is written and synced, and nothing else."""

    def __init__(self, path: Path, size: int) -> None:
        self._stride = -(-size // PAGE) * PAGE
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(self._fd, 0, LAP * self._stride)
        os.fsync(self._fd)
        self._turn = 0

    def write(self, data: bytes) -> None:
        """One durable write."""
        os.pwrite(self._fd, data, self._turn % LAP * self._stride)
        os.fdatasync(self._fd)
        self._turn += 1

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def session(store: Store, slots: int, size: int) -> Journal:
    """A session whose ring takes payloads of this size."""
    return store.create(
        f"{slots}-{size}", uuid=uuid.uuid4(), epoch=1, spec="{}", kernel_rev="", chunks=[b""],
        reserved=0, shape=Shape(slots, size, 1),
    )  # fmt: skip


def sealed(journal: Journal, data: bytes, sequence: int) -> Slot:
    """A push in its place, not yet committed."""
    slot = journal.reserve(payload=True)
    assert slot is not None
    slot.seal(Kind.PUSH, key=Key("w0", sequence), digest=bytes(16), meta=bytes(64), payload=data)
    return slot


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(store: Store, folder: Path, size: int, turns: int) -> dict[str, float]:
    """Median seconds of the floor and of a durable push, turn by turn."""
    data = os.urandom(size)
    floor, journal = Floor(folder / f"floor-{size}", size), session(store, LAP, size)
    times: dict[str, list[float]] = {"floor": [], "push": []}

    def push(turn: int) -> None:
        journal.commit([sealed(journal, data, turn)])

    for turn in range(LAP + turns):
        floor_s = timed(lambda: floor.write(data))
        push_s = timed(lambda turn=turn: push(turn))  # type: ignore[misc]
        if turn >= LAP:
            times["floor"].append(floor_s)
            times["push"].append(push_s)
        assert journal.ring is not None
        journal.ring.free_through(journal.last)  # as a snapshot would
        if turn % 10 == 0:
            store.flush()
    floor.close()
    journal.delete(1)
    return {name: statistics.median(values) for name, values in times.items()}


class Group:
    """Commits whatever waits, together, in one thread: the part of a session's lane."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: queue.SimpleQueue[tuple[Slot, threading.Lock] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def commit(self, slot: Slot) -> None:
        """Returns when the record is durable."""
        done = threading.Lock()
        done.acquire()
        self._waiting.put((slot, done))
        done.acquire()

    def close(self) -> None:
        """Ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            group = [first]
            while not self._waiting.empty() and (one := self._waiting.get()) is not None:
                group.append(one)
            headers = self._journal.commit([slot for slot, _ in group])
            assert self._journal.ring is not None
            self._journal.ring.free_through(headers[-1].number)
            for _, done in group:
                done.release()


def rate(store: Store, threads: int, size: int, seconds: float) -> tuple[float, float]:
    """Durable pushes per second of some threads together, and the 99th percentile in seconds."""
    journal, data = session(store, 4 * threads, size), os.urandom(size)
    group, times, end = Group(journal), [], time.perf_counter() + seconds

    def work(first: int) -> None:
        sequence = first
        while (start := time.perf_counter()) < end:
            group.commit(sealed(journal, data, sequence))
            times.append(time.perf_counter() - start)
            sequence += threads

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(FLUSH_S)
        store.flush()
    group.close()
    journal.delete(1)
    return len(times) / seconds, sorted(times)[int(0.99 * len(times))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as the server does
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, store = Path(name), Store(Path(name, "data"))
        store.recover()
        for size in SIZES:
            turns = 5 if options.quick else max(20, min(200, 400_000_000 // size))
            found = compare(store, folder, size, turns)
            ratio = found["push"] / found["floor"]
            figures[f"{size}"] = {**found, "ratio": ratio}
            print(
                f"{size:>10} B  floor {found['floor'] * 1e3:8.2f} ms  "
                f"push {found['push'] * 1e3:8.2f} ms  ratio {ratio:.2f}",
                flush=True,
            )
        alone, _ = rate(store, 1, SIZES[0], 1 if options.quick else 5)
        together, p99 = rate(store, THREADS, SIZES[0], 1 if options.quick else 5)
        figures["group"] = {"alone": alone, "together": together, "p99": p99}
        print(
            f"{SIZES[0]} B, durable pushes/s: 1 thread {alone:.0f}, {THREADS} threads "
            f"{together:.0f} (p99 {p99 * 1e3:.1f} ms), ratio {together / alone:.2f}"
        )
        store.close()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
