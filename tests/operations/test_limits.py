import threading

import pytest

from service.errors import InsufficientMemory, Overloaded
from service.limits import Budget, Uploads


def test_a_budget_reserves_all_or_nothing():
    budget = Budget(100)
    budget.reserve(60)
    assert not budget.try_reserve(41)
    assert budget.try_reserve(40)
    assert budget.used == 100
    budget.release(100)
    assert budget.used == 0


def test_a_refusal_says_how_much_is_missing():
    budget = Budget(100)
    budget.reserve(90)
    with pytest.raises(InsufficientMemory) as caught:
        budget.reserve(11)
    assert caught.value.context == {"needed_bytes": 11, "free_bytes": 10, "memory_bytes": 100}
    assert "GRADPOST_MEMORY_BYTES" in caught.value.detail
    assert budget.used == 90


def test_nonsense_changes_nothing():
    budget = Budget(100)
    assert not budget.try_reserve(-1)
    for n in (-1, 1):
        with pytest.raises(ValueError, match="released"):
            budget.release(n)
    assert budget.used == 0


def test_threads_never_overshoot():
    budget = Budget(1000)
    worst = []

    def work():
        for _ in range(2000):
            if budget.try_reserve(7):
                worst.append(budget.used)
                budget.release(7)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == 0
    assert max(worst) <= 56


def test_uploads_shed_and_give_back():
    uploads = Uploads(1)
    with uploads:
        with pytest.raises(Overloaded) as caught, uploads:
            pass
        assert caught.value.retry_after_s == 1
        assert uploads.active == 1
    assert uploads.active == 0
    with pytest.raises(ZeroDivisionError), uploads:
        raise ZeroDivisionError
    assert uploads.active == 0
