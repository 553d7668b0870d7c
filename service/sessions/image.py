"""A session as one safetensors file: what a snapshot and a checkpoint hold.

```
params/<tensor>     the parameters, in layout order
<slot>/<tensor>     the state, group by group and slot by slot; ema/<tensor> is the average
ledger              U8: the pushes that were admitted (records.py); not in a checkpoint
__metadata__        gradpost: JSON, all the rest: `Facts`
```

So any safetensors library opens it. The header may be as long as the format allows; ours on the
wire is bounded more closely.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import DTYPES
from gradpost.protocol.tensors import Header, build_header, parse_header
from kernels import cpu, revision
from service.schemas import Group, Spec, parse_group, parse_spec, terms
from service.schemas.update import ROBUST
from service.sessions import runs as stretches
from service.sessions.arena import Arena, Array, by_entry, make
from service.sessions.lane import Program
from service.sessions.layout import Entry, Layout
from service.sessions.ledger import Contents
from service.sessions.members import Kept
from service.sessions.records import pack_ledger, unpack_ledger
from service.sessions.rounds import closed_of
from service.sessions.runs import Run

if TYPE_CHECKING:
    from service.sessions.pushes import Position
    from service.sessions.session import Session

FORMAT = 2
HEADER_BYTES = 100_000_000
"""The format's own limit."""
LEDGER = "ledger"
_ALLOWED = (*DTYPES, "U8")
Bytes = bytes | memoryview


class Facts(NamedTuple):
    """Everything about a session that is no array.

    Attributes:
        format: Of the image.
        kernel_rev: Of the kernels that made the arrays.
        incarnation: Of the session.
        created_at: Seconds since 1970.
        made_at: Of the image, likewise.
        spec: What holds now, as it was stated.
        created_with: What a creation must state to attach.
        added: Groups that came later, by name, as they were stated.
        revision: Of the specification.
        epoch: At the moment of the image.
        version: Likewise.
        step: Likewise.
        rule: Of the session; of all groups, in order, where they have others.
        layout: Name, dtype as uploaded, shape and group of each tensor; None without parameters.
        counts: Updates of each tensor, in layout order.
        scalars: Of each tensor's rule, in layout order.
        members: Who takes part, and the names of all that ever did.
        rounds: How many are over, and the last of them.
    """

    format: int
    kernel_rev: str
    incarnation: str
    created_at: float
    made_at: float
    spec: dict[str, Any]
    created_with: dict[str, Any]
    added: dict[str, dict[str, Any]]
    revision: int
    epoch: int
    version: int
    step: int
    rule: str
    layout: list[tuple[str, str, list[int], int]] | None
    counts: list[int]
    scalars: list[list[float]]
    members: tuple[Sequence[Sequence[Any]], Sequence[str]] = ((), ())
    rounds: tuple[int, Sequence[Sequence[Any]]] = (0, ())


@dataclass(frozen=True)
class Standing:
    """A session at one moment, or as it will be once a change is durable.

    Attributes:
        spec: What holds then.
        added: Groups that came later.
        revision: Of the specification.
        at: Epoch, version and step.
        arena: The arrays; None without parameters.
        flat: The parameters, which may not be published yet.
        state: Arrays that replace the arena's own, in the order of its pieces; None: none do.
        runs: Of each entry, in place of the arena's own.
        cut: Why the open round is abandoned in it; None: what the image shows is before that round.
    """

    spec: Spec
    added: Mapping[str, Group]
    revision: int
    at: "Position"
    arena: Arena | None
    flat: Array | None
    state: Sequence[Array] | None = None
    runs: Sequence[Run] | None = None
    cut: str | None = None

    @classmethod
    def of(cls, session: "Session") -> "Standing":
        """What holds now; in the lane."""
        arena = session.arena
        flat = None if arena is None else arena.versions.head.flat
        return cls(session.spec, session.added, session.revision, session.at, arena, flat)


