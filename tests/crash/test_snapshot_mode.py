"""Durability `snapshot`: after kill -9 a session is at its last snapshot, and everyone is told."""

import itertools
import json

import pytest

from service.storage import check as fsck
from tests.crash.inspection import state_digest
from tests.crash.models import BOUNDED, MODELS
from tests.crash.wire import Connection, Lost
from tests.crash.workload import RAW, SAFE, digest

NEXT, SAME, LATER = {1}, {0}, {1, 2}
KILLS = [
    ("run:commit.INDEX_NAME.before:1", NEXT),  # the first snapshot of this server does not count
    ("run:commit.INDEX_NAME.after:1", NEXT),  # it does
    ("run:pwrite.spare.torn:4", NEXT),
    ("run:fsync.SNAPSHOT.before:2", NEXT),
    ("run:rename.spare.after:2", NEXT),
    ("run:checkpoint.INDEX_NAME.before:2", NEXT),
    ("run:rename.snap.before:2", NEXT),
    ("run:answer.steps.before:60", NEXT),
    ("run:answer.steps.after:60", NEXT),
    ("stop:commit.INDEX_NAME.before:1", NEXT),  # the last one came too late
    ("stop:commit.INDEX_NAME.after:1", SAME),  # nothing is lost
    ("start:commit.INDEX_NAME.before:1", LATER),
    ("start:commit.INDEX_NAME.after:1", LATER),
    ("run:pwrite.spare.before:3", NEXT),
    (None, SAME),
]
BOUNDED_KILLS = [
    ("run:commit.INDEX_NAME.after:1", NEXT),
    ("run:answer.bounded.before:60", NEXT),
    ("run:answer.bounded.after:60", NEXT),
    ("stop:commit.INDEX_NAME.after:1", SAME),
    (None, SAME),
]


class Trainer:
    """One worker, who keeps what it was told."""

    def __init__(self, model):
        self.model = model
        self.path = f"/v1/sessions/{model.name}"
        self.sequences = itertools.count(1)
        self.told = {}
        """By sequence: the base and the summary of each push that the session still knows."""
        self.params = {}
        """By step: what the parameters were after it."""
        self.at = (1, 1)
        self.floor = 0
        """The step that was there when the last server began."""

    def create(self, port):
        with Connection(port) as connection:
            spec = {**self.model.spec, "durability": "snapshot"}
            spec.pop("log_slots")
            self.incarnation = connection.ask("PUT", self.path, spec).json["incarnation"]
            body = self.model.upload(1)
            done = connection.ask(
                "PUT", f"{self.path}/params", body.data, content_type=body.content_type
            )
            assert done.status == 200, done

    def ask(self, connection, sequence, base, **headers):
        body = self.model.push("w", sequence)
        query = f"worker=w&sequence={sequence}&base_version={base[0]}-{base[1]}"
        return connection.ask(
            "POST", f"{self.path}/steps?{query}&incarnation={self.incarnation}", body.data,
            content_type=body.content_type, **headers,
        )  # fmt: skip

    def train(self, server, pushes):
        """Pushes until so many are answered, or the server is gone; whether it is there."""
        try:
            with Connection(server.port) as connection:
                for _ in range(pushes):
                    sequence = next(self.sequences)
                    answer = self.ask(connection, sequence, self.at, accept=RAW)
                    assert answer.status == 200, answer
                    summary = json.loads(answer.headers["gradpost-summary"])
                    assert not summary["replayed"]
                    self.told[sequence] = self.at, summary
                    self.at = summary["epoch"], summary["version"]
                    self.params[summary["step"]] = digest(answer.body)
        except Lost:
            return False
        return True

    def look(self, server, epochs):
        """What a restarted server has is what a snapshot can have held, and it says so."""
        with Connection(server.port) as connection:
            now = connection.ask("GET", self.path).json
            epoch, version, step = now["epoch"], now["version"], now["step"]
            assert now["incarnation"] == self.incarnation
            assert epoch - self.at[0] in epochs
            if epoch == self.at[0]:
                assert (version, step) == (self.at[1], max(self.params))
            else:
                assert version == 1
                assert self.floor <= step <= max(self.params, default=0) + 1
            params = connection.ask("GET", f"{self.path}/params", accept=RAW)
            if step in self.params:
                assert digest(params.body) == self.params[step]
            self._are_told(connection, epoch, step)
        self.params = {at: value for at, value in self.params.items() if at <= step}
        self.at, self.floor = (epoch, version), step
        return step

    def _are_told(self, connection, epoch, step):
        """Of what is there a retry gets the first answer; of the rest that history was cut."""
        kept = [number for number, (_, done) in self.told.items() if done["step"] <= step]
        for sequence, (base, summary) in list(self.told.items())[-30:]:
            answer = self.ask(connection, sequence, base)
            if sequence in kept:
                assert answer.json == summary | {"replayed": True}
            else:
                assert (answer.status, answer.slug) == (409, "epoch-changed")
                assert answer.json["epoch"] == epoch
        self.told = {number: self.told[number] for number in kept}
        # Else the last one is a push whose answer was lost.
        if kept and self.told[kept[-1]][1]["step"] == step:
            answer = connection.ask("GET", f"{self.path}/workers/w").json
            assert (answer["highest"], answer["next_sequence"]) == (kept[-1], kept[-1] + 1)
            assert answer["last"]["step"] == step


