"""The ledger: which keys are free, known, too old or retired."""

import pytest

from service.errors import KeyReused, TooManyWorkers, TooOld, WorkerRetired
from service.sessions.ledger import WINDOW, Admitted, Ledger, Summary, same_push
from service.sessions.records import Push, pack_ledger, pack_push, unpack_ledger, unpack_push
from service.sessions.update import Part

SUMMARY = Summary(1, 1, 2, True, True, 0, 0.1, 1.0, False, None, True, None, None)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ledger(workers=3, retention=100.0):
    clock = Clock()
    return Ledger(workers, retention, clock), clock


def test_a_number_is_free_until_it_was_admitted():
    book, _ = ledger()
    assert book.find("w", 7) is None
    book.record("w", 7, b"d", SUMMARY)
    assert book.find("w", 7) == Admitted(b"d", SUMMARY)
    assert book.find("w", 6) is None
    assert book.find("v", 7) is None


def test_numbers_may_come_in_any_order_within_the_window():
    book, _ = ledger()
    book.record("w", WINDOW, b"d", SUMMARY)
    assert book.find("w", 1) is None
    with pytest.raises(TooOld):
        book.find("w", 0)


def test_an_admitted_number_below_the_window_is_too_old():
    book, _ = ledger()
    book.record("w", 5, b"d", SUMMARY)
    book.record("w", 5 + WINDOW, b"d", SUMMARY)
    with pytest.raises(TooOld):
        book.find("w", 5)


def test_memory_is_bounded_by_the_window():
    book, _ = ledger()
    for sequence in range(5 * WINDOW):
        book.record("w", sequence, b"d", SUMMARY)
    assert book.size() <= WINDOW
    for sequence in range(5 * WINDOW, 5_000 * WINDOW, WINDOW // 2):
        book.record("w", sequence, b"d", SUMMARY)
        assert book.size() <= 2 * WINDOW


def test_a_silent_worker_is_retired_for_ever():
    book, clock = ledger()
    book.record("w", 1, b"d", SUMMARY)
    clock.now = 101.0
    with pytest.raises(WorkerRetired):
        book.find("w", 1)
    for name in "abc":
        assert book.find(name, 1) is None
        book.record(name, 1, b"d", SUMMARY)
    with pytest.raises(WorkerRetired):
        book.find("w", 2)


def test_workers_are_bounded_until_one_is_retired():
    book, clock = ledger(workers=2)
    book.record("a", 1, b"d", SUMMARY)
    book.record("b", 1, b"d", SUMMARY)
    with pytest.raises(TooManyWorkers):
        book.find("c", 1)
    clock.now = 101.0
    assert book.find("c", 1) is None


def test_a_repeat_must_be_the_same_push():
    known = Admitted(b"d", SUMMARY)
    assert same_push(known, b"d", "w", 1) is SUMMARY
    with pytest.raises(KeyReused):
        same_push(known, b"other", "w", 1)


def test_what_is_told_of_a_worker_is_what_a_push_would_meet():
    now = [0.0]
    ledger = Ledger(2, 100.0, lambda: now[0])
    for number in (0, 1, 2000):
        ledger.record("w", number, b"d", SUMMARY)
    assert list(ledger.standing("w").admitted) == [2000]
    assert ledger.standing("v") is None
    ledger.check_retired("v")
    now[0] = 101.0
    assert ledger.standing("w") is None
    with pytest.raises(WorkerRetired):
        ledger.check_retired("w")


def test_a_ledger_survives_its_bytes():
    ledger = Ledger(9, 100.0)
    odd = SUMMARY._replace(grad_norm=None, skipped="nonfinite", applied=False, lr=5e-324)
    ledger.record("w", 7, bytes(range(16)), SUMMARY)
    ledger.record("w", 1 << 62, b"", odd)
    ledger.record("v", 0, bytes(16), SUMMARY._replace(update_norm=1.5, param_norm=0.1))
    again = Ledger(9, 100.0)
    again.restore(unpack_ledger(pack_ledger(ledger.contents())))
    before, after = ledger.contents(), again.contents()
    assert [one[:2] + one[3:] for one in after.workers] == [
        one[:2] + one[3:] for one in before.workers
    ]
    for data in (b"", pack_ledger(before)[:-1], pack_ledger(before) + b"x"):
        with pytest.raises(ValueError, match="ledger"):
            unpack_ledger(data)


def test_the_record_of_a_push_keeps_every_bit():
    parts = (
        Part(0, 0, 3, 5, 0.1, (-0.1, 5e-324, float("inf"), -0.0), (0.30000000000000004,)),
        Part(2, 3, 4, 0, 1e-300, (1.0, float("inf")), ()),
    )
    push = Push(
        "w", 1 << 62, bytes(16), "BF16", 3, 0.1, None, True, -2.5, '{"default":{"lr":0.1}}', 1.5,
        None, parts,
    )  # fmt: skip
    for one in (push, push._replace(skipped="nonfinite", parts=(), norm=1.5, overrides=None)):
        again = unpack_push(pack_push(one), one.worker, one.sequence, one.digest)
        assert repr(again) == repr(one)
        for data in (b"", pack_push(one)[:-1], pack_push(one) + b"x"):
            with pytest.raises(ValueError, match="record of a push"):
                unpack_push(data, "w", 1, b"")
