"""Checkpoints: a session's parameters and state as one file, made beside the steps."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradpost.protocol.dtypes import NUMPY
from gradpost.protocol.tensors import HeaderError, parse_header
from service.errors import (
    CheckpointExists,
    CheckpointUnknown,
    DataDirMissing,
    InvalidTensors,
    Overloaded,
    SessionDamaged,
)
from service.schemas.refusals import invalid
from service.sessions import image, state
from service.sessions.arena import Arena, Tensor
from service.sessions.disk import Disk
from service.sessions.image import Image, Standing
from service.sessions.lane import Program
from service.sessions.session import Base, Session, gone
from service.storage.checkpoints import Checkpoint, owner_of
from service.storage.failures import Damaged, Overtaken

PARAMS = "params/"


class Contents(NamedTuple):
    """What a checkpoint holds, as its bytes say; nothing of it is checked against a session.

    Attributes:
        params: Without their prefix.
        state: Named <slot>/<tensor>.
        step: Updates of the session.
        rule: As `image.rule_of` has it.
        counts: Updates of each tensor.
        scalars: Of each tensor's rule, in its order.
    """

    params: list[Tensor]
    state: list[Tensor]
    step: int
    rule: str
    counts: dict[str, int]
    scalars: dict[str, list[float]]


def disk_of(session: Session) -> Disk:
    """The server's data folder.

    Raises:
        DataDirMissing: There is none.
    """
    disk = session.shared.disk
    if disk is None:
        raise DataDirMissing(
            "Checkpoints are files and the server has no folder for them; start it with "
            "GRADPOST_DATA_DIR, or save GET params and GET state yourself."
        )
    return disk


async def make(session: Session, name: str | None) -> tuple[Checkpoint, bool]:
    """Makes a checkpoint; steps wait for no longer than a copy takes.

    Args:
        session: What to save.
        name: Free, or None for one that tells epoch, version and step.

    Returns:
        The checkpoint, and whether it is new: a name that tells its version is made once.

    Raises:
        CheckpointExists: The name is taken.
        Overloaded: There is no memory for the copy.
        DiskFull: There is no room; nothing was made.
    """
    disk = disk_of(session)
    arena = session.ready
    if name is not None and disk.store.checkpoints.find(owner_of(session.id), name) is not None:
        raise CheckpointExists(
            f"Session {session.id!r} has a checkpoint {name!r} already; take another name, or "
            "delete it.",
            checkpoint=name,
        )
    if name is not None:
        _begin(session, name)
    try:
        return await _make(session, disk, arena, name)
    finally:
        session.making.discard(name or "")


def _begin(session: Session, name: str) -> None:
    """Takes a name for a checkpoint that is being made."""
    if name in session.making:
        raise CheckpointExists(
            f"A checkpoint {name!r} of session {session.id!r} is being made; take another name.",
            checkpoint=name,
        )
    session.making.add(name)


async def _make(
    session: Session, disk: Disk, arena: Arena, name: str | None
) -> tuple[Checkpoint, bool]:
    like = image.arrays(arena, arena.versions.head.flat)
    nbytes = sum(array.nbytes for array in like)
    if not session.shared.budget.try_reserve(nbytes):
        raise Overloaded(
            f"No memory for a copy of {nbytes} bytes now; ask again after the pause.",
            retry_after_s=1,
            bytes=nbytes,
        )
    try:
        into = await disk.run(partial(image.buffers, like))
        made: Image = await session.lane.run(_copy(session, into))
        if name is None:
            facts = made.facts
            # The incarnation: a session that begins anew comes to the same step and version.
            name = (
                f"step-{facts.step}-version-{facts.epoch}-{facts.version}-{facts.incarnation[:8]}"
            )
            found = disk.store.checkpoints.find(owner_of(session.id), name)
            if found is not None:
                return found, False
        write = partial(disk.store.checkpoints.write, owner_of(session.id), name, made.chunks())
        return await disk.run(write), True
    except Overtaken:
        raise gone(session.id) from None
    finally:
        session.shared.budget.release(nbytes)


def _copy(session: Session, into: list[Any]) -> Program[Image]:
    session.ready  # noqa: B018 - refuses a session that was deleted meanwhile
    made = image.of(session, Standing.of(session), ledger=False)
    if [array.size for array in made.arrays] != [array.size for array in into]:
        raise Overloaded("A group was added meanwhile; send the same request again.")
    return (yield from image.copied(made, into))


def find(session: Session, name: str) -> Checkpoint:
    """One of a session's checkpoints.

    Raises:
        CheckpointUnknown: There is none of this name.
    """
    found = disk_of(session).store.checkpoints.find(owner_of(session.id), name)
    if found is None:
        raise CheckpointUnknown(
            f"Session {session.id!r} has no checkpoint {name[:128]!r}; GET its checkpoints lists "
            "them.",
            checkpoint=name[:128],
        )
    return found


async def verified(session: Session, name: str) -> tuple[Checkpoint, Path]:
    """A checkpoint whose bytes are those that were written, and where it lies.

    Raises:
        CheckpointUnknown: There is none of this name.
        SessionDamaged: They are not.
    """
    disk, found = disk_of(session), find(session, name)
    try:
        await disk.run(partial(disk.store.checkpoints.verify, found))
    except Damaged as error:
        find(session, name)  # deleted meanwhile: that is no damage
        raise SessionDamaged(
            f"Checkpoint {name!r} is not what was written: {error.what} ({error.where}); take "
            "another one.",
            session=session.id,
            what=error.what,
            where=error.where,
        ) from error
    return found, disk.store.checkpoints.open(found)


async def restore(
    session: Session, contents: Contents, scope: str, base: Base | None, *, first_only: bool
) -> None:
    """Takes parameters, or parameters and state, from a checkpoint; begins an epoch.

    Raises:
        PreconditionFailed: `first_only` and there are parameters, or another version than `base`.
        TensorMismatch: The checkpoint has not what the scope needs, or other tensors.
        Nonfinite: A value that no state may have.
    """
    if scope == "params":
        await session.load(contents.params, first_only=first_only, base=base)
    else:
        await session.lane.run(state.restore(session, contents, base, first_only=first_only))


def parse(tensors: list[Tensor], facts: Mapping[str, Any], scope: str) -> Contents:
    """Sorts the tensors of a checkpoint; of the facts only those that a full restore needs.

    Raises:
        InvalidRequest: The facts are not those of a checkpoint.
    """
    params = [
        (name.removeprefix(PARAMS), dtype, shape, flat)
        for name, dtype, shape, flat in tensors
        if name.startswith(PARAMS)
    ]
    others = [one for one in tensors if not one[0].startswith(PARAMS) and one[0] != image.LEDGER]
    if scope == "params":
        return Contents(params, [], 0, "", {}, {})
    try:
        found = json.loads(facts["gradpost"])
        names = [str(row[0]) for row in found["layout"]]
        counts = [_count(value) for value in found["counts"]]
        scalars = [[float(value) for value in row] for row in found["scalars"]]
        return Contents(
            params, others, _count(found["step"]), str(found["rule"]),
            dict(zip(names, counts, strict=True)), dict(zip(names, scalars, strict=True)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, OverflowError):
        raise invalid(
            "gradpost",
            "The metadata is not that of a checkpoint; send a file that GET checkpoints gave, or "
            "restore its params only.",
        ) from None


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError("no count")
    return value


def read(path: Path) -> tuple[list[Tensor], Mapping[str, str]]:
    """The tensors and the metadata of a checkpoint's file.

    Raises:
        InvalidTensors: It is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = parse_header(file.read(length), path.stat().st_size)
        except HeaderError as error:
            raise InvalidTensors(str(error)) from None
        data = np.fromfile(file, np.uint8, header.data_bytes)
    tensors: list[Tensor] = [
        (one.name, one.dtype, one.shape, data[one.begin : one.end].view(NUMPY[one.dtype]))
        for one in header.tensors
    ]
    return tensors, header.metadata
