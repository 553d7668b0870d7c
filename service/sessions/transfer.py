"""What goes into a session and out of it whole: parameters, state, groups, the average.

Programs of the lane. Each checks everything that may be refused before its first write.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import DTYPES
from gradpost.protocol.tensors import HeaderError, build_header
from kernels import convert, cpu, reduce
from service.errors import AverageMissing, Nonfinite, SpecDiffers, TensorMismatch
from service.schemas import Group, Spec, parse_group, parse_spec, terms
from service.sessions import runs as stretches
from service.sessions import update
from service.sessions.arena import (
    Arena,
    Array,
    Piece,
    Tensor,
    by_entry,
    check_known,
    counts,
    make,
    members,
)
from service.sessions.lane import Program
from service.sessions.layout import Layout
from service.sessions.versions import Version

NONNEGATIVE = frozenset(
    "sum square_avg acc_delta exp_avg_sq max_exp_avg_sq exp_inf step_size "
    "row_var col_var variance".split()
)
"""State of which a root is taken, or that is a size."""

SCALARS = {"mu_product": (0.0, 1.0 - 2.0**-53), "eta": (0.0, 1e300), "mu": (0.0, 1.0)}
"""Least and largest value of the scalars beside the arrays: 1 - mu_product is divided by."""

if TYPE_CHECKING:
    from service.sessions.session import Base, Gradient, Session


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
        yield from _place(arena.layout, tensors, target, session.spec.dtype)
    except BaseException:
        arena.versions.drop(target)
        raise
    _begin_epoch(session, arena, target)


def _first(session: "Session", tensors: Sequence[Tensor]) -> Program[None]:
    spec = session.spec
    names = [name for name, _, _, _ in tensors]
    layout = Layout.of([(n, d, s) for n, d, s, _ in tensors], members(spec.groups, names))
    arena = _arena(session, layout, spec)
    target = arena.versions.fresh()
    try:
        _check_headers(arena, spec.dtype)
        yield from _place(layout, tensors, target, spec.dtype)
        if arena.average is not None:
            arena.average[:] = target
        update.compile_all(arena, session.terms, spec.dtype, norms=spec.norms)
    except BaseException:
        arena.versions.drop(target)
        session.shared.budget.release(arena.reserved)
        raise
    session.arena = arena
    _publish(session, arena, target)


def _arena(session: "Session", layout: Layout, spec: Spec) -> Arena:
    shared = session.shared
    return make(
        layout,
        terms(spec),
        spec.dtype,
        average=spec.ema is not None,
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
    facts = {entry.name: 1 << 62 for entry in entries}
    scalars = {
        entry.name: dict.fromkeys(arena.groups[entry.group].rule.scalars, -1.2345678901234567e-300)
        for entry in entries
        if arena.groups[entry.group].rule.scalars
    }
    try:
        build_header([(e.name, dtype, e.shape) for e in entries], {"summary": "x" * 1024})
        build_header(rows, {"counts": json.dumps(facts), "scalars": json.dumps(scalars)})
    except HeaderError as error:
        raise TensorMismatch(
            f"{len(entries)} tensors: their names and those of their state do not fit a "
            f"safetensors header ({error}) Join small tensors, or shorten the names.",
            tensors=len(entries),
        ) from None


def _publish(session: "Session", arena: Arena, flat: Array) -> None:
    """Makes an array the next version of this epoch."""
    now = session.at._replace(version=session.version + 1)
    arena.versions.publish(now.epoch, now.version, now.step, flat)
    session.at = now


def _begin_epoch(session: "Session", arena: Arena, flat: Array) -> None:
    """Makes an array the first version of the next epoch (docs/decisions/0006)."""
    now = session.at._replace(epoch=session.epoch + 1, version=1)
    arena.versions.publish(now.epoch, now.version, now.step, flat)
    session.at = now


def _place(layout: Layout, tensors: Sequence[Tensor], target: Array, master: str) -> Program[None]:
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
    # The two version buffers are the versions' own to give back: readers hold some. So is the
    # gradient that a push in flight is written to.
    kept = 2 * arena.size * DTYPES[dtype] + arena.gradients.nbytes - arena.gradients.close()
    arena.versions.close()
    arena.groups = ()
    arena.average = None
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
        yield from _place(layout, tensors, target, spec.dtype)
        if grown.average is not None and arena.average is not None:
            grown.average[: arena.size] = arena.average
            grown.average[arena.size :] = target[arena.size :]
    except BaseException:
        grown.versions.drop(target)
        session.shared.budget.release(grown.reserved)
        raise
    for old, new in zip(arena.groups, grown.groups, strict=False):
        new.state, new.runs = old.state, old.runs
    now = session.at._replace(version=session.version + 1)
    grown.versions.publish(now.epoch, now.version, now.step, target)
    return Grown(grown, changed, added)


def adopt(session: "Session", grown: "Grown | None") -> bool:
    """Puts what `add_group` made in the old one's place: on the event loop, in one go."""
    if grown is None:
        return False
    assert session.arena is not None
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


# State


def export_state(session: "Session") -> Program[tuple[dict[str, object], list[Piece]]]:
    """A copy of the state: facts, and every (slot, tensor)."""
    arena = session.ready
    facts: dict[str, object] = {
        "step": session.step,
        "epoch": session.epoch,
        "version": session.version,
        "rule": rule_of(session),
        "counts": counts(arena),
    }
    if any(group.rule.scalars for group in arena.groups):
        facts["scalars"] = _scalars(arena)
    pieces = arena.pieces()
    arrays = {id(piece.array): piece.array for piece in pieces}
    copied = yield [array.copy for array in arrays.values()]
    copies = dict(zip(arrays, copied, strict=True))
    return facts, [piece._replace(array=copies[id(piece.array)]) for piece in pieces]


