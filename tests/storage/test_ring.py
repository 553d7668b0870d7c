"""Places, numbers and syncs of one ring."""

import threading

import pytest

from service.storage.failures import Damaged, StorageFailure
from service.storage.files import Calls, Files, Sync
from service.storage.header import NO_DIGEST, PAGE, Key, Kind, Page, Shape
from service.storage.ring import Ring

SESSION = bytes(range(16))
SHAPE = Shape(slots=3, capacity=5000, records=2)


class Counting(Calls):
    def __init__(self):
        self.syncs = []

    def fdatasync(self, fd, site):
        self.syncs.append(site)


@pytest.fixture
def calls():
    return Counting()


@pytest.fixture
def ring(scratch, calls):
    ring = Ring.create(Files(calls), scratch / "ring-0", SESSION, SHAPE, 0)
    yield ring
    ring.retire()


def put(ring, *payloads):
    """Commits one record for each payload, together."""
    slots = []
    for payload in payloads:
        slots.append(ring.reserve(payload=bool(payload)))
        slots[-1].seal(Kind.PUSH if payload else Kind.PATCH, payload=payload)
    return slots, ring.commit(slots)


def test_a_new_ring_is_blank_and_has_its_blocks(scratch, ring):
    assert (scratch / "ring-0").stat().st_size == SHAPE.size
    assert {header for _, header in ring.headers()} == {Page.BLANK}
    assert (scratch / "ring-0").stat().st_blocks * 512 >= SHAPE.size


def test_payloads_and_records_have_places_of_their_own(ring):
    slots = [ring.reserve(payload=True) for _ in range(3)]
    pages = [ring.reserve(payload=False) for _ in range(2)]
    assert len({slot.place for slot in slots + pages}) == 5
    assert ring.reserve(payload=True) is None
    assert ring.reserve(payload=False) is None
    slots[1].release()
    assert ring.reserve(payload=True) is not None
    assert ring.free() == (0, 0)


def test_a_group_is_one_sync_and_numbered_in_order(ring, calls):
    _, first = put(ring, b"one", b"two")
    _, second = put(ring, b"", b"three")
    assert [(h.number, h.synced) for h in first + second] == [(1, 0), (2, 0), (3, 2), (4, 2)]
    assert calls.syncs == [Sync.RING_COMMIT] * 2
    assert ring.last == 4


def test_what_was_sealed_is_read_back(ring):
    slot = ring.reserve(payload=True)
    payload = memoryview(bytearray(range(200)) * 25).cast("B")
    slot.seal(Kind.PUSH, key=Key("w", 9), digest=b"d" * 16, meta=b"meta", payload=payload)
    (header,) = ring.commit([slot])
    found = dict(ring.headers())
    assert found[slot.place] == header == slot.header
    assert header.key == ("w", 9)
    assert ring.is_whole(slot.place, header)
    assert ring.payload(slot.place, header) == payload
    assert sum(one is Page.BLANK for one in found.values()) == 4


def test_nothing_is_a_record_before_its_commit(ring):
    slot = ring.reserve(payload=True)
    slot.seal(Kind.PUSH, payload=b"x" * 5000)
    assert {header for _, header in ring.headers()} == {Page.BLANK}
    slot.release()
    assert ring.free() == (2, 3)


def test_only_places_that_a_snapshot_holds_are_used_again(ring):
    slots, _ = put(ring, b"one", b"two", b"three")
    assert ring.free() == (2, 0)
    ring.free_through(2)
    assert ring.free() == (2, 2)
    again, _ = put(ring, b"four", b"five")
    assert {slot.place for slot in again} == {slot.place for slot in slots[:2]}
    ring.free_through(2)
    assert ring.free() == (2, 0)


