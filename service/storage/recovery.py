"""Finds out what a data folder holds, session by session.

Each session is its named snapshot and the records behind it, in contiguous order. Complete records
whose row is missing are rolled forward; the first absent or torn one ends the walk. It may have
been in flight when the process or the machine stopped, and then nobody was told that it exists.
But if a row has seen it or a later one, or a later header says that it had been synced, then it
was acknowledged and is damaged: the session is refused and left as it is.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from service.storage import snapshots
from service.storage.ballast import Ballast
from service.storage.checkpoints import is_session, newest, owner_of, read_folder
from service.storage.failures import Damage, Damaged, NoSpace
from service.storage.files import Files
from service.storage.header import Header, Page
from service.storage.index import ALIVE, Found, Index, RecordRow, SessionRow
from service.storage.journal import Journal, record_row
from service.storage.lock import CHECKPOINTS, INDEX, ORPHANS, SESSIONS
from service.storage.ring import Ring

CREATING = ".creating"


class Record(NamedTuple):
    """One record behind the snapshot, to be applied again."""

    header: Header
    place: int
    ring: Ring

    def payload(self) -> bytes:
        """Its bytes, as they were sealed."""
        return self.ring.payload(self.place, self.header)


class Walk(NamedTuple):
    """What a ring holds behind a snapshot.

    Attributes:
        records: In order, whole, without gaps.
        leftovers: Places of records that were given up.
        notes: What was found that is no damage.
    """

    records: list[Record]
    leftovers: list[int]
    notes: list[str]


class Recovered(NamedTuple):
    """A session that can go on: load the snapshot, apply the records, then use the journal."""

    row: SessionRow
    snapshot: Path
    records: list[Record]
    journal: Journal
    notes: list[str]


class Pending(NamedTuple):
    """A session that nobody has looked at yet, beyond its rows."""

    row: SessionRow
    seen: list[RecordRow]


class Recovery(NamedTuple):
    """What a data folder holds, by its index.

    Attributes:
        pending: Sessions to be taken up, one by one.
        damaged: By id, those whose own rows are damaged; nothing of them was touched.
        tombstones: The last epoch of each deleted id.
        orphans: Folders that no row knows, by name; now in `orphans/`.
        notes: What else was found.
    """

    pending: list[Pending]
    damaged: dict[str, Damage]
    tombstones: dict[str, int]
    orphans: list[str]
    notes: list[str]


# One session, only read


def examine(
    files: Files, folder: Path, row: SessionRow, seen: Iterable[RecordRow], *, writable: bool
) -> tuple[Ring | None, Walk]:
    """Checks a session's snapshot and walks its ring.

    Args:
        files: The calls.
        folder: Of the session.
        row: Of the session.
        seen: Its record rows.
        writable: Open the ring to be resumed.

    Raises:
        Damaged: What was acknowledged is missing or unreadable.
    """
    try:
        snapshots.verify(files, folder / row.snapshot, row.size, row.digest)
        if not row.ring:
            return None, Walk([], [], [])
        ring = Ring.open(files, folder / row.ring, row.uuid, writable=writable)
    except FileNotFoundError:
        raise Damaged("the ring that the index names is missing", row.ring) from None
    except OSError as error:
        raise Damaged(f"the disk can't read it: {error.strerror}", folder.name) from error
    try:
        return ring, walk(ring, row, {one.number: one for one in seen if one.number > row.number})
    except OSError as error:
        ring.retire()
        raise Damaged(f"the disk can't read it: {error.strerror}", row.ring) from error
    except BaseException:
        ring.retire()
        raise


def walk(ring: Ring, row: SessionRow, seen: Mapping[int, RecordRow]) -> Walk:
    """The records of a ring behind a snapshot.

    Args:
        ring: Open.
        row: Of the session.
        seen: The rows of later records than the snapshot's, by number.

    Raises:
        Damaged: A record that was acknowledged is missing or torn.
    """
    later, torn = _later(ring, row)
    records: list[Record] = []
    number = row.number + 1
    while number in later and ring.is_whole(*later[number]):
        place, header = later.pop(number)
        if number in seen and seen[number] != record_row(place, header):
            raise Damaged(
                f"record {number} is not the one that the index has seen", _at(row, place)
            )
        records.append(Record(header, place, ring))
        number += 1
    _check_end(row, number, later, seen, torn)
    notes = [
        f"{_at(row, place)} is unreadable: torn while it was written, or damaged after a snapshot "
        "held its record"
        for place in torn
    ] + [
        f"record {left} in {_at(row, place)} was never acknowledged and is dropped"
        for left, (place, _) in sorted(later.items())
    ]
    return Walk(records, [place for place, _ in later.values()], notes)


def _later(ring: Ring, row: SessionRow) -> tuple[dict[int, tuple[int, Header]], list[int]]:
    """The headers behind the snapshot, by number, and the places that can't be read."""
    later: dict[int, tuple[int, Header]] = {}
    torn: list[int] = []
    for place, header in ring.headers():
        if header is Page.TORN:
            torn.append(place)
        elif isinstance(header, Page):
            if header is not Page.BLANK:
                raise Damaged(f"a record {header.value}", _at(row, place))
        elif header.session != row.uuid:
            raise Damaged("a record belongs to another session", _at(row, place))
        elif header.number in later:
            raise Damaged(f"record {header.number} is there twice", _at(row, place))
        elif header.number > row.number:  # else of an earlier lap: the snapshot holds it
            later[header.number] = place, header
    return later, torn


