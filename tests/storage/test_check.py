"""The fsck: findings in words, and nothing changes."""

import os
import shutil

import pytest

from service.__main__ import main
from service.storage import check
from service.storage.checkpoints import owner_of
from service.storage.store import Store
from tests.storage.test_store import create, push, reopened


@pytest.fixture
def folder(scratch):
    store = Store(scratch / "data")
    for name in ("a", "b", "c"):
        push(create(store, name))
    store.close()
    store, recovery = reopened(scratch)
    recovery.sessions["c"].journal.delete(2)
    store.close()
    return scratch / "data"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ring_of(folder, index):
    return sorted((folder / "sessions").glob("*/ring-0"))[index]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_all_is_well(folder, capsys):
    before = contents(folder)
    assert check.run(folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: snapshot of record 0, 1 records after it",
        "b: snapshot of record 0, 1 records after it",
        "1 deleted sessions are remembered",
        "All is well.",
    ]
    assert contents(folder) == before


def test_the_command(folder, capsys, monkeypatch):
    assert main(["check", "--data-dir", str(folder), "--session", "b"]) == 0
    assert capsys.readouterr().out.startswith("b: snapshot of record 0")
    monkeypatch.setenv("GRADPOST_DATA_DIR", str(folder / "nowhere"))
    assert main(["check"]) == 2
    monkeypatch.delenv("GRADPOST_DATA_DIR")
    with pytest.raises(SystemExit):
        main(["check"])


def test_damage_has_words_and_a_place(folder, capsys):
    flip(ring_of(folder, 0), 0)
    before = contents(folder)
    assert check.run(folder) == 1
    out = capsys.readouterr().out
    assert "a: the first page is unreadable (ring-0)" in out
    assert "1 of 3 findings need attention." in out
    assert check.run(folder, "b") == 0
    assert check.run(folder, "a") == 1
    assert contents(folder) == before


def test_checkpoints_are_read_and_listed(scratch, folder, capsys):
    store, _ = reopened(scratch)
    alive, gone = owner_of("a"), bytes(16)
    for whose in (alive, gone):
        made = store.checkpoints.write(whose, "best", [b"content"])
        os.utime(store.checkpoints.open(made), (1e9, 1e9))
    store.close()
    where = f"checkpoints/{gone.hex()}"
    assert check.run(folder) == 0
    what = "checkpoint best, 7 bytes, of 2001-09-09 01:46:40 UTC"
    assert capsys.readouterr().out.splitlines()[2:6] == [
        f"a: {what}",
        "1 deleted sessions are remembered",
        f"{where}: 1 checkpoints of a session that is gone; remove the folder if nobody wants them",
        f"{where}: {what}",
    ]
    assert check.run(folder, "a") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"a: {what}", "All is well."]
    flip(store.checkpoints.open(made), 3)
    assert check.run(folder, "a") == 0
    assert check.run(folder) == 1
    said = f"{where}: checkpoint best: the checkpoint is not what was written ({made.file})"
    assert said in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints")
    assert check.run(folder) == 0


def test_what_else_lies_beside_checkpoints(scratch, folder, capsys):
    store, _ = reopened(scratch)
    whose = owner_of("a")
    made = store.checkpoints.write(whose, "best", [b"content"])
    store.close()
    path = folder / "checkpoints" / whose.hex()
    for name in (".3.tmp", "README", f"best.{'0' * 32}.safetensors"):
        (path / name).touch()
    os.utime(path / f"best.{'0' * 32}.safetensors", (5, 5))
    (folder / "checkpoints" / "mine").mkdir()
    before = contents(folder)
    assert check.run(folder) == 1
    out = capsys.readouterr().out
    assert f"a: {made.file} is replaced" not in out
    assert f"a: best.{'0' * 32}.safetensors is replaced; the next start removes it" in out
    assert "a: .3.tmp is left of a checkpoint that was never whole" in out
    assert f"checkpoints/{path.name}/README: is no checkpoint" in out
    assert "checkpoints/mine: belongs to nobody; move it away" in out
    assert "2 of 8 findings need attention." in out
    assert contents(folder) == before


def test_a_torn_tail_is_said_and_is_well(folder, capsys):
    with ring_of(folder, 1).open("r+b") as file:
        file.seek(4096)
        file.write(b"half a header")
    assert check.run(folder) == 0
    assert "b: ring-0, place 0 is unreadable" in capsys.readouterr().out


def test_what_belongs_to_nobody(folder, capsys):
    (folder / "sessions" / ("7" * 32)).mkdir()
    (folder / "sessions" / f"{'8' * 32}.creating").mkdir()
    (folder / "orphans" / "old").mkdir()
    assert check.run(folder) == 1
    out = capsys.readouterr().out
    assert f"sessions/{'7' * 32}: known to no row of the index" in out
    assert f"sessions/{'8' * 32}.creating: left of an unfinished creation" in out
    assert "orphans/old: set aside by an earlier recovery" in out
    assert "2 of 6 findings need attention." in out


def test_rows_that_were_not_yet_moved_into_the_database(scratch, folder, capsys):
    store, recovery = reopened(scratch)
    push(recovery.sessions["a"].journal, sequence=2)
    store.flush()
    store._lock.release()  # as after a kill: the log is there, the lock is not
    before = contents(folder)
    ring = ring_of(folder, 0)
    assert (folder / "index.db-wal").stat().st_size
    assert check.run(folder) == 0
    assert "a: snapshot of record 0, 2 records after it" in capsys.readouterr().out
    data = ring.read_bytes()
    ring.write_bytes(data[:4096] + bytes(len(data) - 4096))
    assert check.run(folder) == 1
    assert "the index has seen record 2" in capsys.readouterr().out
    ring.write_bytes(data)
    assert contents(folder) == before
    store._index._connection.close()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "LOCK").unlink(), "no data folder"),
        (lambda folder: (folder / "FORMAT").write_bytes(b"gradpost data 9\n"), "start the newer"),
        (lambda folder: (folder / "index.db").unlink(), "has no index.db"),
        (lambda folder: (folder / "index.db").write_bytes(b"x" * 9999), "can't be read"),
    ],
)
def test_folders_that_can_not_be_checked(folder, capsys, spoil, sentence):
    spoil(folder)
    assert check.run(folder) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_in_use_and_a_session_nobody_knows(folder, capsys):
    assert check.run(folder, "nobody") == 2
    assert "no session 'nobody'" in capsys.readouterr().err
    store = Store(folder)
    assert check.run(folder) == 2
    assert "in use by process" in capsys.readouterr().err
    store.close()


def test_a_damaged_row_can_be_asked_for(scratch, folder, capsys):
    store, _ = reopened(scratch)
    store._index._connection.execute("UPDATE session SET epoch = 9 WHERE id = 'b'")
    store.close()
    assert check.run(folder, "b") == 1
    assert "b: its row is damaged (index.db)" in capsys.readouterr().out
