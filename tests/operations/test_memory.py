"""A push of N bytes costs the server one gradient of memory: read from its peak RSS."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from gradpost import Buffer, Session
from tests.operations.test_process import server

SIZE = 10_000_000
NBYTES = 4 * SIZE


def memory(pid, field):
    """VmRSS or VmHWM (the peak) of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.M)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux' /proc")
def test_a_push_costs_one_gradient():
    rng = np.random.default_rng(3)
    params = {"a": np.zeros(SIZE // 2, np.float32), "b": np.zeros(SIZE // 2, np.float32)}
    # In another order than the layout's, so that nothing can be taken as it comes.
    grads = {name: rng.standard_normal(SIZE // 2).astype(np.float32) for name in ("b", "a")}
    with server("--port", "0", GRADPOST_LOG_LEVEL="error") as (process, line):
        url, pid = line.rpartition(" ")[2], process.pid
        with Session.create(url, params=params, rule="adam") as session:
            warm = Session.create(url, params={"w": np.zeros(1)}, rule="adam")
            warm.push({"w": np.ones(1)})
            warm.delete()
            warm.close()
            before = memory(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the peak so far
            into = Buffer()
            for _ in range(3):
                session.push_pull(grads, into=into)
            peak = memory(pid, "VmHWM")
            # One gradient; the state was allocated at creation. 10 % for chunks on their way.
            assert peak - before < 1.1 * NBYTES
            assert peak - before > 0.9 * NBYTES
