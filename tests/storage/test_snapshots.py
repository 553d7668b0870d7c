"""Snapshots: whole files in reserved room, verified when they are read."""

import numpy as np
import pytest
import xxhash

from service.storage import snapshots
from service.storage.failures import Damaged, NoSpace
from service.storage.files import Calls, Files


@pytest.fixture
def files():
    return Files()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_is_its_chunks(files, scratch):
    snapshots.reserve(files, scratch, 100_000)
    array = np.arange(5000, dtype=np.float32)
    made = snapshots.write(files, scratch, 7, [b"head", array, memoryview(b"tail")])
    content = b"head" + array.tobytes() + b"tail"
    assert made == ("snap-7", len(content), xxhash.xxh3_128_digest(content))
    assert names(scratch) == ["snap-7"]
    assert (scratch / "snap-7").read_bytes() == content
    snapshots.verify(files, scratch / "snap-7", made.size, made.digest)


def test_the_room_is_reserved_and_used_again(files, scratch):
    snapshots.reserve(files, scratch, 1 << 20)
    spare = scratch / "spare"
    assert spare.stat().st_blocks * 512 >= 1 << 20
    inode = spare.stat().st_ino
    made = snapshots.write(files, scratch, 1, [b"x"])
    assert (scratch / made.name).stat().st_ino == inode
    snapshots.recycle(files, scratch, made.name, 1 << 20)
    assert names(scratch) == ["spare"]
    assert spare.stat().st_ino == inode
    assert spare.stat().st_size == 1 << 20


def test_a_longer_one_before_leaves_nothing(files, scratch):
    made = snapshots.write(files, scratch, 1, [b"long" * 1000])
    snapshots.recycle(files, scratch, made.name, 0)
    made = snapshots.write(files, scratch, 2, [b"short"])
    assert (scratch / made.name).read_bytes() == b"short"


def test_no_room_is_asked_for_where_none_is_wanted(files, scratch):
    snapshots.reserve(files, scratch, 0)
    assert (scratch / "spare").stat().st_size == 0


def test_recycling_on_a_full_disk_is_no_refusal(scratch):
    calls = Calls()
    files = Files(calls)
    made = snapshots.write(files, scratch, 1, [b"x"])

    def full(*_):
        raise OSError(28, "full")

    calls.allocate = full
    snapshots.recycle(files, scratch, made.name, 1 << 20)
    assert names(scratch) == ["spare"]
    with pytest.raises(NoSpace):
        snapshots.reserve(files, scratch, 1 << 20)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"12345678"), "not what was written"),
        (lambda path: path.write_bytes(b"1234567"), "has 7 bytes and had 8"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
    ],
)
def test_what_is_not_what_was_written(files, scratch, spoil, what):
    made = snapshots.write(files, scratch, 1, [b"abcd", b"efgh"])
    spoil(scratch / made.name)
    with pytest.raises(Damaged, match=what) as found:
        snapshots.verify(files, scratch / made.name, made.size, made.digest)
    assert found.value.where == "snap-1"
