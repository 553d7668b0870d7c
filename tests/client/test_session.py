"""Sessions against the server: in its own process over TCP, and in this one."""

import gc
import threading
import time
import uuid

import ml_dtypes
import numpy as np
import pytest

from gradpost import (
    Buffer,
    ClosedError,
    DeadlineExceeded,
    EpochChanged,
    Http,
    RetryPolicy,
    Session,
    StaleGradient,
    Summary,
    TransportError,
    errors,
)
from gradpost.protocol.dtypes import from_bf16, to_bf16

PARAMS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
    "b": np.float32([1.5, -2.0]),
    "s": np.float32(4),
    "e": np.zeros((0, 3), np.float32),
}
GRADS = {name: np.ones_like(value) for name, value in PARAMS.items()}


def fresh():
    return f"t-{uuid.uuid4().hex}"


def make(server, id=None, *, params=PARAMS, rule="sgd", lr=0.5, **more):
    return Session.create(server, id, params=params, rule=rule, lr=lr, **more)


def same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == np.shape(value)
        np.testing.assert_array_equal(ours[name], value)


def after(steps, lr=0.5):
    return {name: value - np.float32(lr * steps) for name, value in PARAMS.items()}


def test_create_push_pull(server):
    with make(server) as trainer:
        same(trainer.pull(), PARAMS)
        base = trainer.version
        summary = trainer.push(GRADS, loss=0.25)
        assert isinstance(summary, Summary)
        assert summary.applied
        assert summary.identified
        assert not summary.replayed
        assert (summary.step, summary.staleness, summary.lr) == (1, 0, 0.5)
        assert (summary.epoch, summary.version) > base
        assert summary.grad_norm == pytest.approx(15**0.5)
        same(trainer.pull(), after(1))
        assert trainer.version == (summary.epoch, summary.version)
        summary, params = trainer.push_pull(GRADS)
        assert summary.step == 2
        same(params, after(2))
        assert trainer.version == (summary.epoch, summary.version)
        assert trainer.retries == 0


def test_attach_takes_what_is_there(server):
    with make(server, dtype="F64") as first, Session.attach(server, first.id) as second:
        assert second.worker != first.worker
        assert second.info()["id"] == first.id
        pulled = second.pull()
        assert pulled["w"].dtype == np.float64
        same(pulled, PARAMS)
    with pytest.raises(errors.SessionUnknown):
        Session.attach(server, fresh())


def test_into_uses_its_memory_again(server):
    buffer = Buffer()
    with make(server) as trainer:
        first = trainer.pull(into=buffer)
        assert buffer.flat is not None
        kept = buffer.flat
        address = first["w"].__array_interface__["data"][0]
        _, second = trainer.push_pull(GRADS, into=buffer)
        third = trainer.pull(names=["w"], into=buffer)
        assert buffer.flat is kept
        assert second["w"].__array_interface__["data"][0] == address
        assert all(np.shares_memory(kept, one["w"]) for one in (first, second, third))
        np.testing.assert_array_equal(second["b"], after(1)["b"])
        np.testing.assert_array_equal(third["w"], after(1)["w"])
        assert not np.shares_memory(trainer.pull()["w"], kept)


def test_large_answers_go_straight_into_the_buffer(server):
    large = {"a": np.arange(300_000, dtype=np.float32), "b": np.float32([7])}
    grads = {"b": np.float32([2]), "a": np.full(300_000, 2, np.float32)}
    buffer = Buffer()
    with make(server, params=large) as trainer:
        same(trainer.pull(into=buffer), large)
        kept = buffer.flat
        _, params = trainer.push_pull(grads, into=buffer)
        assert buffer.flat is kept
        same(params, {name: value - 1 for name, value in large.items()})


def test_names_choose_tensors(server):
    with make(server) as trainer:
        chosen = {name: PARAMS[name] for name in ("w", "s")}
        same(trainer.pull(names=["w", "s"]), chosen)
        same(trainer.pull(names=["s", "w"]), chosen)  # always in the order of the layout
        with pytest.raises(errors.RefusedError, match="nobody"):
            trainer.pull(names=["nobody"])