@pytest.mark.parametrize(("model", "kills"), [(MODELS[0], KILLS), (BOUNDED, BOUNDED_KILLS)])
def test_a_session_comes_back_as_its_last_snapshot_had_it(fleet, scratch, model, kills):
    folder, trainer = scratch / "data", Trainer(model)
    server = fleet.start(folder, snapshot_interval=60)
    assert server.wait_ready()
    trainer.create(server.port)
    assert trainer.train(server, 20)
    server.stop()
    assert server.wait_gone(60)
    epochs, exact, steps = SAME, 20, []
    for kill, then in kills:
        gently = kill is None or kill.startswith("stop:")  # no snapshot but the last one
        server = fleet.start(folder, kill, snapshot_interval=60 if gently else 0.05)
        if not server.wait_ready():
            assert kill.startswith("start:")
            epochs = then
            continue
        step = trainer.look(server, epochs)
        assert exact in (None, step)
        steps.append(step)
        lives = trainer.train(server, 20 if gently else 5000)
        if lives:
            server.stop()
        assert server.wait_gone(60)
        assert server.killed == (kill is not None)
        assert fsck.run(folder) == fsck.CLEAN, kill
        epochs = then
        exact = step if kill == "run:commit.INDEX_NAME.before:1" else None
        if kill == "run:commit.INDEX_NAME.after:1":
            trainer.floor = step + 1  # more than before
    server = fleet.start(folder)
    assert server.wait_ready()
    trainer.look(server, SAME)
    assert max(steps) > 6 * len(kills)
    _compare(fleet, trainer, server)


def _compare(fleet, trainer, server):
    """What survived, trained by a server that was never killed, ends at the same bits."""
    twin = fleet.start()
    assert twin.wait_ready()
    with Connection(twin.port) as other, Connection(server.port) as ours:
        spec = {**trainer.model.spec}
        for name in ("log_slots", "update"):
            spec.pop(name, None)
        assert other.ask("PUT", trainer.path, spec).status == 201
        body = trainer.model.upload(1)
        other.ask("PUT", f"{trainer.path}/params", body.data, content_type=body.content_type)
        held = ours.ask("GET", f"{trainer.path}/workers/w").json["ranges"]
        survived = {n for begin, end in held for n in range(begin, end + 1)} | set(trainer.told)
        for sequence in sorted(survived):
            gradient = trainer.model.push("w", sequence)
            done = other.ask(
                "POST", f"{trainer.path}/steps", gradient.data, content_type=gradient.content_type
            )
            assert done.status == 200, done
        for query, seen, media in (("params", digest, RAW), ("state", state_digest, SAFE)):
            pair = [
                one.ask("GET", f"{trainer.path}/{query}", accept=media) for one in (ours, other)
            ]
            assert seen(pair[0].body) == seen(pair[1].body)
    for one in (twin, server):
        one.kill()
