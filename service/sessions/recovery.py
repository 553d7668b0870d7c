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
from service.schemas import PushControl, parse_spec, with_overrides
from service.sessions import contributions, image, pushes, sparse, transfer, update
from service.sessions.arena import Arena, Array, by_entry
from service.sessions.disk import Disk
from service.sessions.durable import IN_PAYLOAD, Durable
from service.sessions.pushes import Ahead, Decided, Gradient, Position
from service.sessions.records import Push, unpack_close, unpack_contribution, unpack_push
from service.sessions.rounds import give_up
from service.sessions.session import Session, Shared
from service.storage.failures import Damaged
from service.storage.header import Header, Kind
from service.storage.recovery import Pending, Record, Recovered
from service.wire.rows import Rows


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
        if at.epoch != loaded.facts.epoch:
            session.rounds.begin_anew()
        _check_kernels(session, found)
        for record in found.records:
            _replay(session, record)
        session.durable = Durable(session, disk, found.journal)
        session.durable.begin()
        session.durable.keep_end()
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
    # An open round is summed anew, whatever has summed it before; a PATCH computes nothing.
    bound = [one for one in found.records if one.header.kind in (Kind.PUSH, Kind.ROUND_CLOSE)]
    if bound and found.row.kernel_rev != ours:
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
    elif header.kind is Kind.CONTRIBUTION:
        _replay_contribution(session, header, record.payload())
    elif header.kind is Kind.ROUND_CLOSE:
        _replay_close(session, header, record.payload())
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
    flat, rows = _gradient_of(arena, push, memoryview(payload)[:flat_bytes], header.number)
    ahead = Ahead(session.at, ())
    work = None
    if push.skipped is None:
        _check_counts(arena, push, header.number)
        terms = with_overrides(session.terms, push.overrides, session.spec.dtype)
        work = update.prepare(arena, terms, push.parts, session.spec.dtype, push.dtype, rows=rows)
    decided = Decided(push, flat, work, ahead)
    session.shared.pool.run(pushes.apply(session, decided, None, hold=False))


def _gradient_of(
    arena: Arena, push: Push, data: memoryview, number: int
) -> tuple[Array, tuple[Rows, ...]]:
    """The gradient of a record, and the rows beside it."""
    size = arena.size * DTYPES[push.dtype]
    try:
        if push.rows is not None:
            return sparse.unlogged(arena.layout, push, data)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes of gradient and not {size}")
    except ValueError as error:
        raise Damaged(f"record {number} has {error}", "ring") from None
    return np.frombuffer(data, NUMPY[push.dtype], arena.size), ()


def _facts_of(header: Header, payload: bytes) -> tuple[bytes, int]:
    """What a record says, and the bytes of the gradient before it."""
    facts, size = header.meta[1:], len(payload)
    if header.meta[:1] == IN_PAYLOAD:
        size -= int.from_bytes(facts, "little")
        facts = payload[size:]
    return facts, size


def _push_of(header: Header, payload: bytes) -> tuple[Push, int]:
    """The push of a record, and the bytes of its gradient."""
    facts, size = _facts_of(header, payload)
    worker, sequence = header.key or (None, None)
    return unpack_push(facts, worker, sequence, header.digest if header.key else b""), size


def _replay_contribution(session: Session, header: Header, payload: bytes) -> None:
    """Takes a contribution into its round again, as it was taken."""
    arena = session.ready
    facts, size = _facts_of(header, payload)
    if header.key is None:
        raise Damaged(f"record {header.number} is a contribution of nobody", "ring")
    one = unpack_contribution(facts, header.key, header.digest)
    if one.round != session.rounds.number:
        raise Damaged(f"record {header.number} is of round {one.round}, which is not open", "ring")
    gradient = None
    if one.weight != 0:
        if size != arena.size * DTYPES[one.dtype]:
            raise Damaged(f"record {header.number} has {size} bytes of gradient", "ring")
        flat, release = np.frombuffer(payload, NUMPY[one.dtype], arena.size), _nothing
        if session.spec.update.holds:
            flat, release = contributions.buffer_of(arena, flat, one.dtype)
        control = PushControl(one.worker, one.sequence, None, one.loss)
        gradient = Gradient(flat, one.dtype, control, release, one.present)
    decided = contributions.Decided(one, gradient)
    session.shared.pool.run(contributions.take(session, decided, number=header.number))


def _replay_close(session: Session, header: Header, payload: bytes) -> None:
    """Ends a round as it was ended."""
    facts, _ = _facts_of(header, payload)
    end = unpack_close(facts)
    if session.rounds.open is None or end.round != session.rounds.number:
        raise Damaged(f"record {header.number} ends round {end.round}, which is not open", "ring")
    if end.status == "abandoned":
        give_up(session, end.reason)
    elif end.status == "skipped":
        contributions.skip(session, end.reason, end.at)
    else:
        assert end.push is not None
        _check_counts(session.ready, end.push, header.number)
        session.shared.pool.run(contributions.reduce(session, session.rounds.open))
        session.shared.pool.run(contributions.apply(session, end))


def _nothing() -> None:
    """Gives nothing back: the payload is memory of its own."""


def _check_counts(arena: Arena, push: Push, number: int) -> None:
    """A stretch that was updated another number of times is not the one that was logged."""
    runs = by_entry(arena)
    for part in push.parts:
        if any(run.updates != part.updates for run in runs[part.first : part.last]):
            raise Damaged(f"record {number} does not follow what is before it", "ring")
