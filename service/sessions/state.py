"""Optimizer state, and checkpoints with the parameters: into a session and out of it, whole.

Programs of the lane. Each checks everything that may be refused before its first write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels import reduce
from service.errors import AverageMissing, Nonfinite, TensorMismatch
from service.schemas.refusals import invalid
from service.sessions import image
from service.sessions import runs as stretches
from service.sessions.arena import Arena, Array, Piece, Tensor, by_entry, check_known, counts
from service.sessions.image import Standing
from service.sessions.lane import Program
from service.sessions.runs import Run
from service.sessions.transfer import (
    begin_epoch,
    first,
    next_epoch,
    next_version,
    place,
    publish,
)
from service.sessions.versions import Version

NONNEGATIVE = frozenset(
    "sum square_avg acc_delta exp_avg_sq max_exp_avg_sq exp_inf step_size "
    "row_var col_var variance".split()
)
"""State of which a root is taken, or that is a size."""

SCALARS = {"mu_product": (0.0, 1.0 - 2.0**-53), "eta": (0.0, 1e300), "mu": (0.0, 1.0)}
"""Least and largest value of the scalars beside the arrays: 1 - mu_product is divided by."""

if TYPE_CHECKING:
    from service.sessions.checkpoints import Contents
    from service.sessions.session import Base, Session


def export_state(session: "Session") -> Program[tuple[dict[str, object], list[Piece]]]:
    """A copy of the state: facts, and every (slot, tensor)."""
    arena = session.ready
    facts: dict[str, object] = {
        "step": session.step,
        "epoch": session.epoch,
        "version": session.version,
        "rule": image.rule_of(session.spec),
        "counts": counts(arena),
    }
    if any(group.rule.scalars for group in arena.groups):
        facts["scalars"] = _scalars(arena)
    pieces = arena.pieces()
    arrays = {id(piece.array): piece.array for piece in pieces}
    copied = yield [array.copy for array in arrays.values()]
    copies = dict(zip(arrays, copied, strict=True))
    return facts, [piece._replace(array=copies[id(piece.array)]) for piece in pieces]


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
    loaded = _checked(arena, session.spec.dtype, tensors, counted, scalars)
    target = arena.versions.fresh()  # may refuse, so it comes before the first write
    try:
        yield [partial(np.copyto, target, arena.versions.head.flat)]
        yield from _commit(session, arena, target, loaded, step, grown=False, cut="state")
    except BaseException:
        arena.versions.drop(target)
        raise
    _take(session, arena, loaded, step)
    begin_epoch(session, arena, target, "state")


def restore(
    session: "Session", contents: "Contents", base: "Base | None", *, first_only: bool
) -> Program[None]:
    """Takes parameters and state of a checkpoint; begins an epoch, or fills an empty session."""
    session.check_alive()
    session.check_version(base)
    if first_only:
        session.check_first()
    if not contents.params:
        raise TensorMismatch("The checkpoint holds no parameters; send one whole.")
    if contents.rule != (ours := image.rule_of(session.spec)):
        raise invalid(
            "rule",
            f"The checkpoint is of rule {contents.rule[:80]} and the session's is {ours}; restore "
            "its params only.",
        )
    fresh = session.arena is None
    if session.arena is None:
        arena, target = yield from first(session, contents.params)
    else:
        arena = session.arena
        check_known(arena.layout, contents.params)
        missing = sorted(arena.layout.index.keys() - {name for name, _, _, _ in contents.params})
        if missing:
            raise TensorMismatch(
                f"The checkpoint lacks {missing[0]!r}; restore one of this session, or its params "
                "only.",
                missing=missing[:20],
            )
        target = arena.versions.fresh()
    try:
        loaded = _checked(
            arena, session.spec.dtype, contents.state, contents.counts, _named(arena, contents)
        )
        if not fresh:
            yield from place(arena.layout, contents.params, target, session.spec.dtype)
        step = contents.step
        yield from _commit(session, arena, target, loaded, step, grown=fresh, cut="restore")
    except BaseException:
        arena.versions.drop(target)
        if fresh:
            session.shared.budget.release(arena.reserved)
        raise
    _take(session, arena, loaded, contents.step)
    if fresh:
        session.arena = arena
        publish(session, arena, target)
    else:
        begin_epoch(session, arena, target, "restore")


def _named(arena: Arena, contents: "Contents") -> dict[str, dict[str, float]]:
    """The scalars of a checkpoint under their names."""
    found = {}
    for entry in arena.layout.entries:
        names, values = arena.groups[entry.group].rule.scalars, contents.scalars.get(entry.name, [])
        if values and len(values) != len(names):
            raise TensorMismatch(
                f"The checkpoint has {len(values)} scalars of {entry.name!r} and its rule keeps "
                f"{len(names)}; restore one of this rule, or its params only.",
                names=[entry.name],
            )
        if values:
            found[entry.name] = dict(zip(names, values, strict=True))
    return found


class _Loaded(NamedTuple):
    """A whole state that fits a session.

    Attributes:
        pieces: Each part of the state arrays, with what it becomes.
        runs: Of each group.
    """

    pieces: list[tuple[Piece, Array]]
    runs: list[tuple[Run, ...]]


def _checked(
    arena: Arena, dtype: str, tensors: Sequence[Tensor], counted: Mapping[str, int],
    scalars: Mapping[str, Mapping[str, float]],
) -> _Loaded:  # fmt: skip
    """What to write where; nothing is written.

    Raises:
        TensorMismatch: Not exactly the state that the session has.
        Nonfinite: A value that no state may have.
    """
    _check_state(arena, dtype, tensors, counted)
    per_entry = _checked_scalars(arena, counted, scalars)
    came = {name: flat for name, _, _, flat in tensors}
    pieces = [(piece, came[f"{piece.slot}/{piece.entry.name}"]) for piece in arena.pieces()]
    for piece, flat in pieces:
        _check_values(piece, flat)
    entries = arena.layout.entries
    updates = [counted[entry.name] for entry in entries]
    runs = [stretches.of(group.span, entries, updates, per_entry) for group in arena.groups]
    return _Loaded(pieces, runs)


def _commit(
    session: "Session",
    arena: Arena,
    target: Array,
    loaded: _Loaded,
    step: int,
    *,
    grown: bool,
    cut: str,
) -> Program[None]:
    """Makes the new state durable, where the session is; before anyone sees it."""
    if session.durable is None:
        return
    at = next_version(session.at) if grown else next_epoch(session.at)
    standing = replace(
        Standing.of(session),
        at=at._replace(step=step),
        arena=arena,
        flat=target,
        state=[flat for _, flat in loaded.pieces],
        cut=cut,
        runs=[one for few in loaded.runs for one in few for _ in range(one.first, one.last)],
    )
    yield from session.durable.replace(standing, grown=grown)


def _take(session: "Session", arena: Arena, loaded: _Loaded, step: int) -> None:
    """Writes a state that was checked."""
    for piece, flat in loaded.pieces:
        piece.flat[:] = flat
    for group, few in zip(arena.groups, loaded.runs, strict=True):
        group.runs = few
    session.at = session.at._replace(step=step)


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


def _check_values(piece: Piece, flat: Array) -> None:
    """Refuses what would make parameters NaN at the next step: NaN, or a negative mean square."""
    name = f"{piece.slot}/{piece.entry.name}"
    at = reduce.first_nonfinite(flat, "F64" if flat.dtype == np.float64 else "F32")
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
