"""The data-parallel example: processes that step one optimizer have one model."""

from examples import data_parallel


def test_two_processes_train_one_model():
    one, other = data_parallel.train(workers=2, steps=150)
    assert one == other
    assert one > 0.9
