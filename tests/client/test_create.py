"""What a creation leaves behind when it fails, and what it says of a session that is there."""

import logging

import numpy as np
import pytest

from gradpost import InProcess, Session, TransportError, bf16, errors
from gradpost.protocol.dtypes import to_bf16
from service.app import create_app
from service.settings import Settings
from tests.client.scripted import Clock, Scripted, done
from tests.client.test_retry import session as scripted_session

START = {"w": np.arange(3, dtype=np.float32)}
GRADS = {"w": np.ones(3, np.float32)}


@pytest.fixture(scope="module")
def server():
    with InProcess(create_app(Settings(warm_rules=(), max_sessions=100))) as found:
        yield found


def test_a_failed_creation_leaves_no_empty_session_in_the_way(server):
    with pytest.raises(errors.Nonfinite):
        Session.create(server, "x", params={"w": np.float32([np.nan])}, rule="sgd")
    with Session.create(server, "x", params=START, rule="sgd", lr=0.5) as session:
        assert not session.attached
        assert session.pull()["w"].tolist() == [0, 1, 2]


def test_one_that_was_there_is_left_alone_and_says_so(server):
    with Session.create(server, "there", params=START, rule="sgd") as first:
        with Session.create(server, "there", params={"w": np.zeros(3)}, rule="sgd") as second:
            assert second.attached
            assert second.pull()["w"].tolist() == [0, 1, 2]
        with Session.attach(server, "there") as third:
            assert third.attached
        for other in ({"w": np.zeros(4)}, {"v": np.zeros(3)}, {"w": np.zeros(3), "v": np.zeros(1)}):
            with pytest.raises(errors.SpecDiffers, match="not those of params"):
                Session.create(server, "there", params=other, rule="sgd")
        assert first.info()["step"] == 0


def test_bfloat16_bits_are_marked_or_refused(server):
    bits = to_bf16(np.float32([1.0, -2.0, 0.5]))
    with Session.create(server, "bf", params={"w": bf16(bits)}, rule="sgd", lr=1.0) as session:
        assert session.pull()["w"].tolist() == [1.0, -2.0, 0.5]
        session.push({"w": bf16(bits)})
        assert session.pull()["w"].tolist() == [0.0, 0.0, 0.0]
        for call in (session.push, session.set_params):
            with pytest.raises(TypeError, match="bf16"):
                call({"w": bits})
        with pytest.raises(TypeError, match="uint16"):
            bf16(np.float32([1.0]))


def test_everything_of_a_specification_goes_through(server):
    spec = {
        "groups": [{"name": "b", "params": ["b"], "lr": 0.5}],
        "clip": {"global_norm": 100.0},
        "schedule": {"kind": "linear", "total_steps": 10},
        "ema": {"decay": 0.5},
        "norms": True,
        "missing": "skip",
    }
    start = {"w": np.zeros(2, np.float32), "b": np.float32(1)}
    with Session.create(
        server, "all", params=start, rule="sgd", lr=np.float32(1), **spec
    ) as session:
        rates = session.schedule(3)
        assert rates["b"] == [0.5, 0.45, 0.4]
        summary, params = session.push_pull(
            {"w": np.float32([2, 4])}, grad_scale=2.0, overrides={"default": {"lr": 0.5}}
        )
        assert params["w"].tolist() == [-0.5, -1.0]
        assert (summary.lr, summary.clipped, summary.update_norm) == (0.5, False, 1.25**0.5)
        assert session.pull(of="ema")["w"].tolist() == [-0.25, -0.5]
        assert session.pull(names="b")["b"] == 1
        assert session.add_group("late", {"c": np.zeros(1)}, lr=2.0)["layout"][-1]["name"] == "c"
        session.push({"c": np.float32([1])})
        state = session.state()
        assert (state.epoch, state.version, state.step) == (1, session.info()["version"], 2)


def test_a_loss_that_is_not_finite_is_left_out(server):
    with Session.create(server, "nan", params=START, rule="sgd", on_nonfinite="skip") as session:
        session.pull()
        grads = {"w": np.float32([np.nan, 0, 0])}
        assert session.push(grads, loss=float("nan")).skipped == "nonfinite"
        assert session.history()[0]["loss"] is None


@pytest.mark.parametrize("base", [1, (1,), (1, 2, 3), "1-2", (1, 2.0)])
def test_a_base_version_of_another_type(server, base):
    with Session.create(server, "base", params=START, rule="sgd") as session:
        with pytest.raises(TypeError, match="base_version"):
            session.push(GRADS, base_version=base)


def test_hyperparameters_json_can_not_carry(server):
    with pytest.raises(ValueError, match="NaN"):
        Session.create(server, "json", rule="sgd", lr=float("nan"))
    with pytest.raises(TypeError, match="no number"):
        Session.create(server, "json", rule="sgd", lr=object())


def test_the_first_retry_of_a_call_is_told_in_the_log(caplog):
    failing = Scripted(*[TransportError("refused")] * 3, done)
    with caplog.at_level(logging.WARNING, "gradpost"), scripted_session(failing, Clock()) as one:
        one.push({"w": np.ones(1, np.float32)})
    assert len(caplog.records) == 1
    assert "Trying again, for" in caplog.text
