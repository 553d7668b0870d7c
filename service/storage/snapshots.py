"""Snapshots of one session: whole files that a durable row of the index names.

`spare` is a file whose blocks are reserved. A snapshot is written into it, synced and renamed to
`snap-<number>`, and counts once the index names it; the one before it then becomes the spare. So
two snapshots have room from the day a session is made, and a full disk can't stop the third.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

from service.storage.failures import Damaged, NoSpace
from service.storage.files import Bytes, Files, Pace, Sync

SPARE = "spare"
SLICE = 1 << 20


class Written(NamedTuple):
    """A durable snapshot that nothing names yet."""

    name: str
    size: int
    digest: bytes


def reserve(files: Files, folder: Path, size: int) -> None:
    """Makes the spare, or makes it larger.

    Raises:
        NoSpace: The disk can't hold it.
    """
    with files.created(folder / SPARE) as fd:
        if size:
            files.allocate(fd, size, "reserving room for a snapshot")


def write(files: Files, folder: Path, number: int, chunks: Iterable[Bytes]) -> Written:
    """Writes a snapshot of everything up to a record, durable with its name.

    Raises:
        NoSpace: The disk is full; the snapshot before it stands.
        StorageFailure: A write or a sync failed.
    """
    name = f"snap-{number}"
    hasher = xxhash.xxh3_128()
    size = 0
    with files.created(folder / SPARE) as fd:
        pace = Pace(files, fd, Sync.SNAPSHOT)
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            for at in range(0, len(data), SLICE):
                part = data[at : at + SLICE]
                hasher.update(part)
                files.write(fd, part, size, f"writing {name}")
                size += len(part)
                pace.wrote(len(part))
        files.truncate(fd, size, f"writing {name}")
        files.fsync(fd, Sync.SNAPSHOT)
    files.rename(folder / SPARE, folder / name)
    files.fsync_folder(folder, Sync.SNAPSHOT_FOLDER)
    return Written(name, size, hasher.digest())


def recycle(files: Files, folder: Path, name: str, reserved: int) -> None:
    """Makes a snapshot that no row names the spare again.

    On a full disk it keeps the blocks that it has, or its name, which recovery then removes.
    """
    with contextlib.suppress(NoSpace):
        files.rename(folder / name, folder / SPARE)
        reserve(files, folder, reserved)


def verify(files: Files, path: Path, size: int, digest: bytes) -> None:
    """Reads a snapshot and compares it with what its row says.

    Raises:
        Damaged: It is missing, of another size, or other bytes.
        OSError: The disk can't read it.
    """
    try:
        read, found = digest_of(files, path)
    except FileNotFoundError:
        raise Damaged("the snapshot that the index names is missing", path.name) from None
    if read != size:
        raise Damaged(f"the snapshot has {read} bytes and had {size}", path.name)
    if found != digest:
        raise Damaged("the snapshot is not what was written", path.name)


def digest_of(files: Files, path: Path) -> tuple[int, bytes]:
    """The size and the xxh3_128 of a file.

    Raises:
        OSError: It is missing, or the disk can't read it.
    """
    hasher = xxhash.xxh3_128()
    read = 0
    fd = files.open_to_read(path)
    try:
        while part := files.read(fd, SLICE, read):
            hasher.update(part)
            read += len(part)
    finally:
        files.calls.close(fd)
    return read, hasher.digest()