@dataclass(frozen=True)
class Image:
    """A header, the arrays that follow it, and the ledger if there is one."""

    facts: Facts
    rows: Sequence[tuple[str, str, tuple[int, ...]]]
    arrays: tuple[Array, ...]
    contents: Contents | None

    def chunks(self) -> Iterator[Bytes]:
        """The bytes of the file, in order."""
        ledger = b"" if self.contents is None else pack_ledger(self.contents)
        rows = list(self.rows)
        if self.contents is not None:
            rows.append((LEDGER, "U8", (len(ledger),)))
        facts = {"gradpost": json.dumps(self.facts._asdict(), separators=(",", ":"))}
        yield build_header(rows, facts, HEADER_BYTES)
        for array in self.arrays:
            yield array.view(np.uint8).data
        yield ledger


def of(session: "Session", standing: Standing, *, ledger: bool = True) -> Image:
    """The image of a session. Its arrays are the session's own: write it before they change.

    Args:
        session: In whose lane this runs.
        standing: What the image shows.
        ledger: Whether it holds the pushes that were admitted.
    """
    arena, spec = standing.arena, standing.spec
    runs = standing.runs
    if runs is None:
        runs = [] if arena is None else by_entry(arena)
    entries = () if arena is None else arena.layout.entries
    facts = Facts(
        format=FORMAT,
        kernel_rev=kernel_rev(spec),
        incarnation=session.incarnation,
        created_at=session.created_at,
        made_at=time.time(),
        spec=stated(spec),
        created_with=stated(session.created_with),
        added={name: stated(group) for name, group in standing.added.items()},
        revision=standing.revision,
        epoch=standing.at.epoch,
        version=standing.at.version,
        step=standing.at.step,
        rule=rule_of(spec),
        layout=None if arena is None else [(e.name, e.dtype, list(e.shape), e.group)
                                           for e in entries],
        counts=[run.updates for run in runs],
        scalars=[list(run.scalars) for run in runs],
        members=session.members.kept(),
        rounds=_rounds(session, standing),
    )  # fmt: skip
    contents = session.ledger.contents(standing.cut) if ledger else None
    if arena is None or standing.flat is None:
        return Image(facts, (), (), contents)
    whole = arrays(arena, standing.flat)
    if standing.state is not None:
        whole = (standing.flat, *standing.state)
    return Image(facts, rows(arena, spec.dtype), whole, contents)


def _rounds(session: "Session", standing: Standing) -> tuple[int, Sequence[Sequence[Any]]]:
    """The rounds that are over in an image."""
    closed = session.rounds.kept()
    if standing.cut is not None and (found := session.rounds.open) is not None:
        ended = found.ended("abandoned", standing.cut, standing.at.numbers, time.time())
        closed.append(ended._replace(members=None))
    count = closed[-1].number if closed else session.rounds.count
    return count, closed


def rules(spec: Spec) -> list[str]:
    """The rules that a session runs, in the order of its groups."""
    return list(dict.fromkeys(one.optimizer.rule for one in terms(spec)))


def rule_of(spec: Spec) -> str:
    """The rule of a session; where groups have others, all of them."""
    return "+".join(rules(spec))


def kernel_rev(spec: Spec) -> str:
    """Of the kernels that a session runs."""
    names = rules(spec)
    if spec.update.mode == "sync":
        names.append("robust" if spec.update.reduce in ROBUST else "accumulate")
    return revision.of(names)


def stated(model: Spec | Group) -> dict[str, Any]:
    """What was stated, and nothing that a default gave."""
    return model.model_dump(mode="json", exclude_unset=True)


