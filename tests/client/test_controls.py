"""Groups, control values of a push, averages and schedules, as the client sends them."""

import pickle
import uuid

import numpy as np
import pytest

from gradpost import Buffer, EpochChanged, Session, bf16, errors
from gradpost.protocol.dtypes import from_bf16, to_bf16

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32([4])}
ONES = {name: np.ones_like(value) for name, value in PARAMS.items()}


def make(server, id=None, *, rule="sgd", lr=1.0, **more):
    session = Session.create(server, id, params=PARAMS, rule=rule, lr=lr, **more)
    session.pull()
    return session


def test_what_a_session_may_be_created_with(server):
    stated = {
        "groups": [{"name": "bias", "params": ["b"], "lr": 0.5}],
        "clip": {"global_norm": 1.0},
        "schedule": {"kind": "linear", "total_steps": 10},
        "ema": {"decay": 0.5},
        "norms": True,
        "missing": "skip",
    }
    with make(server, **stated) as session:
        found = session.info()
        assert {name: found[name] for name in ("clip", "ema", "norms", "missing")} == {
            name: stated[name] for name in ("clip", "ema", "norms", "missing")
        }
        assert (found["groups"][0]["name"], found["groups"][0]["lr"]) == ("bias", 0.5)
        assert session.schedule(2) == {"default": [1.0, 0.9], "bias": [0.5, 0.45]}
        assert session.push({"w": ONES["w"]}).update_norm is not None


def test_overrides_and_grad_scale_are_of_one_push(server):
    with make(server) as session:
        summary, params = session.push_pull(
            ONES, overrides={"default": {"lr": 0.5}}, grad_scale=2.0
        )
        assert summary.lr == 0.5
        np.testing.assert_array_equal(params["w"], PARAMS["w"] - 0.25)
        assert session.push(ONES, overrides={"default": {"lr": 0.25}}).lr == 0.25
        assert session.push_async(ONES, grad_scale=4.0, overrides={}).result(60).lr == 1.0
        np.testing.assert_array_equal(session.pull()["b"], PARAMS["b"] - 0.25 - 0.25 - 0.25)
        with pytest.raises(errors.InvalidRequest, match="No such group"):
            session.push(ONES, overrides={"defualt": {"lr": 1}})
        with pytest.raises(ValueError, match="not JSON compliant"):
            session.push(ONES, overrides={"default": {"lr": float("nan")}})


def test_a_group_is_added_once(server):
    with make(server) as session:
        before = session.version
        found = session.add_group("more", {"c": np.float32([5, 6])}, lr=0.5)
        assert found["groups"][0]["lr"] == 0.5
        assert session.version == (before[0], before[1] + 1)  # nobody has pushed in between
        session.add_group("more", {"c": np.float32([7, 8])}, lr=0.5)  # there it is already
        np.testing.assert_array_equal(session.pull()["c"], [5, 6])
        session.push({**ONES, "c": np.float32([1, 1])})
        session.add_group("more", {"c": np.float32([7, 8])}, lr=0.5)
        assert session.version == (before[0], before[1] + 1)
        session.add_group("last", {"d": np.float32([1])})  # somebody may have pushed
        assert session.version == (before[0], before[1] + 1)
        np.testing.assert_array_equal(session.pull()["c"], [4.5, 5.5])
        with pytest.raises(errors.SpecDiffers):
            session.add_group("more", {"c": np.float32([5, 6])}, lr=0.25)
        with pytest.raises(errors.TensorMismatch):
            session.add_group("again", {"w": PARAMS["w"]})


def test_the_average_is_no_base_of_gradients(server):
    with make(server, ema={"decay": 0.5}) as session:
        base = session.version
        summary = session.push(ONES)
        average = session.pull(of="ema")
        np.testing.assert_array_equal(average["w"], PARAMS["w"] - 0.5)
        assert session.version == base
        session.pull()
        assert session.version == (summary.epoch, summary.version)
    with make(server) as session, pytest.raises(errors.AverageMissing):
        session.pull(of="ema")


def test_a_push_names_the_incarnation_that_it_was_computed_in(server):
    name = uuid.uuid4().hex
    with make(server, name) as first:
        first.delete()
        with make(server, name) as second:
            second.push(ONES)
            for _ in range(2):
                with pytest.raises(EpochChanged, match="created anew"):
                    first.push(ONES, base_version=second.version)
            first.pull()
            assert first.push(ONES).step == 2
            second.delete()
        with make(server, name) as third:
            first.set_params(PARAMS)  # which says which one it went to
            assert first.push(ONES).step == 1
            third.delete()


def test_a_state_says_when_it_was_read_and_keeps_its_scalars(server):
    with make(server, rule="nadam") as session, make(server, rule="nadam") as other:
        session.push(ONES)
        state = session.state()
        assert (state.epoch, state.version, state.step) == (1, 2, 1)
        assert state.scalars["w"].keys() == {"mu_product"}
        other.set_state(state)
        found = other.state()
        assert (found.scalars, found.counts) == (state.scalars, {"w": 1, "b": 1})
        assert (found.epoch, found.version) == (2, 1)
        assert pickle.loads(pickle.dumps(state)).scalars == state.scalars


def test_a_buffer_knows_its_version(server):
    buffer = Buffer()
    assert buffer.version is None
    with make(server) as session:
        session.push_pull(ONES, into=buffer)
        assert buffer.version == session.version == (1, 2)


# bfloat16


def test_bits_of_bfloat16_have_to_be_marked(server):
    bits = {name: to_bf16(value) for name, value in ONES.items()}
    with make(server) as session:
        marked = {name: bf16(value) for name, value in bits.items()}
        _, params = session.push_pull(marked, dtype="BF16")
        np.testing.assert_array_equal(from_bf16(params["w"]), [0, 1, 2])
        session.set_params({name: bf16(value) for name, value in params.items()})
        np.testing.assert_array_equal(session.pull()["w"], [0, 1, 2])
        for call in (session.push, session.set_params):
            with pytest.raises(TypeError, match=r"'w' is uint16: say gradpost\.bf16"):
                call(params)
        with pytest.raises(TypeError, match="bits are uint16, not float32"):
            bf16(PARAMS["w"])


def test_marked_bits_of_every_shape_beside_other_dtypes(server):
    strided = to_bf16(np.arange(12, dtype=np.float32).reshape(3, 4)).T
    params = {"t": bf16(strided), "s": bf16(np.array(to_bf16(np.float32(2)))), "f": np.float32(1)}
    with Session.create(server, params=params, rule="sgd", lr=1.0) as session:
        np.testing.assert_array_equal(session.pull()["t"], np.arange(12).reshape(3, 4).T)
        _, found = session.push_pull(params)  # of several dtypes: all go in the session's
        assert all(not value.any() for value in found.values())


def test_the_bits_are_not_copied():
    from gradpost.tensors import encode

    bits = to_bf16(np.ones((4, 5), np.float32))
    _, part = encode({"w": bf16(bits)}, "F32")
    assert np.shares_memory(np.frombuffer(part, np.uint8), bits)
