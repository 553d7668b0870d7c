"""`python -m service check`: says in words whether a data folder keeps its promises. Read-only."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from service.storage.checkpoints import (
    Checkpoint,
    Checkpoints,
    is_draft,
    is_session,
    newest,
    owner_of,
    read_folder,
)
from service.storage.failures import Damage, Damaged, Refused
from service.storage.files import Files
from service.storage.index import ALIVE, Found, Index, RecordRow, SessionRow
from service.storage.lock import CHECKPOINTS, INDEX, ORPHANS, SESSIONS, check_format, held
from service.storage.recovery import Fate, examine, folder_of, strangers, strays, survey

Finding = tuple[str, bool]
"""A sentence, and whether all is well with what it says."""

CLEAN, DAMAGED, UNREADABLE = 0, 1, 2


def run(path: Path, session: str | None = None) -> int:
    """Checks a data folder that no server holds, and prints what it finds.

    Args:
        path: The folder; nothing in it changes.
        session: Only this one.

    Returns:
        0 if all is well, 1 if anything that was acknowledged is damaged or belongs to nobody, 2 if
        the folder can't be checked: it is in use, newer, no data folder, or its index is damaged.
    """
    try:
        with held(path):
            check_format(path)
            findings = list(findings_of(path, session))
    except (Refused, OSError) as error:
        print(error, file=sys.stderr)
        return UNREADABLE
    for line, _ in findings:
        print(line)
    bad = sum(not well for _, well in findings)
    print(f"{bad} of {len(findings)} findings need attention." if bad else "All is well.")
    return DAMAGED if bad else CLEAN


def findings_of(path: Path, session: str | None = None) -> Iterator[Finding]:
    """What there is to say of a data folder that somebody else holds for us.

    Raises:
        Refused: Its index can't be read, or knows no such session.
    """
    found = read_index(path)
    ids = [*found.bad_sessions, *(row.id for row in found.sessions)]
    if session is not None and session not in ids:
        raise Refused(f"{path} knows no session {session!r}.")
    known = survey(found)
    for damage in known.damaged:
        if session in (None, damage.session):
            yield str(damage), False
    for row, seen in known.sessions:
        if session in (None, row.id):
            yield from _session(path, row, seen)
    for row in found.sessions:
        if session in (None, row.id):
            yield from _checkpoints(path, owner_of(row.id), row.id)
    if session is None:
        yield from _rest(path, found, known.notes)


def read_index(path: Path) -> Found:
    """What the index says, read from a copy: opening it would move its log into it."""
    if not (path / INDEX).exists():
        raise Refused(f"{path} has no {INDEX}; restore it from a backup.")
    with tempfile.TemporaryDirectory() as scratch:
        for name in (INDEX, f"{INDEX}-wal"):
            if (path / name).exists():
                shutil.copyfile(path / name, Path(scratch, name))
        index = Index(Files(), Path(scratch, INDEX))
        try:
            return index.read()
        finally:
            index.close()


def _session(path: Path, row: SessionRow, seen: list[RecordRow]) -> Iterator[Finding]:
    files = Files()
    try:
        ring, walk = examine(files, folder_of(path / SESSIONS, row), row, seen, writable=False)
    except Damaged as damage:
        yield str(Damage(row.id, damage.what, damage.where)), False
        return
    if ring is not None:
        ring.retire()
    yield f"{row.id}: snapshot of record {row.number}, {len(walk.records)} records after it", True
    for note in walk.notes:
        yield f"{row.id}: {note}", True


def _checkpoints(path: Path, uuid: bytes, whose: str) -> Iterator[Finding]:
    """The checkpoints of a session, and what else lies beside them."""
    checkpoints = Checkpoints(Files(), path / CHECKPOINTS)
    folder = path / CHECKPOINTS / uuid.hex()
    found = sorted(read_folder(folder))
    for one in newest(found):
        yield _checkpoint(checkpoints, one, whose)
    for one in set(found) - set(newest(found)):
        yield f"{whose}: {one.file} is replaced; the next start removes it", True
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_draft(entry.name):
            yield f"{whose}: {entry.name} is left of a checkpoint that was never whole", True
        elif entry.name not in {one.file for one in found}:
            yield f"{CHECKPOINTS}/{folder.name}/{entry.name}: is no checkpoint", False


def _checkpoint(checkpoints: Checkpoints, one: Checkpoint, whose: str) -> Finding:
    try:
        checkpoints.verify(one)
    except Damaged as damage:
        return f"{whose}: checkpoint {one.name}: {damage.what} ({damage.where})", False
    made = datetime.fromtimestamp(one.made_at, UTC)
    return (
        f"{whose}: checkpoint {one.name}, {one.size} bytes, of {made:%Y-%m-%d %H:%M:%S} UTC",
        True,
    )


def _rest(path: Path, found: Found, notes: list[str]) -> Iterator[Finding]:
    """What belongs to no living session."""
    deleted = sum(row.state != ALIVE for row in found.sessions)
    if deleted:
        yield f"{deleted} deleted sessions are remembered", True
    for note in notes:
        yield note, False
    for entry, fate in strays(path / SESSIONS, found.sessions):
        yield f"{SESSIONS}/{entry.name}: {fate.value}", fate is not Fate.ORPHAN
    yield from _strangers(path, found)
    for entry in sorted((path / ORPHANS).iterdir()):
        yield f"{ORPHANS}/{entry.name}: set aside by an earlier recovery", False


def _strangers(path: Path, found: Found) -> Iterator[Finding]:
    """What lies beside the checkpoints of living sessions."""
    root = path / CHECKPOINTS
    known = {owner_of(row.id).hex() for row in found.sessions}
    # An older server has made no such folder.
    for folder, what in strangers(root, found.sessions) if root.is_dir() else ():
        where = f"{CHECKPOINTS}/{folder.name}"
        yield f"{where}: {what}", is_session(folder.name)
        if is_session(folder.name) and folder.name not in known:
            yield from _checkpoints(path, bytes.fromhex(folder.name), where)
