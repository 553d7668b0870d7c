"""One process per data folder, and formats that are refused with a sentence."""

import os

import pytest

from service.storage import lock
from service.storage.failures import Refused
from service.storage.files import Files
from service.storage.store import Store


def test_one_holder_at_a_time(tmp_path):
    first = lock.Lock(Files(), tmp_path)
    with pytest.raises(Refused, match=f"in use by process {os.getpid()} on .*GRADPOST_DATA_DIR"):
        lock.Lock(Files(), tmp_path)
    with pytest.raises(Refused, match="in use"), lock.held(tmp_path):
        pass
    first.release()
    with lock.held(tmp_path), pytest.raises(Refused, match="in use"):
        lock.Lock(Files(), tmp_path)
    lock.Lock(Files(), tmp_path).release()


def test_what_is_no_data_folder(tmp_path):
    with pytest.raises(Refused, match="no data folder"), lock.held(tmp_path):
        pass


def test_a_new_folder(tmp_path):
    store = Store(tmp_path / "data")
    assert (tmp_path / "data" / "FORMAT").read_bytes() == b"gradpost data 1\n"
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    files = [path for path in (tmp_path / "data").iterdir() if path.is_file()]
    assert {"index.db", "index.db-wal", "LOCK"} <= {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    store.close()
    Store(tmp_path / "data").close()


def test_the_parent_must_exist(tmp_path):
    with pytest.raises(Refused, match="there is no folder"):
        Store(tmp_path / "no" / "data")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"gradpost data 2\n", "format 2 and this server reads up to 1; start the newer version"),
        (b"gradpost data 10\n", "format 10"),
        (b"gradpost data 0\n", "never was a format 0"),
        (b"gradpost dat! 1\n", "damaged"),
        (b"", "damaged"),
    ],
)
def test_formats_that_are_refused(tmp_path, content, sentence):
    Store(tmp_path / "data").close()
    (tmp_path / "data" / "FORMAT").write_bytes(content)
    for _ in range(2):  # and the lock is let go
        with pytest.raises(Refused, match=sentence):
            Store(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "sentence"), [("FORMAT", "FORMAT file is not readable"), ("index.db", "is gone")]
)
def test_a_folder_with_sessions_that_lacks_a_file(tmp_path, name, sentence):
    Store(tmp_path / "data").close()
    (tmp_path / "data" / "sessions" / "some").mkdir()
    (tmp_path / "data" / name).unlink()
    with pytest.raises(Refused, match=sentence):
        Store(tmp_path / "data")


def test_an_unfinished_first_start_is_finished(tmp_path):
    Store(tmp_path / "data").close()
    (tmp_path / "data" / "FORMAT").unlink()
    Store(tmp_path / "data").close()
    assert (tmp_path / "data" / "FORMAT").exists()
