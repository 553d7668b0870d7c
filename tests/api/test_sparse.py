"""Rows of a matrix over HTTP: taken alone where the rule is lazy, else as a dense gradient."""

import numpy as np
import pytest

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.tensors import build_header
from tests.api.conftest import check_problem

TABLE = np.arange(40, dtype=np.float32).reshape(10, 4) / 7
PARAMS = {"emb": TABLE.tolist(), "b": [1.0, 2.0]}
STEPS = "/v1/sessions/m/steps"
RULES = {
    "sgd": {"rule": "sgd", "lr": 0.5},
    "adagrad": {"rule": "adagrad", "lr": 0.5},
    "adam": {"rule": "adam", "lr": 0.5},
}


def container(idx, rows, dtype="F32", **others):
    parts = {"emb#idx": ("I64", np.asarray(idx, np.int64)), **others}
    parts["emb#rows"] = (dtype, np.asarray(rows, np.float32))
    parts["b"] = (dtype, np.ones(2, np.float32))
    body = build_header([(n, d, a.shape) for n, (d, a) in parts.items()], None)
    return body + b"".join(a.tobytes() for _, a in parts.values())


def push(api, idx, rows, query=""):
    return api.call("POST", f"{STEPS}{query}", container(idx, rows), content_type=SAFETENSORS)


def table(api, name="m"):
    found = api.call("GET", f"/v1/sessions/{name}/params").json["params"]
    return np.array(found["emb"], np.float32)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rows_that_came_move_as_the_dense_gradient_moves_them(api, rule, lazy):
    rng = np.random.default_rng(7)
    for name, optimizer in (("m", {**RULES[rule], "lazy": lazy}), ("n", RULES[rule])):
        api.make(name, PARAMS, optimizer=optimizer)
    for step in range(3):
        idx, rows = [7, 2, 7], rng.integers(-8, 9, (3, 4)).astype(np.float32)
        dense = np.zeros((10, 4), np.float32)
        np.add.at(dense, idx, rows)
        assert push(api, idx, rows).status == 200, step
        assert api.push("n", {"emb": dense.tolist(), "b": [1.0, 1.0]}).status == 200
        if lazy:
            assert table(api)[[0, 1, 3, 4, 5, 6, 8, 9]].tobytes() == (
                TABLE[[0, 1, 3, 4, 5, 6, 8, 9]].tobytes()
            )
            assert table(api)[[2, 7]].tobytes() == table(api, "n")[[2, 7]].tobytes()
        else:
            assert table(api).tobytes() == table(api, "n").tobytes()


def test_the_same_rows_in_another_order_and_form_are_a_replay(api):
    api.make("m", PARAMS, optimizer={**RULES["adam"], "lazy": True})
    query = "?worker=w&sequence=1&base_version=1"
    first = push(api, [3, 5], [[1, 2, 3, 4], [5, 6, 7, 8]], query)
    assert (first.status, first.json["replayed"]) == (200, False)
    again = push(api, [5, 3], [[5, 6, 7, 8], [1, 2, 3, 4]], query)
    assert again.json == {**first.json, "replayed": True}
    body = {
        "grads": {"emb": {"idx": [3, 5], "rows": [[1, 2, 3, 4], [5, 6, 7, 8]]}, "b": [1, 1]},
        "worker": "w", "sequence": 1, "base_version": 1,
    }  # fmt: skip
    assert api.call("POST", STEPS, body).json == again.json
    check_problem(push(api, [3, 6], [[1, 2, 3, 4], [5, 6, 7, 8]], query), 422, "key-reused")


BAD = {
    "negative": ([-1, 2], [[1] * 4] * 2),
    "beyond the last": ([10], [[1] * 4]),
    "fewer rows than indices": ([1, 2], [[1] * 4]),
    "rows too wide": ([1], [[1] * 5]),
    "not finite": ([1], [[1, 2, 3, np.inf]]),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_change_nothing(api, case, lazy):
    api.make("m", PARAMS, optimizer={**RULES["adam"], "lazy": lazy})
    before = api.everything()
    check_problem(push(api, *BAD[case]), 422)
    assert api.everything() == before


@pytest.mark.parametrize("rule", ["lion", "rmsprop", "adamw", "lamb"])
def test_rules_without_a_lazy_form(api, rule):
    api.make("m", PARAMS, rule=rule)
    before = api.everything()
    check_problem(push(api, [1], [[1] * 4]), 422, "sparse-unsupported")
    assert api.everything() == before


def test_rounds_take_rows_as_dense_gradients(api):
    update = {"mode": "sync", "workers": 2, "round_timeout_s": 60}
    api.make("m", PARAMS, optimizer=RULES["sgd"], update=update)
    for worker, row in (("a", 1), ("b", 2)):
        query = f"?worker={worker}&sequence=1&base_version=1"
        reply = push(api, [row], [[8, 8, 8, 8]], query)
    assert reply.json["contributions"] == 2
    moved = TABLE - table(api)
    assert np.allclose(moved[[1, 2]], 2.0)  # lr 0.5 of the mean
    assert not moved[[0, *range(3, 10)]].any()


def test_rounds_have_no_lazy_updates(api):
    update = {"mode": "sync", "workers": 2, "round_timeout_s": 60}
    api.make("m", PARAMS, optimizer={**RULES["sgd"], "lazy": True}, update=update)
    before = api.everything()
    query = "?worker=a&sequence=1&base_version=1"
    check_problem(push(api, [1], [[1] * 4], query), 422, "sparse-unsupported")
    assert api.everything() == before