def rows(arena: Arena, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of all tensors of an image, in the order of `arrays`."""
    params = [(f"params/{entry.name}", dtype, entry.shape) for entry in arena.layout.entries]
    return params + [
        (f"{piece.slot}/{piece.entry.name}", dtype, piece.shape) for piece in arena.pieces()
    ]


def arrays(arena: Arena, flat: Array) -> tuple[Array, ...]:
    """The arrays that hold those tensors end to end."""
    average = () if arena.average is None else (arena.average,)
    return (flat, *arena.state, *average)


# Copies, so that a session goes on while its image is written


def buffers(like: Sequence[Array]) -> list[Array]:
    """Arrays of these sizes whose pages are there.

    A page that the system has yet to give costs a copy more than the copying: 44 ms against 246 at
    10 M parameters.
    """
    found = [np.empty_like(array) for array in like]
    for array in found:
        array.view(np.uint8)[::4096] = 0
    return found


def copied(image: Image, into: Sequence[Array]) -> Program[Image]:
    """The image with arrays that nobody else writes."""
    thunks = [
        partial(np.copyto, to[lo:hi], source[lo:hi])
        for to, source in zip(into, image.arrays, strict=True)
        for lo, hi in cpu.chunks(0, source.size)
    ]
    yield thunks
    return Image(image.facts, image.rows, tuple(into), image.contents)


# Back from a file


class Loaded(NamedTuple):
    """A session's facts with what its specification means, and where the arrays lie."""

    facts: Facts
    spec: Spec
    created_with: Spec
    added: dict[str, Group]
    header: Header
    path: Path


def read(path: Path) -> Loaded:
    """Reads the header of an image.

    Raises:
        ValueError: It is none of ours, or of a newer format.
        ServiceError: Its specification is none that this version knows.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError("the header is longer than the format allows")
        header = parse_header(file.read(length), path.stat().st_size, _ALLOWED)
    found = json.loads(header.metadata["gradpost"])
    if found["format"] > FORMAT:
        raise ValueError(f"its format is {found['format']} and this version reads {FORMAT}")
    facts = Facts(**found)
    spec, _ = parse_spec(facts.spec)
    created_with, _ = parse_spec(facts.created_with)
    added = {name: parse_group(group) for name, group in facts.added.items()}
    return Loaded(facts, spec, created_with, added, header, path)


def layout_of(facts: Facts) -> Layout:
    """The layout of an image that has parameters."""
    assert facts.layout is not None
    offset, entries = 0, []
    for name, dtype, shape, group in facts.layout:
        size = int(np.prod(shape, dtype=np.int64))
        entries.append(Entry(name, dtype, tuple(shape), offset, size, group))
        offset += size
    return Layout(tuple(entries))


def restore(session: "Session", loaded: Loaded) -> None:
    """Fills a session that nobody uses yet with an image; its position stays as it is.

    Raises:
        ValueError: Header and facts do not fit each other.
        InsufficientMemory: The budget has no room.
    """
    facts = loaded.facts
    session.created_with, session.added = loaded.created_with, dict(loaded.added)
    session.revision, session.created_at = facts.revision, facts.created_at
    session.incarnation = facts.incarnation
    with loaded.path.open("rb") as file:
        file.seek(loaded.header.data_offset)
        if facts.layout is not None:
            arena, flat = _arena(session, facts, loaded.header)
            session.arena = arena  # whoever gives the session up gives its bytes back
            for array in arrays(arena, flat):
                if file.readinto(array.view(np.uint8).data) != array.nbytes:
                    raise ValueError("the file is shorter than its header says")
            arena.versions.publish(*session.at, flat)
        session.ledger.restore(unpack_ledger(file.read(), rounds=facts.format > 1))
    rows, ever = facts.members
    session.members.restore([Kept(*row) for row in rows], ever)
    count, closed = facts.rounds
    session.rounds.restore(count, [closed_of(row) for row in closed])


def _arena(session: "Session", facts: Facts, header: Header) -> tuple[Arena, Array]:
    """The arrays of an image, not filled yet."""
    spec, shared = session.spec, session.shared
    layout = layout_of(facts)
    arena = make(
        layout, terms(spec), spec.dtype, average=spec.ema is not None, settings=shared.settings,
        budget=shared.budget, copied=spec.durability != "none", rounds=spec.update,
    )  # fmt: skip
    try:
        found = [(one.name, one.dtype, one.shape) for one in header.tensors if one.name != LEDGER]
        if found != rows(arena, spec.dtype):
            raise ValueError("the tensors are not those of the layout")
        scalars = [tuple(one) for one in facts.scalars]
        for group in arena.groups:
            group.runs = stretches.of(group.span, layout.entries, facts.counts, scalars)
        return arena, arena.versions.fresh()
    except BaseException:
        shared.budget.release(arena.reserved)
        raise
