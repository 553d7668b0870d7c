"""One flipped bit in any file: what comes back is right, or somebody is told."""

import shutil
from collections import Counter

from service.storage.failures import Damaged, Refused, StorageFailure
from service.storage.files import Files
from service.storage.store import Store
from tests.storage.counter import GONE, SCALE, Promise, Scratch, Server, resume, seeded, taken_up

FLIPS = 900 * SCALE


def lived_in(path, *, witnessed=True):
    """A data folder with a history, of a process that was killed, after its last flush or not."""
    rng = seeded("flips", path.name)
    server = Server(None, path, Promise(), rng)
    for name in ("a", "b"):
        server.create(name)
        for _ in range(3):
            server.push(name, 2)
        server.snapshot(name)
        server.replace(name)
        server.patch(name)
        server.push(name, 2)
    server.create("c", shape=None)
    server.write_checkpoint(GONE[0], "best", 3000)
    server.create("d")
    server.push("d")
    server.delete("d")
    if witnessed:
        server.store.flush()
    return server


def outcome(path, server):
    """What a recovery says of a folder, and whether it is true of the sessions it gives."""
    try:
        store = Store(path, Files(), ballast=0)
    except (Refused, StorageFailure):
        return "refused"
    try:
        return judged(taken_up(store), server.promise, store.checkpoints)
    except Refused:
        return "refused"
    finally:
        store.close()


def judged(recovery, promise, checkpoints):
    notes = False
    for (whose, name), (content,) in promise.checkpoints.items():
        try:
            checkpoints.verify(found := checkpoints.find(whose, name))
        except Damaged:
            return "damage"
        assert checkpoints.open(found).read_bytes() == content
    for name, found in recovery.sessions.items():
        state, told = resume(found), promise.sessions[name]
        assert state == told.state(state.number), f"{name} is wrong"
        if state.number < told.acknowledged:
            assert found.notes, f"{name} lost something and nobody is told"
        notes |= bool(found.notes)
    if recovery.damaged:
        return "damage"
    if recovery.orphans:
        return "orphans"
    assert set(recovery.sessions) == set(promise.sessions), "a session is lost"
    assert recovery.tombstones == promise.buried, "a tombstone is lost"
    return "note" if notes else "repaired or harmless"


def spoilt(source, path, at, bit, server):
    """The outcome of a copy of a data folder in which one bit of a file is another."""
    with Scratch() as root:
        shutil.copytree(source, root / "data")
        victim = root / "data" / path.relative_to(source)
        data = bytearray(victim.read_bytes())
        data[at] ^= bit
        victim.write_bytes(data)
        try:
            return outcome(root / "data", server)
        except AssertionError as error:
            raise AssertionError(f"bit {bit} of byte {at} of {path.name}: {error}") from None


def places(path, rng, count):
    """Bits of a file: all over it, and half of them where something was written."""
    data = path.read_bytes()
    used = [at for at, byte in enumerate(data) if byte]
    for turn in range(count):
        at = rng.choice(used) if used and turn % 2 else rng.randrange(len(data))
        yield at, 1 << rng.randrange(8)


def test_no_flipped_bit_is_silent(scratch):
    server = lived_in(scratch / "data")
    files = sorted(
        path for path in (scratch / "data").rglob("*") if path.is_file() and path.stat().st_size
    )
    names = {path.name for path in files}
    assert {"index.db", "index.db-wal", "FORMAT", "LOCK", "ring-0", "spare", "ballast"} <= names
    rng, found = seeded("bits"), Counter()
    for path in files:
        for at, bit in places(path, rng, -(-FLIPS // len(files))):
            found[path.name, spoilt(scratch / "data", path, at, bit, server)] += 1
    assert found.total() >= 500
    (checkpoint,) = [name for name in names if name.endswith(".safetensors")]
    assert {"index.db", "FORMAT", "ring-0", "snap-0", checkpoint} <= {
        path for path, what in found if what in ("damage", "refused")
    }
    server.close()


def test_without_witnesses_a_flipped_bit_in_a_record_is_told_too(scratch):
    server = lived_in(scratch / "data", witnessed=False)
    rng, found = seeded("bits without witnesses"), Counter()
    for path in sorted((scratch / "data").rglob("ring-0")):
        for at, bit in places(path, rng, 150):
            found[spoilt(scratch / "data", path, at, bit, server)] += 1
    assert found["note"]
    assert found["damage"]
    server.close()


def test_the_unspoilt_folder_is_well(scratch):
    server = lived_in(scratch / "data")
    shutil.copytree(scratch / "data", scratch / "copy")
    assert outcome(scratch / "copy", server) == "repaired or harmless"
    server.close()
