"""One meaning of errors: whole writes, a full disk that changes nothing, and no second fsync."""

import errno
import os
import sqlite3

import pytest

from service.storage import files as module
from service.storage.failures import NoSpace, StorageFailure
from service.storage.files import Calls, Files, Pace, Sync


class Broken(Calls):
    """Fails each call that is named, with one error."""

    def __init__(self, *names, error=errno.EIO):
        self.count = 0
        for name in names:
            setattr(self, name, self._fail)
        self.error = error

    def _fail(self, *_):
        self.count += 1
        raise OSError(self.error, os.strerror(self.error))


class Short(Calls):
    def pwrite(self, fd, data, offset):
        return super().pwrite(fd, data[:3], offset)

    def pread(self, fd, size, offset):
        return super().pread(fd, min(size, 2), offset)


@pytest.fixture
def fd(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_short_writes_and_reads_go_on(fd):
    files = Files(Short())
    files.write(fd, b"0123456789", 5, "a test")
    assert files.read(fd, 100, 0) == bytes(5) + b"0123456789"
    assert files.read(fd, 4, 6) == b"1234"
    assert files.read(fd, 1, 99) == b""


def test_a_write_that_writes_nothing_does_not_hang(fd):
    calls = Calls()
    calls.pwrite = lambda *_: 0
    with pytest.raises(StorageFailure, match="nothing was written"):
        Files(calls).write(fd, b"x", 0, "a test")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_failure(fd, number):
    files = Files(Broken("pwrite", error=number))
    with pytest.raises(NoSpace, match="a test"):
        files.write(fd, b"x", 0, "a test")
    files.calls = Calls()
    files.write(fd, b"x", 0, "a test")


def test_a_full_disk_is_a_failure_where_it_leaves_half_a_thing(fd):
    files = Files(Broken("pwrite", error=errno.ENOSPC))
    with pytest.raises(StorageFailure):
        files.write(fd, b"x", 0, "a header", may_be_full=False)


@pytest.mark.parametrize("name", ["fdatasync", "fsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_is_never_retried(fd, name, number):
    calls = Broken(name, error=number)
    files = Files(calls)
    for _ in range(3):
        with pytest.raises(StorageFailure, match="ring, commit"):
            getattr(files, name)(fd, Sync.RING_COMMIT)
    assert calls.count == 1


def test_a_long_file_is_synced_as_it_grows(fd, monkeypatch):
    monkeypatch.setattr(module, "PACE", 100)
    calls, syncs = Calls(), []
    calls.fdatasync = lambda fd, site: syncs.append(site)
    pace = Pace(Files(calls), fd, Sync.CHECKPOINT)
    counts = []
    for _ in range(5):
        pace.wrote(60)
        counts.append(len(syncs))
    assert counts == [0, 1, 1, 2, 2]
    assert set(syncs) == {Sync.CHECKPOINT}


def test_after_a_failed_sync_nothing_is_written_or_removed(fd, tmp_path):
    files = Files(Broken("fsync_folder"))
    with pytest.raises(StorageFailure):
        files.fsync_folder(tmp_path, Sync.DATA_FOLDER)
    for attempt in (
        lambda: files.write(fd, b"x", 0, "a test"),
        lambda: files.unlink(tmp_path / "file"),
        lambda: files.rename(tmp_path / "file", tmp_path / "other"),
        lambda: files.fdatasync(fd, Sync.RING_COMMIT),
        lambda: files.open(tmp_path / "new", create=True),
        lambda: files.remove_folder(tmp_path),
    ):
        with pytest.raises(StorageFailure, match="after an earlier failure"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert files.read(fd, 1, 0) == b""


@pytest.mark.parametrize(
    ("code", "kind"), [(sqlite3.SQLITE_FULL, NoSpace), (sqlite3.SQLITE_IOERR, StorageFailure)]
)
def test_errors_of_sqlite(code, kind):
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    with pytest.raises(kind), Files().writing("a test"):
        raise error


def test_replace_leaves_the_whole_file_and_nothing_else(tmp_path):
    files, path = Files(), tmp_path / "FORMAT"
    (tmp_path / "FORMAT.tmp").write_bytes(b"left of a longer attempt")
    files.replace(path, b"short", Sync.FORMAT)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("FORMAT", b"short")]


def test_names_that_are_there_or_gone_are_no_errors(tmp_path):
    files = Files()
    files.make_folder(tmp_path / "a")
    files.make_folder(tmp_path / "a")
    files.unlink(tmp_path / "nothing")
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "b" / "c").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    files.remove_folder(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_files_are_their_owners(tmp_path):
    files = Files()
    with files.created(tmp_path / "file"):
        pass
    files.make_folder(tmp_path / "folder")
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "file": 0o600,
        "folder": 0o700,
    }
