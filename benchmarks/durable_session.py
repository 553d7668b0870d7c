"""What durability costs a trainer, over HTTP: none, snapshot and log side by side, and a recovery.

Adam, float32, over loopback through the client. Prints push_pull of each mode as a ratio to `none`
in the same run; the slowest step beside background snapshots as a ratio to the median step (the
aim is 3); and how fast a killed server has its sessions back.

``python -m benchmarks.durable_session --folder PATH`` on the disk that is meant.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from gradpost import Buffer, Session

MODES = ("none", "snapshot", "log")
SIZES = (1_000, 1_000_000, 10_000_000)
TURNS = {1_000: 400, 1_000_000: 100, 10_000_000: 48}
SLOTS = 16
INTERVAL_S = 2.0


class Server:
    """A server process over a data folder.

    Args:
        folder: The data folder.
    """

    def __init__(self, folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("GRADPOST_")}
        env |= {
            "GRADPOST_DATA_DIR": str(folder), "GRADPOST_PORT": "0", "GRADPOST_LOG_LEVEL": "error",
            "GRADPOST_SNAPSHOT_INTERVAL_S": str(INTERVAL_S),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"], env=env, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    def wait_ready(self) -> None:
        """Returns once kernels are loaded and sessions are back."""
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health/ready", timeout=60):
                    return
            except urllib.error.HTTPError:
                time.sleep(0.005)

    def end(self, number: int) -> None:
        """Sends a signal and waits for the end."""
        self.process.send_signal(number)
        self.process.wait()


def measure(server: Server, size: int) -> dict[str, Any]:
    """push_pull of all modes in turn, and the steps that the server counted."""
    params = {"w": np.zeros(size, np.float32)}
    grads = {"w": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    into = {mode: Buffer() for mode in MODES}
    sessions = {
        mode: Session.create(
            server.url, f"{mode}-{size}", params=params, rule="adam", durability=mode,
            log_slots=SLOTS,
        )
        for mode in MODES
    }  # fmt: skip
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn, mode in itertools.product(range(TURNS[size] + 4), MODES):
        session = sessions[mode]
        if not turn:
            session.pull()
        start = time.perf_counter()
        session.push_pull(grads, into=into[mode])
        if turn >= 4:
            seconds[mode].append(time.perf_counter() - start)
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    steps = {
        mode: [step["step_s"] for step in session.history(limit=TURNS[size])]
        for mode, session in sessions.items()
    }
    for session in sessions.values():
        session.close()
    return {
        "size": size,
        "push_pull_s": medians,
        "against_none": {mode: medians[mode] / medians["none"] for mode in MODES},
        "worst_step": {
            mode: max(values) / statistics.median(values) for mode, values in steps.items()
        },
    }


def recover(folder: Path, server: Server) -> dict[str, float]:
    """Kills a server and times the next one, less a start without a folder."""
    server.end(signal.SIGKILL)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    again = Server(folder)
    start = time.perf_counter()
    again.wait_ready()
    found = time.perf_counter() - start
    again.end(signal.SIGTERM)
    return {"folder_bytes": size, "to_ready_s": found}


def main() -> None:
    """Prints the table of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant", default=None)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), choices=SIZES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch, "data")
        server = Server(folder)
        server.wait_ready()
        rows = []
        for size in args.sizes:
            rows.append(measure(server, size))
            for mode in MODES:
                print(
                    f"{size:>11,} {mode:9} push_pull {rows[-1]['push_pull_s'][mode] * 1e3:9.2f} ms "
                    f"{rows[-1]['against_none'][mode]:6.2f} of none   worst step "
                    f"{rows[-1]['worst_step'][mode]:6.2f} of the median",
                    flush=True,
                )
        back = recover(folder, server)
        print(f"recovery: {back['folder_bytes'] / 1e6:,.0f} MB in {back['to_ready_s']:.2f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "recovery": back}, indent=1))


if __name__ == "__main__":
    main()
