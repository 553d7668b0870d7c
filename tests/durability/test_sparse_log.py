"""Pushes of rows in the log: as long as what came, and to the bit what they were."""

import json
import math

import numpy as np
import pytest

from gradpost.protocol.dtypes import NUMPY
from service.errors import Nonfinite
from service.schemas import apply_patch, parse_control
from service.sessions.pushes import Gradient
from service.sessions.records import Push, pack_push, unpack_push
from service.sessions.update import Part
from service.storage.header import Header
from service.wire.fit import presence
from service.wire.rows import Rows
from tests.durability.conftest import Server
from tests.storage.counter import Scratch

SHAPES = {
    "a": (3, 2),
    "emb": (200, 7),
    "c": (5,),
    "flat": (301,),
    "deep": (4, 2, 2),
    "none": (3, 0),
}
TABLES = ("emb", "flat", "deep", "none")
OPTIONS = {
    "plain": {},
    "groups": {
        "groups": [{"params": ["emb", "c"], "name": "g", "lr": 0.03, "clip": {"value": 0.5}},
                   {"params": ["deep"], "name": "still", "frozen": True}],
        "missing": "skip", "norms": True,
    },
    "clipped": {"clip": {"global_norm": 1.0}, "ema": {"decay": 0.9}, "missing": "skip"},
    "double": {"dtype": "F64", "on_nonfinite": "skip"},
}  # fmt: skip
CASES = [(rule, options) for rule in ("sgd", "adagrad", "adam") for options in OPTIONS]


@pytest.fixture
def start():
    made = []
    with Scratch() as path:

        def begin(**changes):
            made.append(Server(path / "data", **changes))
            return made[-1]

        yield begin
        for server in made:
            server.close()


def make(server, rule="adam", name="m", durability="log", slots=5, **fields):
    params = {
        n: np.random.default_rng(k).standard_normal(s).tolist()
        for k, (n, s) in enumerate(SHAPES.items())
    }
    optimizer = {"rule": rule, "lr": 0.1, "lazy": True}
    fields = {"optimizer": optimizer, "durability": durability, **fields}
    if durability == "log":
        fields["log_slots"] = slots
    return server.make(name, params, **fields)


def gradient(session, rng, *, few=None, only=None, bad=False, **control):
    """Of some tensors rows, of the rest all; garbage where nobody may look."""
    layout, kind = session.arena.layout, NUMPY[session.spec.dtype]
    flat, found = np.full(layout.size, np.nan, kind), []
    came = only or list(SHAPES)
    for at, entry in enumerate(layout.entries):
        if entry.name not in came:
            continue
        if entry.name in TABLES and rng.random() < 0.9:
            count, width = entry.shape[0], math.prod(entry.shape[1:])
            taken = few or rng.integers(0, count + 1)
            idx = np.sort(rng.choice(count, min(taken, count), replace=False)).astype(np.int64)
            found.append(Rows(at, width, idx, rng.standard_normal(idx.size * width).astype(kind)))
            if bad and found[-1].values.size:
                found[-1].values[-1] = np.inf
        else:
            flat[entry.offset : entry.offset + entry.size] = rng.standard_normal(entry.size)
    present = presence(layout, dict.fromkeys(came))
    if not found:
        flat[np.isnan(flat)] = 0
    read = parse_control(control, text=False)
    return Gradient(flat, session.spec.dtype, read, lambda: None, present, tuple(found))


def push(server, sent, name="m"):
    session = server.app.state.sessions.get(name)
    return server.on_loop(session.push(sent, hold=False))


def push_some(server, first, count, name="m"):
    """The same pushes whoever gets them, by their numbers."""
    session = server.app.state.sessions.get(name)
    for sequence in range(first, first + count):
        rng = np.random.default_rng(sequence)
        control = {"worker": "v", "sequence": sequence, "base_version": f"{session.epoch}-1"}
        if sequence % 4 == 0:
            control["overrides"] = {"default": {"lr": 0.01 * sequence}}
        if sequence % 5 == 0:
            control |= {"grad_scale": 8.0, "loss": 0.5}
        only = None
        if session.spec.missing == "skip" and sequence % 3 == 0:
            only = ["emb", "a"]
        assert push(server, gradient(session, rng, only=only, **control), name).summary.applied


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_log_of_rows_comes_back_to_the_bit(start, rule, options):
    server = start()
    fields = OPTIONS[options]
    make(server, rule, **fields)
    make(server, rule, "whole", "none", **fields)
    push_some(server, 1, 7)  # more than the ring holds: behind a snapshot there are some
    again = server.crashed()
    try:
        assert again.call("GET", "/health/ready").json.get("damaged") is None
        assert again.state_of() == server.state_of()
        push_some(again, 8, 5)
        push_some(server, 1, 12, "whole")
        third = again.crashed()
        ours, theirs = third.state_of(), server.state_of("whole")
        third.close()
        for what in ("params", "state", "average", "runs", "at", "ledger"):
            assert ours[what] == theirs[what], what
    finally:
        again.close()


def test_rows_of_frozen_tensors_are_in_no_record(start):
    server = start()
    session = make(server, slots=40, **OPTIONS["groups"])
    for only in (["deep", "a"], ["deep", "emb"], ["deep"], ["emb", "none"]):
        sent = gradient(session, np.random.default_rng(1), few=2, only=only)
        assert sent.rows
        push(server, sent)
    # of the last one only the empty tensor came as rows: that is a dense push
    assert lengths(session) == [6 * 4, 2 * 4 + 2 * 28, 0, 4 * session.arena.size]
    again = server.crashed()
    assert again.state_of() == server.state_of()
    again.close()