def test_a_snapshot_that_is_a_record_of_its_own(ring):
    put(ring, b"one", b"")
    ring.advance(3)
    assert ring.free() == (2, 3)
    _, (header,) = put(ring, b"four")
    assert (header.number, header.synced) == (4, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"payload": bytes(5001)},
        {"meta": bytes(PAGE)},
        {"digest": b"short"},
        {"key": Key("w" * 256, 1)},
        {"key": Key("", 1)},
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_sealed(ring, wrong):
    slot = ring.reserve(payload=True)
    with pytest.raises(ValueError, match="byte"):
        slot.seal(Kind.PUSH, **wrong)
    slot.seal(Kind.PUSH, payload=bytes(5000))
    ring.commit([slot])


def test_a_record_page_takes_no_payload(ring):
    with pytest.raises(ValueError, match="do not fit"):
        ring.reserve(payload=False).seal(Kind.PATCH, payload=b"x")


def test_a_place_is_given_back_once(ring):
    (slot,), _ = put(ring, b"one")
    other = ring.reserve(payload=True)
    other.release()
    for one in (slot, other):
        with pytest.raises(ValueError, match="not reserved"):
            one.release()


def test_a_ring_is_opened_and_goes_on(scratch, ring, calls):
    slots, headers = put(ring, b"one", b"two", b"three")
    ring.retire()
    again = Ring.open(Files(calls), scratch / "ring-0", SESSION, writable=True)
    assert again.shape == SHAPE
    assert {place: h for place, h in again.headers() if h is not Page.BLANK} == {
        slot.place: header for slot, header in zip(slots, headers, strict=True)
    }
    calls.syncs.clear()
    again.resume(2, {slots[1].place: 2}, [slots[2].place])
    assert calls.syncs == [Sync.RING_OPEN]
    assert dict(again.headers())[slots[2].place] is Page.BLANK
    assert again.free() == (2, 2)
    _, (header,) = put(again, b"another third")
    assert header.number == 3
    again.retire()


@pytest.mark.parametrize(
    ("at", "data", "what"),
    [(0, b"x", "first page is unreadable"), (None, b"", "shorter than its")],
)
def test_files_that_are_no_ring(scratch, ring, calls, at, data, what):
    path = scratch / "ring-0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if at is None else data + content[1:])
    with pytest.raises(Damaged, match=what):
        Ring.open(Files(calls), path, SESSION, writable=False)


def test_a_ring_of_another_session(scratch, ring, calls):
    with pytest.raises(Damaged, match="another session"):
        Ring.open(Files(calls), scratch / "ring-0", bytes(16), writable=False)


def test_a_retired_ring_closes_when_nobody_writes_to_it(ring, calls):
    closed = []
    calls.close = closed.append
    slot = ring.reserve(payload=True)
    ring.retire()
    assert not closed
    slot.seal(Kind.PUSH, payload=b"late")
    with pytest.raises(ValueError, match="retired"):
        ring.commit([slot])
    slot.release()
    assert ring.reserve(payload=True) is None
    ring.retire()
    assert len(closed) == 1
    Calls().close(closed[0])


def test_a_failed_commit_is_the_last(ring, calls):
    put(ring, b"one")

    def fail(*_):
        raise OSError(5, "no")

    calls.fdatasync = fail
    with pytest.raises(StorageFailure):
        put(ring, b"two")
    del calls.fdatasync
    slot = ring.reserve(payload=True)
    with pytest.raises(StorageFailure, match="after an earlier failure"):
        slot.seal(Kind.PUSH, payload=b"x")
    assert ring.last == 1


def test_many_threads_reserve_seal_and_release(ring):
    failures, numbers = [], []

    def work(seed):
        try:
            for turn in range(200):
                slot = ring.reserve(payload=True)
                if slot is None:
                    continue
                slot.seal(Kind.PUSH, payload=bytes([seed]) * (turn + 1))
                if turn % 3:
                    slot.release()
                else:
                    (header,) = ring.commit([slot])
                    numbers.append(header.number)
                    ring.free_through(header.number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(numbers) == list(range(1, ring.last + 1))
    assert ring.free() == (2, 3)


def test_a_record_without_digest_has_zeros(ring):
    _, (header,) = put(ring, b"")
    assert header.digest == NO_DIGEST
    assert header.key is None