def _check_end(
    row: SessionRow,
    hole: int,
    later: Mapping[int, tuple[int, Header]],
    seen: Mapping[int, RecordRow],
    torn: list[int],
) -> None:
    """Decides whether the first absent record is the end of the log or damage.

    Raises:
        Damaged: It had been durable.
    """
    place = later[hole][0] if hole in later else None
    what = f"record {hole} is " + ("missing" if place is None else "torn")
    where = row.ring if place is None else _at(row, place)
    if place is None and torn:
        where = "unreadable: " + ", ".join(_at(row, one) for one in torn)
    witnessed = max(seen, default=0)
    if witnessed >= hole:
        raise Damaged(f"{what} and the index has seen record {witnessed}", where)
    for number, (_, header) in sorted(later.items()):
        if header.synced >= hole:
            raise Damaged(f"{what} and record {number} was written after it was durable", where)


def _at(row: SessionRow, place: int) -> str:
    return f"{row.ring}, place {place}"


# All sessions


class Survey(NamedTuple):
    """What the index says, sorted by session.

    Attributes:
        sessions: Rows of living sessions, each with its record rows.
        damaged: Sessions whose own rows are damaged.
        notes: Rows that belong to no session.
    """

    sessions: list[Pending]
    damaged: list[Damage]
    notes: list[str]


class Fate(Enum):
    """What becomes of an entry of the sessions folder that does not have its final name."""

    FINISH = "a creation that the index has committed"
    REMOVE = "left of an unfinished creation or of a deletion"
    ORPHAN = "known to no row of the index"


def survey(found: Found) -> Survey:
    """Sorts the rows of an index by session."""
    records: dict[object, list[RecordRow]] = {
        row.uuid: [] for row in found.sessions if row.state == ALIVE
    }
    notes = []
    for one in found.records:
        if one.uuid in records:
            records[one.uuid].append(one)
        else:
            notes.append(f"a row of the unknown session {one.uuid.hex()}")
    notes += [
        f"a damaged row of the unknown session {one!r}"
        for one in found.bad_records
        if one not in records
    ]
    sessions = []
    damaged = [Damage(f"{one}", "its row is damaged", INDEX) for one in found.bad_sessions]
    for row in found.sessions:
        if row.state == ALIVE and row.uuid in found.bad_records:
            damaged.append(Damage(row.id, "a record row of it is damaged", INDEX))
        elif row.state == ALIVE:
            sessions.append(Pending(row, records[row.uuid]))
    return Survey(sessions, damaged, notes)


def strays(sessions: Path, rows: Iterable[SessionRow]) -> list[tuple[Path, Fate]]:
    """What lies in the sessions folder beside the folders of living sessions."""
    states = {row.uuid.hex(): row.state for row in rows}
    found = []
    for entry in sorted(sessions.iterdir()):
        name = entry.name.removesuffix(CREATING)
        state = states.get(name)
        if state == ALIVE and entry.name != name:
            found.append((entry, Fate.FINISH))
        elif state != ALIVE and entry.is_dir() and (state is not None or entry.name != name):
            found.append((entry, Fate.REMOVE))
        elif state != ALIVE:
            found.append((entry, Fate.ORPHAN))
    return found