def test_dtypes_of_answers(server):
    mixed = {"h": np.float16([0.1, 0.2]), "f": np.float32([0.1]), "n": ml_dtypes.bfloat16(0.1)}
    wide = {name: np.asarray(value, np.float32) for name, value in mixed.items()}
    with make(server, params=mixed) as trainer:
        same(trainer.pull(), wide)
        half = trainer.pull(dtype="BF16")
        assert {value.dtype for value in half.values()} == {np.dtype(np.uint16)}
        same(half, {name: to_bf16(value) for name, value in wide.items()})
        assert from_bf16(half["n"]) == np.float32(mixed["n"])
        model = trainer.pull(dtype="model")
        assert [str(value.dtype) for value in model.values()] == ["float16", "float32", "uint16"]
        same({"h": model["h"]}, {"h": mixed["h"]})
        zeros = {name: np.zeros_like(value) for name, value in wide.items()}
        _, double = trainer.push_pull(zeros, dtype="F64")
        assert {value.dtype for value in double.values()} == {np.dtype(np.float64)}
        same(double, wide)


def test_what_numpy_takes_is_converted(server):
    grads = {
        "w": np.ones((4, 3), ">f4").T,  # neither contiguous nor of this machine's byte order
        "b": [1, 1],
        "s": 1.0,
        "e": np.zeros((0, 3), np.int64),
    }
    with make(server) as trainer:
        _, params = trainer.push_pull(grads)
        same(params, after(1))
        _, params = trainer.push_pull({name: np.float64(value) for name, value in GRADS.items()})
        same(params, after(2))
        for narrow in (np.float16, ml_dtypes.bfloat16):
            trainer.push({name: value.astype(narrow) for name, value in GRADS.items()})
        same(trainer.pull(), after(4))
        trainer.push({**GRADS, "b": np.float16([1, 1])})
        same(trainer.pull(), after(5))
        trainer.set_params({"w": np.full((3, 4), 0.1)})
        np.testing.assert_array_equal(trainer.pull()["w"], np.full((3, 4), np.float32(0.1)))


@pytest.mark.parametrize("value", [True, 1j, "1", None, [1, "a"], np.datetime64("2020")], ids=repr)
def test_what_is_no_number_is_a_type_error(application, value):
    with make(application, params={"w": np.float32(1)}) as trainer:
        with pytest.raises(TypeError, match="'w'"):
            trainer.push({"w": value})
        assert trainer.info()["step"] == 0


def test_refused_pushes_change_nothing(server):
    with make(server) as trainer:
        with pytest.raises(errors.TensorMismatch):
            trainer.push({"w": GRADS["w"]})
        with pytest.raises(errors.TensorMismatch):
            trainer.push({**GRADS, "more": np.float32(1)})
        with pytest.raises(errors.Nonfinite):
            trainer.push({**GRADS, "s": np.float32("nan")})
        same(trainer.pull(), PARAMS)
        assert trainer.push(GRADS).step == 1


def test_futures_are_done_in_order(server):
    with make(server, lr=0.125) as trainer:
        futures = [trainer.push_async(GRADS, loss=float(i)) for i in range(8)]
        last = trainer.push_pull_async(GRADS)
        assert [future.result(60).step for future in futures] == list(range(1, 9))
        summary, params = last.result(60)
        assert summary.step == 9
        same(params, after(9, 0.125))
        bad = trainer.push_async({"w": GRADS["w"]})
        with pytest.raises(errors.TensorMismatch):
            bad.result(60)


def test_closing_waits_for_the_background(server):
    with make(server, lr=0.125) as trainer:
        futures = [trainer.push_async(GRADS) for _ in range(5)]
    assert [future.result(0).step for future in futures] == [1, 2, 3, 4, 5]


