"""The ledger: which keys are free, known, too old or retired."""

import pytest

from service.errors import KeyReused, TooManyWorkers, TooOld, WorkerRetired
from service.sessions.ledger import WINDOW, Admitted, Ledger, Summary, same_push

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