def strangers(checkpoints: Path, rows: Iterable[SessionRow]) -> list[tuple[Path, str]]:
    """What lies beside the checkpoints of living sessions; it is never removed.

    A session without files of its own is in no index: after a restart its checkpoints are here.
    """
    alive = {owner_of(row.id).hex() for row in rows if row.state == ALIVE}
    found = []
    for folder in sorted(checkpoints.iterdir()):
        if not is_session(folder.name):
            found.append((folder, "belongs to nobody; move it away"))
        elif folder.name not in alive:
            count = len(newest(read_folder(folder)))
            what = "of a session that is gone; remove the folder if nobody wants them"
            found.append((folder, f"{count} checkpoints {what}"))
    return found


def folder_of(sessions: Path, row: SessionRow) -> Path:
    """The folder of a session, also while its creation is unfinished.

    Raises:
        Damaged: There is none.
    """
    folder = sessions / row.uuid.hex()
    for path in (folder, folder.with_name(f"{folder.name}{CREATING}")):
        if path.is_dir():
            return path
    raise Damaged("its folder is missing", folder.name)


def begin(files: Files, path: Path, index: Index) -> Recovery:
    """Reads the index and tidies the folder; no session is looked at yet.

    Raises:
        Refused: The index is damaged.
        StorageFailure: Something can't be written.
    """
    found = index.read()
    known = survey(found)
    orphans: list[str] = []
    if not found.bad_sessions:  # else whose folder is whose can't be told
        orphans = _tidy(files, path, found.sessions)
    damaged = {damage.session: damage for damage in known.damaged}
    tombstones = {row.id: row.epoch for row in found.sessions if row.state != ALIVE}
    notes = known.notes + [
        f"{CHECKPOINTS}/{folder.name}: {what}"
        for folder, what in strangers(path / CHECKPOINTS, found.sessions)
    ]
    return Recovery(known.sessions, damaged, tombstones, orphans, notes)


def take_up(
    files: Files, path: Path, index: Index, ballast: Ballast, pending: Pending
) -> Recovered:
    """One session, ready to go on. Sessions may be taken up beside each other.

    Raises:
        Damaged: What was acknowledged is missing or unreadable; nothing was touched.
        StorageFailure: Something can't be written.
    """
    row = pending.row
    folder = folder_of(path / SESSIONS, row)
    ring, found = examine(files, folder, row, pending.seen, writable=True)
    notes = list(found.notes)
    for entry in sorted(folder.iterdir()):
        if entry.name not in (row.snapshot, row.ring, snapshots.SPARE):
            files.unlink(entry)
    try:
        snapshots.reserve(files, folder, row.reserved)
    except NoSpace as error:
        notes.append(f"the next snapshot may find no room ({error})")
    if ring is not None:
        try:
            ring.reserve_blocks()
        except NoSpace as error:
            notes.append(f"a record may find no room ({error}), which would end the server")
        live = {record.place: record.header.number for record in found.records}
        ring.resume(row.number + len(found.records), live, found.leftovers)
        index.note(record_row(record.place, record.header) for record in found.records)
    journal = Journal(files, folder, index, row, ring, ballast)
    return Recovered(row, folder / row.snapshot, found.records, journal, notes)


def _tidy(files: Files, path: Path, rows: Iterable[SessionRow]) -> list[str]:
    """Finishes or undoes what a crash cut short, and quarantines what no row knows."""
    orphans = []
    for entry, fate in strays(path / SESSIONS, rows):
        if fate is Fate.FINISH:
            files.rename(entry, entry.with_name(entry.name.removesuffix(CREATING)))
        elif fate is Fate.REMOVE:
            files.remove_folder(entry)
        else:
            files.rename(entry, vacant(path / ORPHANS, entry.name))
            orphans.append(entry.name)
    return orphans


def vacant(folder: Path, name: str) -> Path:
    """A path in a folder that nothing has yet."""
    path, count = folder / name, 1
    while path.exists():
        path, count = folder / f"{name}-{count}", count + 1
    return path