def lengths(session):
    """Bytes of payload of each record, in order."""
    ring = session.durable.journal.ring
    found = [header for _, header in ring.headers() if isinstance(header, Header)]
    return [h.length for h in sorted(found, key=lambda h: h.number) if h.number]


def test_a_record_is_as_long_as_what_came(start):
    server = start()
    session = make(server, slots=40, missing="skip")
    size = session.arena.size
    push(server, gradient(session, np.random.default_rng(0), only=["a", "c"]))
    assert lengths(session) == [4 * size]
    seen = []
    for taken, only in ((1, ["emb"]), (3, ["emb", "flat"]), (150, ["emb"]), (200, ["emb", "a"])):
        sent = gradient(session, np.random.default_rng(1), few=taken, only=only)
        assert {session.arena.layout.entries[one.entry].name for one in sent.rows} >= {"emb"}
        push(server, sent)
        seen.append(lengths(session)[-1])
    assert seen == [4 + 28, 3 * (4 + 28) + 3 * 8, 50 * 4 + 150 * 28, 6 * 4 + 200 * 28]
    again = server.crashed()
    assert again.state_of() == server.state_of()
    again.close()


def test_no_push_of_rows_is_longer_than_the_dense_one(start):
    """Half of all rows of one element each is the worst: as many numbers as are left out."""
    server = start()
    for dtype in ("F32", "F64"):
        session = make(server, name=dtype, slots=400, dtype=dtype)
        rng = np.random.default_rng(2)
        for taken in (1, 99, 100, 101, 150, 151, 152, 199, 200, 300, 301):
            push(server, gradient(session, rng, few=taken), dtype)
        assert max(lengths(session)) <= session.arena.size * (4 if dtype == "F32" else 8)
    again = server.crashed()
    for dtype in ("F32", "F64"):
        assert again.state_of(dtype) == server.state_of(dtype)
    again.close()


def test_rows_that_were_skipped_and_rows_that_were_refused(start):
    server = start()
    session = make(server, on_nonfinite="skip", slots=40)
    rng = np.random.default_rng(3)
    key = {"worker": "w", "sequence": 1, "base_version": "1-1"}
    summary = push(server, gradient(session, rng, few=2, bad=True, **key)).summary
    assert (summary.applied, summary.skipped) == (False, "nonfinite")
    push(server, gradient(session, rng, few=2))
    strict = make(server, name="strict")
    with pytest.raises(Nonfinite):
        push(server, gradient(strict, rng, few=2, bad=True), "strict")
    assert strict.durable.journal.ring.free()[1] == 5
    again = server.crashed()
    assert again.state_of() == server.state_of()
    again.close()


def test_a_retry_after_a_crash_is_known_by_its_rows(start):
    server = start()
    session = make(server)
    key = {"worker": "w", "sequence": 1, "base_version": "1-1"}
    first = push(server, gradient(session, np.random.default_rng(4), **key))
    again = server.crashed()
    try:
        session = again.app.state.sessions.get("m")
        repeat = push(again, gradient(session, np.random.default_rng(4), **key))
        assert (repeat.replayed, repeat.summary) == (True, first.summary)
        change = {"optimizer": {"lazy": False}}
        again.on_loop(session.patch(lambda spec: apply_patch(spec, change), None))
        push(again, gradient(session, np.random.default_rng(5)))  # of which the log has all
        found = again.state_of()
        third = again.crashed()
        assert third.state_of() == found
        third.close()
    finally:
        again.close()


def test_a_record_that_is_too_short_is_damage(start, monkeypatch):
    server = start()
    session = make(server)
    push(server, gradient(session, np.random.default_rng(4), few=3))
    monkeypatch.setattr(
        "service.sessions.recovery.unpack_push",
        lambda *a: (p := unpack_push(*a))._replace(rows=(*p.rows[:-1], (p.rows[-1][0], 1))),
    )
    again = server.crashed()
    (damage,) = again.call("GET", "/health/ready").json["damaged"]
    assert "bytes of gradient" in damage["what"]
    again.close()


DENSE = Push(
    "w", 1, bytes(16), "F32", 3, 0.5, 2.0, True, 0.25, None, 1e9, None,
    (Part(0, 0, 2, 7, 0.5, (-0.5, 0.0, 1.0), ()),),
)  # fmt: skip
BYTES = (
    "3b000000" "01000000" "000000000000e03f" "0000000000000040" "01000000"
    "7b226474797065223a22463332222c227374616c656e657373223a332c226174223a3130303030303030"
    "30302e302c226c6f7373223a302e32357d"
    "00000000" "00000000" "02000000" "0700000000000000" "000000000000e03f" "03" "00"
    "000000000000e0bf" "0000000000000000" "000000000000f03f"
)  # fmt: skip


def test_a_record_without_rows_is_as_ever():
    data = pack_push(DENSE)
    assert data.hex() == BYTES
    assert unpack_push(data, "w", 1, bytes(16)) == DENSE
    rows = DENSE._replace(rows=((1, 5), (3, 0)))
    assert unpack_push(pack_push(rows), "w", 1, bytes(16)) == rows
    assert json.dumps([[1, 5], [3, 0]], separators=(",", ":")).encode() in pack_push(rows)
