"""What goes into a session whole: parameters, and groups with theirs; state.py has the rest.

Programs of the lane. Each checks everything that may be refused before its first write.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import DTYPES
from gradpost.protocol.tensors import HeaderError, build_header
from kernels import accumulate, convert, cpu, reduce
from service.errors import Nonfinite, SpecDiffers, TensorMismatch
from service.schemas import Group, Spec, parse_group, parse_spec, terms
from service.sessions import rounds, update
from service.sessions.arena import (
    Arena,
    Array,
    Tensor,
    check_known,
    make,
    members,
)
from service.sessions.image import HEADER_BYTES, Standing
from service.sessions.lane import Program
from service.sessions.layout import Layout

if TYPE_CHECKING:
    from service.sessions.pushes import Gradient, Position
    from service.sessions.session import Base, Session


# Parameters


def load(
    session: "Session", tensors: Sequence[Tensor], *, first_only: bool, base: "Base | None"
) -> Program[None]:
    """Takes parameters; the first upload makes the arrays, a later one begins an epoch."""
    session.check_alive()
    session.check_version(base)
    if not tensors:
        raise TensorMismatch("The upload holds no tensors; send those of the model.")
    if first_only:
        session.check_first()
    if session.arena is None:
        yield from _first(session, tensors)
        return
    arena = session.arena
    check_known(arena.layout, tensors)
    target = arena.versions.fresh()
    try:
        target[:] = arena.versions.head.flat
        yield from place(arena.layout, tensors, target, session.spec.dtype)
        if session.durable is not None:
            now = Standing.of(session)
            standing = replace(now, at=next_epoch(session.at), flat=target, cut="params")
            yield from session.durable.replace(standing, grown=False)
    except BaseException:
        arena.versions.drop(target)
        raise
    begin_epoch(session, arena, target, "params")


def _first(session: "Session", tensors: Sequence[Tensor]) -> Program[None]:
    arena, target = yield from first(session, tensors)
    try:
        if session.durable is not None:
            now = Standing.of(session)
            standing = replace(now, at=next_version(session.at), arena=arena, flat=target)
            yield from session.durable.replace(standing, grown=True)
    except BaseException:
        arena.versions.drop(target)
        session.shared.budget.release(arena.reserved)
        raise
    session.arena = arena
    publish(session, arena, target)


def first(session: "Session", tensors: Sequence[Tensor]) -> Program[tuple[Arena, Array]]:
    """The arrays of a session that has none, and its parameters; nobody sees them yet.

    Whoever does not put them into the session gives the reserved bytes back.

    Raises:
        TensorMismatch: As `arena.make` and `arena.members`, or names too long for a header.
        Nonfinite: A value is not finite in the session's dtype.
        InsufficientMemory: The budget has no room.
    """
    spec = session.spec
    names = [name for name, _, _, _ in tensors]
    layout = Layout.of([(n, d, s) for n, d, s, _ in tensors], members(spec.groups, names))
    arena = _arena(session, layout, spec)
    target = arena.versions.fresh()
    try:
        _check_headers(arena, spec.dtype)
        yield from place(layout, tensors, target, spec.dtype)
        if arena.average is not None:
            arena.average[:] = target
        update.compile_all(arena, session.terms, spec.dtype, norms=spec.norms)
        if arena.total is not None:
            accumulate.warm([spec.dtype], spec.dtype)
    except BaseException:
        arena.versions.drop(target)
        session.shared.budget.release(arena.reserved)
        raise
    return arena, target


def _arena(session: "Session", layout: Layout, spec: Spec) -> Arena:
    shared = session.shared
    return make(
        layout,
        terms(spec),
        spec.dtype,
        average=spec.ema is not None,
        copied=spec.durability != "none",
        rounds=spec.update,
        settings=shared.settings,
        budget=shared.budget,
    )


def _check_headers(arena: Arena, dtype: str) -> None:
    """Refuses names that no answer could carry: a safetensors header has a limit.

    Raises:
        TensorMismatch: Too many tensors, or too long names.
    """
    entries = arena.layout.entries
    rows = [(f"{p.slot}/{p.entry.name}", dtype, p.shape) for p in arena.pieces()]
    names = [(f"params/{entry.name}", dtype, entry.shape) for entry in entries]
    facts = {entry.name: 1 << 62 for entry in entries}
    scalars = {
        entry.name: dict.fromkeys(arena.groups[entry.group].rule.scalars, -1.2345678901234567e-300)
        for entry in entries
        if arena.groups[entry.group].rule.scalars
    }
    try:
        build_header([(e.name, dtype, e.shape) for e in entries], {"summary": "x" * 1024})
        build_header(names, limit=HEADER_BYTES)  # of a snapshot
        build_header(rows, {"counts": json.dumps(facts), "scalars": json.dumps(scalars)})
    except HeaderError as error:
        raise TensorMismatch(
            f"{len(entries)} tensors: their names and those of their state do not fit a "
            f"safetensors header ({error}) Join small tensors, or shorten the names.",
            tensors=len(entries),
        ) from None


def publish(session: "Session", arena: Arena, flat: Array) -> None:
    """Makes an array the next version of this epoch."""
    now = next_version(session.at)
    arena.versions.publish(now.epoch, now.version, now.step, flat)
    session.at = now


def next_version(at: "Position") -> "Position":
    """Behind a change that is no update and cuts no history."""
    return at._replace(version=at.version + 1)


def next_epoch(at: "Position") -> "Position":
    """Where the next history begins (docs/decisions/0006)."""
    return at._replace(epoch=at.epoch + 1, version=1)


def begin_epoch(session: "Session", arena: Arena, flat: Array, reason: str) -> None:
    """Makes an array the first version of the next epoch; an open round is abandoned."""
    now = next_epoch(session.at)
    arena.versions.publish(now.epoch, now.version, now.step, flat)
    session.at = now
    rounds.give_up(session, reason)


def place(layout: Layout, tensors: Sequence[Tensor], target: Array, master: str) -> Program[None]:
    """Converts tensors to the master dtype at their places; every value must be finite."""
    for name, dtype, _, flat in tensors:
        entry = layout.index[name]
        into = target[entry.offset : entry.offset + entry.size]
        yield [
            partial(convert.convert, flat, dtype, into, master, lo, hi)
            for lo, hi in cpu.chunks(0, entry.size)
        ]
        at = reduce.first_nonfinite(into, master)
        if at >= 0:
            raise Nonfinite(
                f"Parameter {name!r} is not finite in {master} at flat index {at}; "
                "upload finite values (or use dtype F64 for larger ones).",
                tensor=name,
                index=at,
            )


def freed(arena: Arena, dtype: str) -> int:
    """Gives up the arrays; returns the bytes of the budget that nobody holds any more."""
    # The two version buffers are the versions' own to give back: readers hold some. So are the
    # gradients that pushes in flight are written to.
    own = arena.gradients.nbytes * arena.gradients.kept
    kept = 2 * arena.size * DTYPES[dtype] + own - arena.gradients.close()
    arena.versions.close()
    arena.groups = ()
    arena.average = arena.total = arena.reduced = None
    return arena.reserved - kept


# Groups


class Grown(NamedTuple):
    """The arrays and the specification with one more group."""

    arena: Arena
    spec: Spec
    added: Group


def add_group(
    session: "Session", stated: Mapping[str, Any], tensors: Sequence[Tensor]
) -> "Program[Grown | None]":
    """Appends a group and its tensors; the others keep parameters, state, counts and places.

    Returns:
        What `adopt` takes; None if the session has this very group.
    """
    arena = session.ready
    spec = session.spec
    names = [name for name, _, _, _ in tensors]
    if not tensors:
        raise TensorMismatch("The group holds no tensors; send them with it.")
    added = parse_group({**stated, "params": names})
    if added.name is not None and _is_there(session, added):
        return None
    base = spec.model_dump(mode="json", exclude_unset=True)
    own = added.model_dump(mode="json", exclude_unset=True)
    changed, _ = parse_spec({**base, "groups": [*base.get("groups", ()), own]})
    again = sorted(set(names) & arena.layout.index.keys())
    if again:
        raise TensorMismatch(
            f"{again[0]!r} is one of the session's tensors already; a group brings new ones.",
            names=again[:20],
        )
    index = len(changed.groups)
    layout = arena.layout.extended([(n, d, s) for n, d, s, _ in tensors], index)
    grown = _arena(session, layout, changed)
    target = grown.versions.fresh()
    try:
        _check_headers(grown, spec.dtype)
        target[: arena.size] = arena.versions.head.flat
        yield from place(layout, tensors, target, spec.dtype)
        if grown.average is not None and arena.average is not None:
            grown.average[: arena.size] = arena.average
            grown.average[arena.size :] = target[arena.size :]
        for old, new in zip(arena.groups, grown.groups, strict=False):
            new.state, new.runs = old.state, old.runs
        now = next_version(session.at)
        if session.durable is not None:
            more = session.added if added.name is None else {**session.added, added.name: added}
            revision = session.revision + 1
            standing = Standing(changed, more, revision, now, grown, target, cut="groups")
            yield from session.durable.replace(standing, grown=True)
    except BaseException:
        grown.versions.drop(target)
        session.shared.budget.release(grown.reserved)
        raise
    grown.versions.publish(now.epoch, now.version, now.step, target)
    return Grown(grown, changed, added)


def adopt(session: "Session", grown: "Grown | None") -> bool:
    """Puts what `add_group` made in the old one's place: on the event loop, in one go."""
    if grown is None:
        return False
    assert session.arena is not None
    rounds.give_up(session, "groups")  # before its buffers go
    known, total = len(session.arena.layout.entries), len(grown.arena.layout.entries)
    session.changes.note(session.epoch, session.version + 1, [(known, total)])
    session.shared.budget.release(freed(session.arena, session.spec.dtype))
    session.arena = grown.arena
    session.respecify(grown.spec)
    session.at = session.at._replace(version=session.version + 1)
    if grown.added.name is not None:
        session.added[grown.added.name] = grown.added
    return True


