import logging
import queue
import threading
from functools import partial

import pytest

from kernels.pool import Pool, Waits


@pytest.fixture(params=[1, 2, 4])
def pool(request):
    pool = Pool(request.param)
    yield pool
    pool.close()


def submit(pool, program, timeout=20):
    told = threading.Event()
    outcome = []

    def done(result, error):
        outcome.append((result, error, threading.current_thread().name))
        told.set()

    pool.submit(program, done)
    assert told.wait(timeout)
    assert len(outcome) == 1
    return outcome[0]


def squares(count):
    first = yield [lambda k=k: k * k for k in range(count)]
    second = yield [lambda: sum(first)]
    none = yield []
    return first, second, none


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_results_come_back_in_order(pool, count):
    want = ([k * k for k in range(count)], [sum(k * k for k in range(count))], [])
    assert pool.run(squares(count)) == want
    result, error, name = submit(pool, squares(count))
    assert result == want
    assert error is None
    assert name.startswith("gradpost-pool-")


def test_one_part_runs_without_a_hop(pool):
    def program():
        here = threading.get_ident()
        (there,) = yield [threading.get_ident]
        return here == there

    assert pool.run(program())
    assert submit(pool, program())[0]


def test_the_first_error_by_index_is_thrown_in_after_all_parts(pool):
    finished = []

    def fail(k):
        finished.append(k)
        if k in (2, 5):
            raise KeyError(k)

    def program(*, catch):
        try:
            yield [lambda k=k: fail(k) for k in range(8)]
        except KeyError as error:
            assert sorted(finished) == list(range(8))
            finished.clear()
            if catch:
                (again,) = yield [lambda: "went on"]
                return error.args, again
            raise
        return None

    assert pool.run(program(catch=True)) == ((2,), "went on")
    assert submit(pool, program(catch=True))[0] == ((2,), "went on")
    with pytest.raises(KeyError):
        pool.run(program(catch=False))
    result, error, _ = submit(pool, program(catch=False))
    assert result is None
    assert isinstance(error, KeyError)


def test_a_program_that_fails_at_once(pool):
    def program():
        raise RuntimeError("no")
        yield []

    assert isinstance(submit(pool, program())[1], RuntimeError)
    with pytest.raises(RuntimeError, match="no"):
        pool.run(program())


def test_many_programs_from_many_threads_share_the_pool(pool):
    results = []
    lock = threading.Lock()
    left = threading.Semaphore(0)

    def program(seed):
        total = seed
        for _ in range(5):
            parts = yield [lambda k=k, base=total: base + k for k in range(4)]
            total = sum(parts) % 1_000_003
        return seed, total

    def done(result, error):
        with lock:
            results.append((result, error))
        left.release()

    def send(first):
        for seed in range(first, first + 50):
            pool.submit(program(seed), done)

    threads = [threading.Thread(target=send, args=(k * 50,)) for k in range(4)]
    for thread in threads:
        thread.start()
    direct = [pool.run(program(seed)) for seed in range(20)]
    for thread in threads:
        thread.join()
    for _ in range(200):
        assert left.acquire(timeout=30)
    assert all(error is None for _, error in results)
    known = dict(result for result, _ in results)
    assert sorted(known) == list(range(200))
    assert all(known[seed] == total for seed, total in direct)


def test_nothing_waits_inside_the_pool():
    # two programs on one thread, each of several parts: a waiting thread would stop both for ever
    pool = Pool(1)
    try:
        told = threading.Semaphore(0)
        for _ in range(2):
            pool.submit(squares(3), lambda result, error: told.release())
        assert told.acquire(timeout=20)
        assert told.acquire(timeout=20)
    finally:
        pool.close()


def test_a_failing_callback_is_logged_and_the_thread_survives(caplog):
    pool = Pool(1)

    def bad(result, error):
        raise ValueError("callback")

    with caplog.at_level(logging.ERROR, "kernels.pool"):
        pool.submit(squares(1), bad)
        assert submit(pool, squares(2))[1] is None
    assert "callback" in caplog.text
    pool.close()


def test_closing_finishes_what_was_sent_and_refuses_more():
    pool = Pool(2)
    results = []
    for _ in range(20):
        pool.submit(squares(5), lambda result, error: results.append(error))
    pool.close()
    pool.close()
    assert results == [None] * 20
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(squares(1), lambda result, error: None)
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(squares(9))


def test_threads_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    pool = Pool()
    assert pool.threads >= 1
    pool.close()


def test_parts_that_wait_hold_no_thread_of_the_pool():
    pool, event, ended = Pool(1), threading.Event(), queue.SimpleQueue()

    def waits():
        found = yield Waits([partial(event.wait, 60), threading.current_thread])
        (after,) = yield [threading.current_thread]
        return found, after

    def works():
        (found,) = yield [lambda: 42]
        return found

    try:
        pool.submit(waits(), lambda result, error: ended.put((result, error)))
        assert pool.run(works()) == 42
        event.set()
        ((waited, thread), after), error = ended.get(timeout=60)
        assert error is None
        assert waited is True
        assert thread.name.startswith("gradpost-wait")
        assert after.name.startswith("gradpost-pool")
    finally:
        pool.close()


def test_the_error_of_a_part_that_waits_is_thrown_in():
    pool, ended = Pool(1), queue.SimpleQueue()

    def fails():
        raise OSError("no disk")

    def waits():
        try:
            yield Waits([fails])
        except OSError as error:
            return str(error)

    try:
        pool.submit(waits(), lambda result, error: ended.put((result, error)))
        assert ended.get(timeout=60) == ("no disk", None)
    finally:
        pool.close()