def rule_of(session: "Session") -> str:
    """The rule of a session; where groups have others, all of them, in the order of the groups."""
    return "+".join(dict.fromkeys(one.optimizer.rule for one in session.terms))


def _scalars(arena: Arena) -> dict[str, dict[str, float]]:
    """Scalars by tensor, then by name; none for a tensor that was never updated."""
    rows = zip(arena.layout.entries, by_entry(arena), strict=True)
    return {
        entry.name: dict(
            zip(arena.groups[entry.group].rule.scalars, run.scalars, strict=bool(run.scalars))
        )
        for entry, run in rows
        if run.scalars
    }


def load_state(
    session: "Session",
    tensors: Sequence[Tensor],
    step: int,
    counted: Mapping[str, int],
    scalars: Mapping[str, Mapping[str, float]],
    base: "Base | None",
) -> Program[None]:
    """Replaces the state whole; begins an epoch."""
    arena = session.ready
    session.check_version(base)
    _check_state(arena, session.spec.dtype, tensors, counted)
    per_entry = _checked_scalars(arena, counted, scalars)
    came = {name: flat for name, _, _, flat in tensors}
    for piece in arena.pieces():
        _check_values(piece, came[f"{piece.slot}/{piece.entry.name}"], session.spec.dtype)
    target = arena.versions.fresh()  # may refuse, so it comes before the first write
    for piece in arena.pieces():
        piece.flat[:] = came[f"{piece.slot}/{piece.entry.name}"]
    updates = [counted[entry.name] for entry in arena.layout.entries]
    for group in arena.groups:
        group.runs = stretches.of(group.span, arena.layout.entries, updates, per_entry)
    yield [partial(np.copyto, target, arena.versions.head.flat)]
    session.at = session.at._replace(step=step)
    _begin_epoch(session, arena, target)


def _check_state(
    arena: Arena, dtype: str, tensors: Sequence[Tensor], counted: Mapping[str, int]
) -> None:
    shapes = {f"{piece.slot}/{piece.entry.name}": piece.shape for piece in arena.pieces()}
    came = {name: shape for name, _, shape, _ in tensors}
    wrong = sorted(
        {name for name in shapes.keys() | came.keys() if shapes.get(name) != came.get(name)}
        | {name for name, other, _, _ in tensors if other != dtype}
    )
    if wrong:
        raise TensorMismatch(
            f"A state has every <slot>/<tensor> of the session in {dtype}; missing, "
            f"unexpected, misshapen or of another dtype: {', '.join(map(repr, wrong[:10]))}.",
            names=wrong[:20],
        )
    if counted.keys() != arena.layout.index.keys():
        raise TensorMismatch(
            "The counts must name every tensor of the session and no other; take them from "
            "the metadata of GET state.",
            names=sorted(counted.keys() ^ arena.layout.index.keys())[:20],
        )


def _check_values(piece: Piece, flat: Array, dtype: str) -> None:
    """Refuses what would make parameters NaN at the next step: NaN, or a negative mean square."""
    name = f"{piece.slot}/{piece.entry.name}"
    at = reduce.first_nonfinite(flat, dtype)
    if at < 0 and piece.slot in NONNEGATIVE and flat.size and flat.min() < 0:
        at = int(flat.argmin())
    if at >= 0:
        raise Nonfinite(
            f"{name!r} is {float(flat[at])!r} at flat index {at}; a state holds finite numbers, "
            f"and {', '.join(sorted(NONNEGATIVE))} none below 0.",
            tensor=name,
            index=at,
        )


def _checked_scalars(
    arena: Arena, counted: Mapping[str, int], scalars: Mapping[str, Mapping[str, float]]
) -> list[tuple[float, ...]]:
    """The scalars of each entry, in the order of its rule's names."""
    found: list[tuple[float, ...]] = []
    for entry in arena.layout.entries:
        names = arena.groups[entry.group].rule.scalars
        ours: Mapping[str, Any] = scalars.get(entry.name, {})
        wanted = set(names) if counted[entry.name] else set()
        if set(ours) != wanted:
            raise TensorMismatch(
                f"The state of {entry.name!r} has the scalars {', '.join(names) or 'none'} once it "
                "was updated; take them from the metadata of GET state.",
                names=[entry.name],
            )
        values = tuple(float(ours[name]) for name in names if name in ours)
        for name, value in zip(names, values, strict=False):
            least, most = SCALARS[name]
            if not least <= value <= most:
                raise Nonfinite(
                    f"{name} of {entry.name!r} is {value!r} and lies from {least} to {most}; take "
                    "it from the metadata of GET state.",
                    tensor=entry.name,
                )
        found.append(values)
    return found


def copy_average(session: "Session") -> Program[Version]:
    """A copy of the average as a version that nobody else holds."""
    arena = session.ready
    if arena.average is None:
        raise AverageMissing(
            f"Session {session.id!r} keeps no average; create it with ema, as "
            '{"ema": {"decay": 0.999}}.',
            session=session.id,
        )
    (copy,) = yield [arena.average.copy]
    return Version(arena.versions, session.epoch, session.version, session.step, copy)
