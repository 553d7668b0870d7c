"""Checkpoints: files that know their digest, durable when they have their name."""

import errno
import os
import threading

import numpy as np
import pytest
import xxhash

from service.storage.checkpoints import Checkpoints, owner_of
from service.storage.failures import Damaged, NoSpace, Overtaken, StorageFailure
from service.storage.files import Calls, Files, Sync
from service.storage.store import Store
from tests.storage.test_store import Full, create

UUID, OTHER = bytes(range(16)), bytes(16)


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def checkpoints(scratch, calls):
    return Checkpoints(Files(calls), scratch)


def names(scratch):
    return sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*"))


def test_a_checkpoint_is_its_chunks_and_knows_its_digest(scratch, checkpoints):
    array = np.arange(5000, dtype=np.float32)
    content = b"head" + array.tobytes() + b"tail"
    made = checkpoints.write(UUID, "best", [b"head", array, memoryview(b"tail")], len(content))
    assert (made.owner, made.name, made.size) == (UUID, "best", len(content))
    assert made.digest == xxhash.xxh3_128_digest(content)
    file = f"{UUID.hex()}/best.{made.digest.hex()}.safetensors"
    assert names(scratch) == [UUID.hex(), file]
    path = checkpoints.open(made)
    assert path == scratch / file
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.made_at == path.stat().st_mtime
    assert checkpoints.find(UUID, "best") == made
    assert checkpoints.list(UUID) == [made]
    checkpoints.verify(made)


def test_they_are_listed_by_age_and_by_session(checkpoints):
    made = [checkpoints.write(UUID, name, [b"x"]) for name in ("c", "a", "b.1")]
    for age, one in enumerate(made):
        os.utime(checkpoints.open(one), (age, age))
    assert [(one.name, one.made_at) for one in checkpoints.list(UUID)] == [
        ("c", 0.0), ("a", 1.0), ("b.1", 2.0),
    ]  # fmt: skip
    assert checkpoints.list(OTHER) == []
    assert checkpoints.find(OTHER, "a") is None
    assert checkpoints.find(UUID, "b") is None
    assert checkpoints.owners() == (UUID,)


def test_what_is_written_again_is_replaced(scratch, checkpoints):
    checkpoints.write(UUID, "best", [b"one"])
    assert checkpoints.write(UUID, "best", [b"one"]) == checkpoints.find(UUID, "best")
    made = checkpoints.write(UUID, "best", [b"two"])
    assert checkpoints.list(UUID) == [made]
    assert len(names(scratch)) == 2


def test_the_old_one_stands_until_the_new_one_is_durable(checkpoints, calls):
    checkpoints.write(UUID, "best", [b"one"])
    steps = []
    for name in ("rename", "fsync", "fsync_folder", "unlink"):
        setattr(calls, name, lambda *_, name=name: steps.append((name, _[-1])))
    checkpoints.write(UUID, "best", [b"two"])
    assert [name for name, _ in steps] == ["fsync", "rename", *["fsync_folder"] * 2, "unlink",
                                           "fsync_folder"]  # fmt: skip
    assert [site for _, site in steps if isinstance(site, Sync)] == [
        Sync.CHECKPOINT, Sync.CHECKPOINT_NAME, Sync.CHECKPOINTS_FOLDER, Sync.CHECKPOINT_REMOVED,
    ]  # fmt: skip


def test_deleted_ones_are_gone(scratch, checkpoints):
    for name in ("a", "b"):
        checkpoints.write(UUID, name, [b"x"])
    assert checkpoints.delete(UUID, "a")
    assert not checkpoints.delete(UUID, "a")
    assert [one.name for one in checkpoints.list(UUID)] == ["b"]
    assert checkpoints.delete(UUID, "b")
    assert not checkpoints.delete(OTHER, "b")
    assert names(scratch) == []


def test_all_of_a_session_are_dropped(scratch, checkpoints):
    for uuid in (UUID, OTHER):
        for name in ("a", "b"):
            checkpoints.write(uuid, name, [b"x"])
    checkpoints.drop(UUID)
    checkpoints.drop(UUID)
    assert checkpoints.list(UUID) == []
    assert len(checkpoints.list(OTHER)) == 2
    assert len(names(scratch)) == 3


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "_x", "a b", "a\n", "a\0", "ä",
     "x" * 129],
)  # fmt: skip
def test_names_that_are_none(scratch, checkpoints, name):
    for attempt in (
        lambda: checkpoints.write(UUID, name, [b"x"]),
        lambda: checkpoints.find(UUID, name),
        lambda: checkpoints.delete(UUID, name),
    ):
        with pytest.raises(ValueError, match="a checkpoint's name has 1 to 128"):
            attempt()
    made = checkpoints.write(UUID, "x", [b"x"])
    with pytest.raises(ValueError, match="name has"):
        checkpoints.open(made._replace(name=name))
    with pytest.raises(ValueError, match="16 bytes, not 2"):
        checkpoints.list(b"..")


@pytest.mark.parametrize("name", ["x" * 128, "a.tmp", "0", f"a.{'0' * 32}.safetensors", "A-_.z"])
def test_names_that_are_fine(checkpoints, name):
    made = checkpoints.write(UUID, name, [b"x"])
    assert checkpoints.list(UUID) == [made]
    assert checkpoints.find(UUID, name) == made


