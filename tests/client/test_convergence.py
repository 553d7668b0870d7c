"""Training in fewer bytes ends where training in float32 does."""

import numpy as np
import pytest

from gradpost import Buffer, Session
from gradpost.compress import topk

pytest.importorskip("sklearn")

from threadpoolctl import threadpool_limits

from examples import digits

ADAM = ("adam", {"lr": 3e-3}, 300)
SGD = ("sgd", {"lr": 0.3}, 500)


class Whole(digits.Dropout):
    """No dropout: less noise, fewer steps."""

    def mask(self, shape, drop):
        return np.ones(shape, np.float32)


@pytest.fixture(scope="module")
def trained(application):
    """Accuracy on what was held out, and the bytes of all pushes; by setting and codec."""
    data = digits.load(0)
    known = {}

    def train(setting, compress):
        key = setting[0], compress
        if key in known:
            return known[key]
        rule, hyper, steps = setting
        sent = 0
        params = digits.init(0, hidden=64)
        batches, dropout, buffer = digits.batches(data, 64, 0), Whole(0), Buffer()
        with Session.create(
            application, rule=rule, params=params, compress=compress, **hyper
        ) as session:
            send = session._calls.send

            def counted(*arguments, **options):
                nonlocal sent
                sent += sum(map(len, options.get("body", ())))
                return send(*arguments, **options)

            session._calls.send = counted
            params = session.pull(into=buffer)
            for _ in range(steps):
                _, grads = digits.loss_and_grads(params, *next(batches), dropout)
                _, params = session.push_pull(grads, into=buffer)
            session.delete()
        known[key] = digits.accuracy(params, data.test_x, data.test_y), sent
        return known[key]

    with threadpool_limits(1):
        yield train


@pytest.mark.parametrize(
    ("setting", "compress", "part"),
    [
        (ADAM, "bf16", 0.6),
        (ADAM, "f16", 0.6),
        (ADAM, "int8", 0.33),
        (SGD, "int8", 0.33),
        (SGD, "topk:0.05", 0.22),
    ],
)
def test_it_ends_within_a_hundredth(trained, setting, compress, part):
    whole, all_bytes = trained(setting, None)
    accuracy, sent = trained(setting, compress)
    assert whole > 0.96
    assert accuracy >= whole - 0.01
    assert sent < part * all_bytes


def test_topk_needs_what_it_loses(trained):
    whole, _ = trained(SGD, None)
    assert trained(SGD, topk(0.01))[0] < whole - 0.01
