"""`python -m service backup` and `forget`: what is done to a data folder that no server holds."""

import sys
from pathlib import Path

from service.storage import backup as copying
from service.storage import check
from service.storage.ballast import Ballast
from service.storage.failures import CopyFailed, Damaged, NoSpace, Refused, StorageFailure
from service.storage.files import Files, Sync
from service.storage.index import ALIVE, Index, Rows, SessionRow, sift
from service.storage.journal import tombstone
from service.storage.lock import (
    BALLAST,
    CHECKPOINTS,
    FORMAT_FILE,
    INDEX,
    ORPHANS,
    SESSIONS,
    check_format,
    held,
    make_folders,
    make_free,
)
from service.storage.recovery import CREATING, Pending, examine, folder_of, survey, vacant

DONE, IMPERFECT, NOTHING = 0, 1, 2
LATER = 1000
"""Epochs between the one in a row and that of its tombstone: above all that there ever was."""
UNKNOWN = 1 << 20
"""The epoch of a tombstone whose session's row can't be read."""


# Backup


def backup(path: Path, to: Path, files: Files | None = None) -> int:
    """Copies a data folder byte for byte, checks the copy, and prints what is not well in it.

    Args:
        path: The folder; nothing in it changes.
        to: What is to be made.
        files: The calls; tests pass others.

    Returns:
        0 if it is made and all is well; 1 if it is made and something in it needs attention, as it
        does in the data folder; 2 if it is not made.
    """
    files = files or Files()
    try:
        with held(path):
            check_format(path)
            with copying.making(files.calls, path, to) as target:
                _copy(target, path)
                findings = list(check.findings_of(target.path))
    except NoSpace as error:
        print(f"{error}; nothing is left of the backup. Make room there.", file=sys.stderr)
        return NOTHING
    except (Refused, CopyFailed) as error:
        print(error, file=sys.stderr)
        return NOTHING
    attention = [f"{one}" for one in target.unreadable]
    attention += [line for line, well in findings if not well]
    for line in attention:
        print(line)
    print(f"{to} is a backup of {path}: {target.size} bytes were copied and read again.")
    if attention:
        print("What is said above is in it as it is in the data folder: docs/operations.md.")
    return IMPERFECT if attention else DONE


def _copy(target: copying.Target, path: Path) -> None:
    make_folders(target.files, target.path)
    make_free(target.files, target.path)
    for name in (FORMAT_FILE, INDEX, f"{INDEX}-wal"):
        if (path / name).exists():
            target.copy(path / name, target.path)
    for name in (SESSIONS, CHECKPOINTS, ORPHANS):
        if (path / name).is_dir():
            target.tree(path / name, name)


# Forget


def forget(path: Path, session: str, files: Files | None = None) -> int:
    """Gives up a session that recovery refuses: its id is free again, and its files are set aside.

    Args:
        path: The data folder.
        session: Its id, as `check` shows it.
        files: The calls; tests pass others.

    Returns:
        0 if it is done, 2 if not.
    """
    files = files or Files()
    try:
        with held(path):
            check_format(path)
            print(_forget(files, path, session))
    except (Refused, NoSpace, StorageFailure) as error:
        print(error, file=sys.stderr)
        return NOTHING
    return DONE


def _forget(files: Files, path: Path, session: str) -> str:
    if not (path / INDEX).exists():
        raise Refused(f"{path} has no {INDEX}; restore it from a backup.")
    ballast = Ballast(files, path / BALLAST)
    index = ballast.relieve(lambda: Index(files, path / INDEX))
    try:
        row, why = _refused(files, path, index.rows(), session)
        # Set aside before the row says that it is deleted: what is deleted is removed.
        where = ballast.relieve(lambda: _set_aside(files, path, row))
        index.erase(session)
        ballast.relieve(lambda: index.put(row, Sync.INDEX_BURY))
    finally:
        index.close()
    return f"{why}\n{session} is forgotten; {where}. Its id is free, from epoch {row.epoch + 1} on."


def _refused(files: Files, path: Path, rows: Rows, session: str) -> tuple[SessionRow, str]:
    """The tombstone of a session that recovery refuses, and why it does.

    Raises:
        Refused: It does not.
    """
    found = sift(rows)
    known = survey(found)
    why = next((str(one) for one in known.damaged if one.session == session), None)
    row = next((one for one in found.sessions if one.id == session), None)
    if row is None and why is None:
        raise Refused(f"{path} knows no session {session!r}.")
    if row is None:
        return tombstone(session, _uuid(rows, session), UNKNOWN), str(why)
    if row.state != ALIVE:
        raise Refused(f"{session!r} is deleted already; its id is free.")
    if why is None:
        pending = next(one for one in known.sessions if one.row.id == session)
        why = _damage(files, path, pending)
    return tombstone(row.id, row.uuid, row.epoch + LATER), why


def _uuid(rows: Rows, session: str) -> bytes:
    """The incarnation in an unreadable row, if it can be one and is of no other session."""
    uuid = next(values[1] for values in rows.sessions if values[0] == session)
    taken = {row.uuid for row in sift(rows).sessions}
    return uuid if isinstance(uuid, bytes) and len(uuid) == 16 and uuid not in taken else b""


def _damage(files: Files, path: Path, pending: Pending) -> str:
    row, seen = pending
    try:
        ring, _ = examine(files, folder_of(path / SESSIONS, row), row, seen, writable=False)
    except Damaged as damage:
        return f"{row.id}: {damage.what} ({damage.where})"
    if ring is not None:
        ring.retire()
    raise Refused(
        f"{row.id!r} is not damaged, as far as the storage can tell: a server takes it up. Start "
        "one, and delete it there if nobody wants it."
    )


def _set_aside(files: Files, path: Path, row: SessionRow) -> str:
    """Moves the folder of a session to the orphans, durably; says where it is."""
    names = (row.uuid.hex(), f"{row.uuid.hex()}{CREATING}") if row.uuid else ()
    folder = next(
        (path / SESSIONS / one for one in names if (path / SESSIONS / one).exists()), None
    )
    if folder is None:
        return "it has no folder, or the next start sets that aside"
    files.make_folder(path / ORPHANS)
    target = vacant(path / ORPHANS, row.uuid.hex())
    files.rename(folder, target)
    files.fsync_folder(path / ORPHANS, Sync.FORGET_ORPHANS)
    files.fsync_folder(path / SESSIONS, Sync.FORGET_SESSIONS)
    return f"its files are in {ORPHANS}/{target.name}"
