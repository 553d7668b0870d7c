"""Sessions back from the disk: the snapshot, then every record behind it, to the bit.

A record of a push keeps the numbers of its update, so nothing is computed again but what the
kernels do with them.
"""

import json
from functools import partial
from typing import Any

import numpy as np

from gradpost.protocol.dtypes import DTYPES, NUMPY
from service.errors import ServiceError
from service.schemas import parse_spec, with_overrides
from service.sessions import image, pushes, transfer, update
from service.sessions.arena import Arena, by_entry
from service.sessions.disk import Disk
from service.sessions.durable import IN_PAYLOAD, Durable
from service.sessions.pushes import Ahead, Decided, Position
from service.sessions.records import Push, unpack_push
from service.sessions.session import Session, Shared
from service.storage.failures import Damaged
from service.storage.header import Header, Kind
from service.storage.recovery import Pending, Record, Recovered


def revive(shared: Shared, disk: Disk, pending: Pending) -> tuple[Session, bool]:
    """Takes up one session. Waits for the disk; in no thread of the pool.

    Returns:
        The session, and whether it begins an epoch: steps behind its snapshot may be lost.

    Raises:
        Damaged: What was acknowledged can't be had again; nothing was touched.
    """
    found: Recovered = disk.guarded(partial(disk.store.take_up, pending))()
    session: Session | None = None
    try:
        loaded = image.read(found.snapshot)
        at = _position(found, loaded.facts)
        session = Session(found.row.id, loaded.spec, at.epoch, shared)
        session.at = at
        image.restore(session, loaded)
        _check_kernels(session, found)
        for record in found.records:
            _replay(session, record)
        session.durable = Durable(session, disk, found.journal)
        session.durable.begin()
    except Exception as error:
        found.journal.close()
        if session is not None and session.arena is not None:
            shared.budget.release(transfer.freed(session.arena, session.spec.dtype))
        if isinstance(error, Damaged | MemoryError):
            raise
        what = error.detail if isinstance(error, ServiceError) else f"{error!r}"
        raise Damaged(f"it can't be brought back: {what}", found.row.snapshot) from error
    return session, at.epoch != loaded.facts.epoch


def _position(found: Recovered, facts: image.Facts) -> Position:
    """Where the session goes on: in the next epoch, unless nothing was lost."""
    if facts.epoch == found.row.epoch:
        return Position(facts.epoch, facts.version, facts.step)
    return Position(found.row.epoch, int(facts.layout is not None), facts.step)


def _check_kernels(session: Session, found: Recovered) -> None:
    ours = image.kernel_rev(session.spec)
    if found.records and found.row.kernel_rev != ours:
        raise Damaged(
            f"its log was written by other kernels (revision {found.row.kernel_rev}, and this "
            f"server has {ours}); start the version that wrote it and stop it in order, then this "
            "one",
            found.row.ring,
        )


def _replay(session: Session, record: Record) -> None:
    header = record.header
    if header.kind in (Kind.PUSH, Kind.SKIP):
        _replay_push(session, header, record.payload())
    elif header.kind is Kind.PATCH:
        facts: dict[str, Any] = json.loads(header.meta)
        spec, _ = parse_spec(facts["spec"])
        session.respecify(spec)
        session.revision = facts["revision"]
    else:
        raise Damaged(f"record {header.number} is a {header.kind.name}, which no log has", "ring")


def _replay_push(session: Session, header: Header, payload: bytes) -> None:
    arena = session.ready
    push, flat_bytes = _push_of(header, payload)
    size = arena.size * DTYPES[push.dtype]
    if flat_bytes != size:
        raise Damaged(
            f"record {header.number} has {flat_bytes} bytes of gradient and not {size}", "ring"
        )
    flat = np.frombuffer(payload, NUMPY[push.dtype], arena.size)
    ahead = Ahead(session.at, ())
    work = None
    if push.skipped is None:
        _check_counts(arena, push, header.number)
        terms = with_overrides(session.terms, push.overrides, session.spec.dtype)
        work = update.prepare(arena, terms, push.parts, session.spec.dtype, push.dtype)
    decided = Decided(push, flat, work, ahead)
    session.shared.pool.run(pushes.apply(session, decided, None, hold=False))


def _push_of(header: Header, payload: bytes) -> tuple[Push, int]:
    """The push of a record, and the bytes of its gradient."""
    facts, size = header.meta[1:], len(payload)
    if header.meta[:1] == IN_PAYLOAD:
        length = int.from_bytes(facts, "little")
        size -= length
        facts = payload[size:]
    worker, sequence = header.key or (None, None)
    return unpack_push(facts, worker, sequence, header.digest if header.key else b""), size


def _check_counts(arena: Arena, push: Push, number: int) -> None:
    """A stretch that was updated another number of times is not the one that was logged."""
    runs = by_entry(arena)
    for part in push.parts:
        if any(run.updates != part.updates for run in runs[part.first : part.last]):
            raise Damaged(f"record {number} does not follow what is before it", "ring")