def _is_there(session: "Session", added: Group) -> bool:
    """Whether the session has this very group: then the request repeats one that was answered.

    Raises:
        SpecDiffers: It has another group of this name.
    """
    for group in session.spec.groups:
        if group.name != added.name:
            continue
        if session.added.get(added.name or "", group) == added:  # a PATCH since does not count
            return True
        raise SpecDiffers(
            f"Session {session.id!r} has another group named {group.name!r}; take another name.",
            differences=[{"field": "groups", "ours": group.model_dump(mode="json"),
                          "yours": added.model_dump(mode="json")}],
        )  # fmt: skip
    return False


def extended(arena: Arena, spec: Spec, gradient: "Gradient") -> "Gradient":
    """A gradient that was read before a group came, in the layout that holds now.

    Raises:
        TensorMismatch: The session refuses pushes without some tensors.
    """
    entries = arena.layout.entries
    known = len(gradient.present) if gradient.present is not None else _fits(arena, gradient)
    late = [entry.name for entry in entries[known:]]
    if spec.missing == "refuse":
        raise TensorMismatch(
            f"A group was added while this push was sent; it lacks {late[0]!r}. Send every tensor "
            "of the session.",
            missing=late[:20],
        )
    flat = np.zeros(arena.size, gradient.flat.dtype)
    flat[: gradient.flat.size] = gradient.flat
    present = gradient.present or (True,) * known
    return gradient._replace(flat=flat, present=present + (False,) * (len(entries) - known))


def _fits(arena: Arena, gradient: "Gradient") -> int:
    """How many entries a shorter vector covers."""
    ends = [entry.offset + entry.size for entry in arena.layout.entries]
    return sum(end <= gradient.flat.size for end in ends)