def test_a_closed_session_says_so(server):
    trainer = make(server)
    trainer.close()
    trainer.close()
    calls = [
        trainer.info,
        trainer.pull,
        trainer.state,
        trainer.delete,
        trainer.history,
        lambda: trainer.push(GRADS),
        lambda: trainer.push_pull(GRADS),
        trainer.settle,
        lambda: trainer.push_async(GRADS),
        lambda: trainer.push_pull_async(GRADS),
        lambda: trainer.set_params(PARAMS),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="attach again"):
            call()
    with Session.attach(server, trainer.id) as again:
        same(again.pull(), PARAMS)


def test_only_its_own_background_outlives_the_close(server):
    """Another session's thread is as closed out as everybody else."""
    with make(server) as other:
        trainer = make(server)
        trainer.close()
        for call in (trainer.info, trainer.pull, lambda: trainer.push(GRADS)):
            with pytest.raises(ClosedError, match="attach again"):
                other._later(call).result(60)
        assert other.push_async(GRADS).result(60).step == 1


def test_a_callback_after_the_close_is_closed_out(server):
    """It runs in the session's thread, but nobody handed it in before."""
    found = []

    def wait():
        while not trainer._closed:
            time.sleep(0.001)
        return trainer.push(GRADS)

    def call(future):
        with pytest.raises(ClosedError) as caught:
            trainer.push(GRADS)
        found.append(caught.value)

    with make(server) as trainer:
        future = trainer._later(wait)
        future.add_done_callback(call)
    assert future.result(0).step == 1
    assert len(found) == 1


def test_state_goes_to_another_session_and_back(server):
    with make(server, rule="adam") as first, make(server, rule="adam") as second:
        for _ in range(3):
            first.push(GRADS)
        state = first.state()
        assert (state.rule, state.step) == ("adam", 3)
        assert state.counts == dict.fromkeys(PARAMS, 3)
        assert set(state.tensors) == {
            f"{slot}/{name}" for slot in ("exp_avg", "exp_avg_sq") for name in PARAMS
        }
        second.set_params(first.pull())
        second.set_state(state)
        again = second.state()
        same(again.tensors, state.tensors)
        assert (again.counts, again.step, again.rule) == (state.counts, state.step, state.rule)
        same(first.push_pull(GRADS)[1], second.push_pull(GRADS)[1])


def test_set_params_begins_an_epoch(server):
    with make(server) as trainer, Session.attach(server, trainer.id) as other:
        trainer.push(GRADS)
        other.pull()
        epoch = other.version[0]
        trainer.set_params({"b": np.float32([9, 9])})
        assert trainer.version[0] == epoch + 1
        with pytest.raises(EpochChanged):
            other.push(GRADS)
        same(other.pull(), {**after(1), "b": np.float32([9, 9])})
        assert other.push(GRADS).applied
        with pytest.raises(errors.PreconditionFailed):
            trainer.set_params(PARAMS, first_only=True)


def test_patch_and_history(server):
    with make(server) as trainer:
        trainer.push(GRADS, loss=0.1)
        assert trainer.patch(optimizer={"lr": 0.25})["optimizer"]["lr"] == 0.25
        assert trainer.push(GRADS, loss=0.2).lr == 0.25
        with pytest.raises(errors.Structural):
            trainer.patch(dtype="F64")
        with pytest.raises(errors.InvalidRequest):
            trainer.patch(optimizer={"lr": -1})
        steps = trainer.history()
        assert [(one["step"], one["loss"], one["lr"]) for one in steps] == [
            (1, 0.1, 0.5),
            (2, 0.2, 0.25),
        ]
        assert [one["step"] for one in trainer.history(after_step=1)] == [2]
        assert len(trainer.history(limit=1)) == 1


def test_delete_ends_it_for_everybody(server):
    with make(server) as first, Session.attach(server, first.id) as second:
        second.pull()
        first.delete()
        first.delete()
        with pytest.raises(errors.SessionGone):
            second.push(GRADS)


def test_a_push_says_what_its_gradient_was_computed_from(server):
    with make(server) as first, make(server, first.id) as late:
        with pytest.raises(errors.NotPulled):
            late.push(GRADS)
        with pytest.raises(errors.NotPulled):
            late.push_pull(GRADS)
        assert late.push(GRADS, base_version=first.version).step == 1
        late.pull()
        assert late.push(GRADS).staleness == 0


