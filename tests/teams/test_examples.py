"""The examples of several trainers reach what one trainer reaches."""

import pytest

from examples import diloco, fedavg


@pytest.mark.parametrize(("example", "rounds"), [(fedavg, 12), (diloco, 16)])
def test_four_processes_reach_what_one_trainer_reaches(example, rounds):
    ours, single = example.train(rounds, seed=0)
    assert single > 0.9
    assert ours >= single - 0.01