@pytest.mark.parametrize("name", ["mkdir", "open", "allocate", "pwrite", "truncate", "rename"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_nothing(scratch, checkpoints, calls, name, after):
    before = checkpoints.write(OTHER, "best", [b"before"])
    setattr(calls, name, Full(getattr(calls, name), after))
    made = []
    for uuid, what in ((UUID, "new"), (OTHER, "best")):
        try:
            made.append(checkpoints.write(uuid, what, [b"head", b"tail"], 8))
        except NoSpace:
            pass
    delattr(calls, name)
    expected = {before, *made} - ({before} if made and made[-1].name == "best" else set())
    assert set(checkpoints.list(UUID) + checkpoints.list(OTHER)) == expected
    folders = {one.owner.hex() for one in expected}
    files = {f"{one.owner.hex()}/{one.file}" for one in expected}
    assert set(names(scratch)) == folders | files


def test_room_is_reserved_first_where_the_size_is_known(checkpoints, calls):
    reserved = []
    calls.allocate = lambda fd, size: reserved.append(size)
    checkpoints.write(UUID, "a", [b"12345678"], 8)
    checkpoints.write(UUID, "b", [b"12345678"])
    assert reserved == [8]
    del calls.allocate
    made = checkpoints.write(UUID, "shorter", [b"1"], 100)
    assert checkpoints.open(made).read_bytes() == b"1"


def test_what_the_chunks_raise_is_raised_and_leaves_nothing(scratch, checkpoints):
    def chunks():
        yield b"half of it"
        raise RuntimeError("the copy failed")

    with pytest.raises(RuntimeError, match="the copy failed"):
        checkpoints.write(UUID, "best", chunks())
    assert names(scratch) == []


def test_a_failed_sync_ends_everything(checkpoints, calls):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    calls.fsync = fail
    with pytest.raises(StorageFailure):
        checkpoints.write(UUID, "best", [b"x"])
    assert checkpoints.list(UUID) == []
    with pytest.raises(StorageFailure, match="after an earlier failure"):
        checkpoints.write(UUID, "best", [b"x"])


def test_a_session_that_is_dropped_while_one_is_written(scratch, checkpoints):
    def chunks():
        yield b"half of it"
        checkpoints.drop(UUID)
        yield b"the rest"

    with pytest.raises(Overtaken):
        checkpoints.write(UUID, "best", chunks())
    assert names(scratch) == []
    assert checkpoints.write(UUID, "best", [b"x"]) == checkpoints.find(UUID, "best")


def test_many_at_once(scratch, checkpoints):
    def write(turn):
        for _ in range(20):
            checkpoints.write(UUID, "same", [b"%d" % turn * 1000])
            checkpoints.write(UUID, f"own-{turn}", [b"%d" % turn])
            checkpoints.delete(UUID, f"own-{turn}")

    threads = [threading.Thread(target=write, args=[turn]) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = checkpoints.list(UUID)
    checkpoints.verify(made)
    assert len(names(scratch)) == 2


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"12345679"), "not what was written"),
        (lambda path: path.write_bytes(b"1234567"), "not what was written"),
        (lambda path: path.write_bytes(b""), "not what was written"),
    ],
)
def test_what_is_not_what_was_written(checkpoints, spoil, what):
    made = checkpoints.write(UUID, "best", [b"1234", b"5678"])
    spoil(checkpoints.open(made))
    with pytest.raises(Damaged, match=what) as found:
        checkpoints.verify(made)
    assert found.value.where == made.file


def test_one_that_the_disk_can_not_read(checkpoints, calls):
    made = checkpoints.write(UUID, "best", [b"x"])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    calls.pread = fail
    with pytest.raises(Damaged, match="the disk can't read it: Input/output error"):
        checkpoints.verify(made)


# In a data folder


def test_a_start_removes_drafts_and_finishes_replacements(scratch):
    store = Store(scratch / "data")
    old = store.checkpoints.write(UUID, "best", [b"old"])
    new = store.checkpoints.write(OTHER, "best", [b"new"])
    store.close()
    root = scratch / "data" / "checkpoints"
    os.utime(root / UUID.hex() / old.file, (5, 5))
    os.rename(root / OTHER.hex() / new.file, root / UUID.hex() / new.file)
    (root / UUID.hex() / ".3.tmp").write_bytes(b"half")
    (root / OTHER.hex() / ".0.tmp").write_bytes(b"half")
    store = Store(scratch / "data")
    assert store.checkpoints.find(UUID, "best")[3:] == new[3:]
    store.recover()
    assert names(root) == [UUID.hex(), f"{UUID.hex()}/{new.file}"]
    store.close()


def test_checkpoints_of_sessions_that_are_gone_are_kept_and_said(scratch):
    store = Store(scratch / "data")
    alive, dead = create(store, "alive"), create(store, "dead")
    for owner in (owner_of(alive.row.id), owner_of(dead.row.id), UUID):
        store.checkpoints.write(owner, "best", [b"x"])
    dead.delete(1)
    store.close()
    (scratch / "data" / "checkpoints" / "notes").mkdir()
    store = Store(scratch / "data")
    gone = sorted([owner_of("dead").hex(), UUID.hex()])
    what = "1 checkpoints of a session that is gone; remove the folder if nobody wants them"
    assert store.recover().notes == [
        *(f"checkpoints/{one}: {what}" for one in gone),
        "checkpoints/notes: belongs to nobody; move it away",
    ]
    assert len(store.checkpoints.owners()) == 3
    store.close()


def test_a_folder_of_an_older_server_gets_the_folder(scratch):
    Store(scratch / "data").close()
    (scratch / "data" / "checkpoints").rmdir()
    store = Store(scratch / "data")
    store.recover()
    assert store.checkpoints.write(UUID, "best", [b"x"]).size == 1
    store.close()