def test_the_first_of_two_workers_initialises(server):
    id = fresh()
    other = {name: value + 1 for name, value in PARAMS.items()}
    with (
        make(server, id, worker="a b") as first,
        make(server, id, params=other, worker="a b") as second,
    ):
        assert first.worker.startswith("a-b-")
        assert first.worker != second.worker
        same(second.pull(), PARAMS)
        assert first.push(GRADS).step == 1
        assert second.push(GRADS).staleness == 1
        same(first.pull(), after(2))


def test_created_otherwise_is_refused(server):
    with make(server) as trainer:
        with pytest.raises(errors.SpecDiffers) as caught:
            make(server, trainer.id, lr=0.25)
        assert "lr" in str(caught.value.problem)
        same(trainer.pull(), PARAMS)
    with pytest.raises(TypeError, match="rule="):
        Session.create(server, fresh())
    with pytest.raises(TypeError, match="rule="):
        Session.create(server, fresh(), rule="sgd", optimizer={"rule": "sgd"})


def test_many_threads_share_a_session(server):
    with make(server, lr=0.125) as trainer:
        steps = []
        work = [
            threading.Thread(
                target=lambda: steps.extend(trainer.push(GRADS).step for _ in range(5))
            )
            for _ in range(4)
        ]
        for one in work:
            one.start()
        for one in work:
            one.join(60)
        assert sorted(steps) == list(range(1, 21))
        same(trainer.pull(), after(20, 0.125))


def test_a_stale_gradient_is_told_where_the_model_is(server):
    with make(server, update={"max_staleness": 0}) as first:
        with Session.attach(server, first.id) as second:
            first.pull()
            second.pull()
            at = second.push(GRADS)
            with pytest.raises(StaleGradient) as caught:
                first.push(GRADS)
            assert (caught.value.epoch, caught.value.version) == (at.epoch, at.version)
            assert not caught.value.retryable
            first.pull()
            assert first.push(GRADS).staleness == 0


def test_a_version_is_awaited(server):
    with make(server) as first, Session.attach(server, first.id) as second:
        first.pull()
        second.pull()
        epoch, version = first.version
        with pytest.raises(errors.VersionPending):
            first.pull(min_version=(epoch, version + 1), wait_s=0)
        thread = threading.Thread(target=lambda: second.push(GRADS))
        thread.start()
        same(first.pull(min_version=(epoch, version + 1), wait_s=30), after(1))
        thread.join()


def test_keys(locked):
    with make(locked, api_key="a-key-for-tests") as trainer:
        same(trainer.push_pull(GRADS)[1], after(1))
        for key, refusal in ((None, errors.KeyMissing), ("wrong", errors.KeyWrong)):
            with pytest.raises(refusal):
                Session.attach(locked, trainer.id, api_key=key)
            with pytest.raises(refusal):
                make(locked, api_key=key)
    gc.collect()  # a connection left open by a refusal would be a ResourceWarning


def test_the_key_comes_from_the_environment(locked, monkeypatch):
    monkeypatch.setenv("GRADPOST_API_KEY", "a-key-for-tests")
    with make(locked) as trainer, Session.attach(locked, trainer.id) as other:
        same(other.pull(), PARAMS)


def test_nobody_there_is_a_deadline(tmp_path):
    policy = RetryPolicy(deadline_s=0.2)
    for url in (f"http+unix://{tmp_path}/none", "http://127.0.0.1:1"):
        with pytest.raises(DeadlineExceeded) as caught:
            Session.attach(url, "m", policy=policy)
        assert isinstance(caught.value.last, TransportError)


@pytest.mark.parametrize("url", ["", "host:1", "ftp://host", "http://", "unix:/x"])
def test_other_urls_are_value_errors(url):
    with pytest.raises(ValueError, match="no url"):
        Http(url, proxy="")


def test_ids_are_quoted(server):
    with pytest.raises(errors.RefusedError) as caught:
        make(server, "a/../b?c#d")
    assert 400 <= caught.value.status < 500
