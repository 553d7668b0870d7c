"""A push of N bytes costs one gradient: what feeds it allocates nothing of its size."""

import asyncio
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from service.sessions.layout import Layout
from service.wire import compact
from service.wire.body import receive
from service.wire.digest import digest
from service.wire.raw import raw_reader
from service.wire.safetensors import grads_reader, parts
from tests.wire.test_compact import Tensors, packed

ELEMENTS = 16 << 20  # 64 MiB as float32
CHUNK = bytes(256_000)  # as uvloop reads
LAYOUT = Layout.of([("a", "F32", (ELEMENTS // 4,)), ("b", "F32", (3, ELEMENTS // 4))])
FLAT = np.zeros(ELEMENTS, np.float32)


async def stream(head: bytes, length: int) -> AsyncIterator[bytes]:
    """A body of zeros behind a header, whose chunks cost nothing."""
    yield head
    left = length - len(head)
    while left:
        n = min(left, len(CHUNK))
        yield CHUNK if n == len(CHUNK) else CHUNK[:n]
        left -= n


def test_feeding_allocates_no_second_gradient() -> None:
    # b before a: the data does not come in the order of the layout.
    order = Layout.of([("b", "F32", (3, ELEMENTS // 4)), ("a", "F32", (ELEMENTS // 4,))])
    head = bytes(parts(order, FLAT, "F32", None, {})[0])
    length = len(head) + FLAT.nbytes
    destination = FLAT.view(np.uint8)
    tracemalloc.start()
    try:
        asyncio.run(
            receive(
                stream(head, length),
                length,
                grads_reader(LAYOUT, "F32", length, lambda dtype: destination),
            )
        )
        asyncio.run(
            receive(
                stream(b"", FLAT.nbytes),
                FLAT.nbytes,
                raw_reader(LAYOUT, "F32", "F32", FLAT.nbytes, lambda dtype: destination),
            )
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("master", ["F32", "F64"])
def test_a_digest_allocates_a_few_blocks(master: str) -> None:
    narrow = np.zeros(1 << 22, np.float16)
    tracemalloc.start()
    try:
        digest(narrow, "F16", master, b"")
        digest(narrow.view(np.uint16), "BF16", master, b"")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_an_answer_allocates_no_copy() -> None:
    tracemalloc.start()
    try:
        views = parts(LAYOUT, FLAT, "F32", None, {"version": "1-1"})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, views[1:])) == FLAT.nbytes
    assert peak < 1 << 20


def small_forms() -> dict[str, Tensors]:
    a, b = ELEMENTS // 4, 3 * ELEMENTS // 4
    none: Tensors = {"b#topk": ("I64", []), "b#values": ("F32", [])}
    rng = np.random.default_rng(0)
    many = rng.permutation(a)[: 1 << 20]
    return {
        "topk": none | {"a#topk": ("I64", many), "a#values": ("F32", np.ones(many.size))},
        "rows": none | {"a#idx": ("I64", many % 5000), "a#rows": ("F32", np.ones(many.size))},
        "int8": {
            "a#topk": ("I64", []), "a#values": ("F32", []),
            "b#q8": ("I8", np.ones(b, np.int8)), "b#scale": ("F32", np.ones(b // 256, np.float32)),
        },
    }  # fmt: skip


@pytest.mark.parametrize("form", ["topk", "rows", "int8"])
def test_a_small_form_allocates_what_it_reserves(form: str) -> None:
    body = packed(small_forms()[form])
    plans: list[compact.Plan] = []

    def keep(plan: compact.Plan) -> np.ndarray:
        plans.append(plan)
        return np.empty(plan.data_bytes, np.uint8)

    FLAT[:] = 0
    tracemalloc.start()
    try:
        reader = compact.push_reader(
            LAYOUT, "F32", len(body), lambda dtype: FLAT.view(np.uint8), keep
        )
        for at in range(0, len(body), len(CHUNK)):
            reader.feed(body[at : at + len(CHUNK)])
        reader.finish()
        assert reader.plan is plans[0]
        compact.check(plans[0], reader.data)
        compact.write(plans[0], reader.data, FLAT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        FLAT[:] = 0
    assert peak < plans[0].nbytes + (4 << 20)
    assert plans[0].nbytes < 4 * len(body)


PROGRAM = """
import numpy as np
from service.sessions.layout import Layout
from service.wire.safetensors import grads_reader, parts
from tests.wire.test_compact import Tensors, packed


def status(field):  # of this program alone; ru_maxrss would begin with its parent's peak
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


n = 48 << 20
layout = Layout.of([("w", "F32", (n // 4,))])
head = bytes(parts(layout, np.zeros(n // 4, np.float32), "F32", None, {})[0])
chunk = b"x" * 256_000
acquired = []
reader = grads_reader(layout, "F32", len(head) + n, lambda d: acquired.append(
    np.empty(n, np.uint8)) or acquired[0])
before = status("VmRSS")
reader.feed(head)
for _ in range(n // len(chunk)):
    reader.feed(chunk)
reader.feed(chunk[: n % len(chunk)])
reader.finish()
print((status("VmHWM") - before) * 1024 / n)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_a_push_costs_one_gradient_of_resident_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(done.stdout) < 1.15
