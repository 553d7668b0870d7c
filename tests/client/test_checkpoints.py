"""Checkpoints through the client, with answers that are lost."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from gradpost import InProcess, RetryPolicy, Session, errors
from service.app import create_app
from service.settings import Settings
from tests.client.lossy import Lossy
from tests.client.scripted import Clock

PARAMS = {"w": np.float32([1, 2, 3]), "b": np.float32(4)}
GRADS = {"w": np.float32([1, -1, 2]), "b": np.float32(1)}


@pytest.fixture(scope="module")
def application(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "data"
    with InProcess(create_app(Settings(data_dir=folder, log_level="error"))) as transport:
        yield transport


@pytest.fixture
def lossy(application):
    return Lossy(application)


@pytest.fixture
def trainer(lossy):
    clock = Clock()
    policy = RetryPolicy(deadline_s=10.0, sleep=clock.sleep, clock=clock)
    with Session.create(
        lossy, params=PARAMS, rule="adam", lr=0.5, durability="log", log_slots=8, policy=policy
    ) as session:
        session.pull()
        session.push_pull(GRADS)
        yield session
        lossy.heal()
        session.delete()


def everything(session):
    state = session.state()
    return session.pull(), state.tensors, state.counts, state.step


def same(ours, theirs):
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert ours[2:] == theirs[2:]


def test_there_and_back(trainer):
    kept = everything(trainer)
    made = trainer.checkpoints.make("first")
    assert trainer.checkpoints.list() == [made]
    trainer.push_pull(GRADS)
    trainer.checkpoints.restore("first")
    same(everything(trainer), kept)
    assert trainer.version == (2, 1)
    trainer.push_pull(GRADS)
    trainer.checkpoints.delete("first")
    trainer.checkpoints.delete("first")
    assert trainer.checkpoints.list() == []
    with pytest.raises(errors.CheckpointUnknown):
        trainer.checkpoints.restore("first")


def test_a_file_goes_into_another_session(trainer, lossy, tmp_path):
    trainer.checkpoints.make("first")
    path = trainer.checkpoints.download("first", tmp_path / "model.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
    kept = everything(trainer)
    found = load_file(path)
    np.testing.assert_array_equal(found["params/w"], kept[0]["w"])
    np.testing.assert_array_equal(found["exp_avg/w"], kept[1]["exp_avg/w"])
    with Session.create(lossy, rule="adam", lr=0.5) as other:
        other.checkpoints.restore(file=path)
        same(everything(other), kept)
        with pytest.raises(ValueError, match="not both"):
            other.checkpoints.restore("a", file=path)
        other.delete()
    with Session.create(lossy, rule="sgd", lr=0.5) as other:
        with pytest.raises(errors.InvalidRequest, match="rule adam"):
            other.checkpoints.restore(file=path)
        other.checkpoints.restore(file=path, scope="params")
        np.testing.assert_array_equal(other.pull()["w"], kept[0]["w"])
        other.delete()


def test_a_download_that_breaks_off_leaves_what_was_there(trainer, lossy, tmp_path):
    trainer.checkpoints.make("first")
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    lossy.lose("GET", 100)
    with pytest.raises(errors.DeadlineExceeded):
        trainer.checkpoints.download("first", target)
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("deliver", [True, False])
@pytest.mark.parametrize("name", ["best", None])
def test_a_lost_answer_makes_one_checkpoint(trainer, lossy, name, deliver):
    lossy.lose("POST", deliver=deliver)
    made = trainer.checkpoints.make(name)
    assert trainer.checkpoints.list() == [made]


def test_a_name_that_is_taken_is_refused(trainer, lossy):
    trainer.checkpoints.make("best")
    lossy.lose("POST")
    with pytest.raises(errors.CheckpointExists):
        trainer.checkpoints.make("best")


@pytest.mark.parametrize("deliver", [True, False])
def test_a_restore_whose_answer_is_lost_is_taken_once(trainer, lossy, application, deliver):
    trainer.checkpoints.make("first")
    kept = everything(trainer)

    def step():
        with Session.attach(application, trainer.id) as other:
            other.pull()
            other.push(GRADS)

    lossy.after = step  # a worker goes on between the lost attempt and its retry
    lossy.lose("POST", deliver=deliver)
    trainer.checkpoints.restore("first")
    info = trainer.info()
    assert info["epoch"] == 2
    assert info["step"] == kept[3] + deliver
