"""kill -9 between contributions, between the last one and the update, and before the answers.

No contribution is lost, none counts twice, and a round is applied once, on exactly its members.
`make crash` does the same a hundred times as often.
"""

import itertools
import json
import subprocess
import sys

from service.storage import check as fsck
from tests.crash.campaign import ROUNDS, Campaign
from tests.crash.fleet import ROOT
from tests.crash.history import bare
from tests.crash.inspection import state_digest
from tests.crash.models import ARRIVAL
from tests.crash.plan import Plan
from tests.crash.points import ROUND_POINTS
from tests.crash.reduction import reduced
from tests.crash.table import Table
from tests.crash.wire import Connection, Lost
from tests.crash.workload import RAW, SAFE, digest

MOST = 110


def test_rounds_survive_a_kill_at_every_point_of_theirs(fleet, reference, scratch):
    plan = Plan(seed=1, wanted=ROUND_POINTS.__contains__)
    with Campaign(fleet, scratch / "data", plan, 1, ROUNDS, wait_cap=2) as campaign:
        campaign.stop(2.0)
        while not all(plan.kills[one] for one in ROUND_POINTS) and campaign.kills < MOST:
            campaign.kill(plan.next())
        report = campaign.finish(reference)
    table = Table()
    table.add(report)
    found = [*map(str, report.violations[:50]), fleet.said()]
    assert not report.violations, "\n".join(found)
    assert not [point for point in ROUND_POINTS if not plan.kills[point]]
    assert report.pushes > 10 * campaign.kills, table
    check = [sys.executable, "-m", "service", "check", "--data-dir", scratch / "data"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    print(f"\n{table}\n{report.pushes} contributions in {report.seconds:.0f} s")


def test_a_round_that_comes_back_whole_ends_though_nobody_pushes(fleet, scratch):
    """Killed between the last contribution and the end; all who were told 202 ask, and no more."""
    server = fleet.start(scratch / "data", "run:pwrite.ring-applied.before:1")
    assert server.wait_ready()
    pair = Pair({**MODEL.spec, "durability": "log"})
    pair.create(server.port)
    assert not pair.train(server, 1)
    assert server.wait_gone(60)
    assert server.killed
    server = fleet.start(scratch / "data")
    assert server.wait_ready()
    with Connection(server.port) as connection:
        found = connection.ask("GET", f"{PATH}/rounds/1", prefer="wait=20").json
        assert (found["status"], found["contributions"]) == ("applied", 2)
        for worker in "ab":
            again = pair.ask(connection, (worker, 1), (1, 1))
            assert again.json["replayed"]
            assert bare(again.json) == bare(found["summary"])
    server.kill()


# Durability `snapshot`

MODEL = ARRIVAL._replace(
    name="pair",
    spec={
        "optimizer": {"rule": "adam", "lr": 0.01},
        "durability": "snapshot",
        "update": {"mode": "sync", "workers": 2, "round_timeout_s": 600},
    },
    weights=(1.0, 0.5, 2.0),
)
PATH = f"/v1/sessions/{MODEL.name}"
NEXT, SAME, LATER = {1}, {0}, {1, 2}
KILLS = [
    ("run:commit.INDEX_NAME.before:1", NEXT),
    ("run:commit.INDEX_NAME.after:2", NEXT),
    ("run:pwrite.spare.torn:4", NEXT),
    ("run:answer.contribution.after:30", NEXT),
    ("run:answer.round.before:90", NEXT),
    ("run:rename.snap.before:2", NEXT),
    ("stop:commit.INDEX_NAME.before:1", NEXT),
    ("stop:commit.INDEX_NAME.after:1", SAME),
    ("start:commit.INDEX_NAME.after:1", LATER),
    (None, SAME),
]


class Pair:
    """Two workers of one round after another, who keep what they were told."""

    def __init__(self, spec):
        self.spec = spec
        self.sequences = itertools.count(1)
        self.told = {}
        """By key, what is still known: the base, and the summary; None: its round is open."""
        self.rounds = {}
        """By step: the keys of its round, in order."""
        self.params = {}
        self.at = (1, 1)
        self.floor = 0
        self.flying = set()
        """Keys whose answer was lost."""

    def create(self, port):
        with Connection(port) as connection:
            self.incarnation = connection.ask("PUT", PATH, self.spec).json["incarnation"]
            body = MODEL.upload(1)
            done = connection.ask(
                "PUT", f"{PATH}/params", body.data, content_type=body.content_type
            )
            assert done.status == 200, done

    def ask(self, connection, key, base, **headers):
        body = MODEL.push(*key)
        query = (
            f"worker={key[0]}&sequence={key[1]}&weight={MODEL.weight(*key)}"
            f"&base_version={base[0]}-{base[1]}&incarnation={self.incarnation}"
        )
        return connection.ask(
            "POST", f"{PATH}/steps?{query}", body.data, content_type=body.content_type, **headers
        )

    def train(self, server, rounds):
        """Rounds until so many are over, or the server is gone; whether it is there.

        It ends with an open round.
        """
        try:
            with Connection(server.port) as connection:
                for _ in range(rounds):
                    self._round(connection)
                key = "a", next(self.sequences)
                self._join(connection, key)
        except Lost:
            return False
        return True

    def _join(self, connection, key):
        self.flying = {key}
        answer = self.ask(connection, key, self.at)
        assert answer.status == 202, answer
        self.told[key] = self.at, None
        self.flying = set()

    def _round(self, connection):
        sequence = next(self.sequences)
        first, last = ("a", sequence), ("b", sequence)
        self._join(connection, first)
        self.flying = {last}
        answer = self.ask(connection, last, self.at, accept=RAW)
        assert answer.status == 200, answer
        summary = json.loads(answer.headers["gradpost-summary"])
        assert (summary["applied"], summary["contributions"]) == (True, 2)
        for key in (first, last):
            self.told[key] = self.at, summary
        base, self.at = self.at, (summary["epoch"], summary["version"])
        self.params[summary["step"]] = digest(answer.body)
        self.rounds[summary["step"]] = first, last
        self.flying = set()
        again = self.ask(connection, first, base)
        assert bare(again.json) == bare(summary)

    def look(self, server, epochs, *, stopped=False):
        """What a restarted server has is what a snapshot can have held, and it says so."""
        with Connection(server.port) as connection:
            now = connection.ask("GET", PATH).json
            epoch, version, step = now["epoch"], now["version"], now["step"]
            assert epoch - self.at[0] in epochs
            if epoch == self.at[0]:
                assert (version, step) == (self.at[1], max(self.params))
            else:
                assert version == 1
                assert self.floor <= step <= max(self.params, default=0) + 1
            params = connection.ask("GET", f"{PATH}/params", accept=RAW)
            if step in self.params:
                assert digest(params.body) == self.params[step]
            self._are_told(connection, epoch, step, stopped=stopped)
            self._is_whole(connection, step)
        for known in (self.params, self.rounds):
            for later in [at for at in known if at > step]:
                del known[later]
        self.at, self.floor = (epoch, version), step
        return step

    def _are_told(self, connection, epoch, step, *, stopped):
        """A round is there with all who were in it, or all are told that history was cut."""
        for key, (base, summary) in list(self.told.items())[-40:]:
            answer = self.ask(connection, key, base)
            if summary is not None and summary["step"] <= step:
                assert bare(answer.json) == bare(summary)
            elif summary is None and answer.status == 200:  # the answers to its round were lost
                assert answer.json["step"] == step == max(self.params, default=0) + 1
                self.told[key] = base, answer.json | {"replayed": False}
                self.rounds[step] = key, *self.flying
            elif summary is None and stopped:
                assert (answer.slug, answer.json["reason"]) == ("round-abandoned", "stop")
            else:
                assert (answer.status, answer.slug) == (409, "epoch-changed")
                assert answer.json["epoch"] == epoch
        kept = {key: one for key, one in self.told.items() if one[1] and one[1]["step"] <= step}
        self.told = kept

    def _is_whole(self, connection, step):
        """Nobody is known to be in a round that is not there."""
        unknown = connection.ask("GET", f"{PATH}/rounds/{1 << 62}").json["round"]
        found = connection.ask("GET", f"{PATH}/rounds/{unknown}").json
        assert (found["status"], found["members"]) == ("open", [])
        for worker in "ab":
            answer = connection.ask("GET", f"{PATH}/workers/{worker}")
            known = {
                number
                for begin, end in (answer.json["ranges"] if answer.status == 200 else ())
                for number in range(begin, end + 1)
            }
            mine = {number for name, number in self.told if name == worker}
            assert mine <= known, worker
            more = known - mine - {number for _, number in self.flying}
            assert all(self._was_given_up(connection, (worker, number)) for number in more)

    def _was_given_up(self, connection, key):
        """Whether a stop has abandoned its round: its number stays used."""
        answer = self.ask(connection, key, (1, 0))  # another base than it had
        return answer.slug == "key-reused" and "round" in answer.json


def test_without_a_log_a_round_is_there_whole_or_everyone_is_told(fleet, scratch):
    folder, pair = scratch / "data", Pair(MODEL.spec)
    server = fleet.start(folder, snapshot_interval=60)
    assert server.wait_ready()
    pair.create(server.port)
    assert pair.train(server, 10)
    server.stop()
    assert server.wait_gone(60)
    epochs, stopped, steps = SAME, True, []
    for kill, then in KILLS:
        gently = kill is None or kill.startswith("stop:")  # no snapshot but the last one
        server = fleet.start(folder, kill, snapshot_interval=60 if gently else 0.05)
        if not server.wait_ready():
            assert kill.startswith("start:")
            epochs = then  # what a stop has left is there all the same
            continue
        steps.append(pair.look(server, epochs, stopped=stopped))
        if pair.train(server, 10 if gently else 5000):
            server.stop()
        assert server.wait_gone(60)
        assert server.killed == (kill is not None)
        assert fsck.run(folder) == fsck.CLEAN, kill
        epochs, stopped = then, then == SAME
    server = fleet.start(folder)
    assert server.wait_ready()
    pair.look(server, epochs, stopped=stopped)
    assert max(steps) > 40
    _compare(fleet, pair, server)


def _compare(fleet, pair, server):
    """What survived, reduced by NumPy and pushed to a server that was never killed: same bits."""
    twin = fleet.start()
    assert twin.wait_ready()
    with Connection(twin.port) as other, Connection(server.port) as ours:
        assert other.ask("PUT", PATH, {"optimizer": MODEL.spec["optimizer"]}).status == 201
        body = MODEL.upload(1)
        other.ask("PUT", f"{PATH}/params", body.data, content_type=body.content_type)
        assert sorted(pair.rounds) == list(range(1, len(pair.rounds) + 1))
        for step in sorted(pair.rounds):
            members = [(*key, MODEL.weight(*key)) for key in pair.rounds[step]]
            body = reduced(MODEL, members)
            done = other.ask("POST", f"{PATH}/steps", body.data, content_type=body.content_type)
            assert done.status == 200, done
        for query, seen, media in (("params", digest, RAW), ("state", state_digest, SAFE)):
            found = [one.ask("GET", f"{PATH}/{query}", accept=media) for one in (ours, other)]
            assert seen(found[0].body) == seen(found[1].body)
    for one in (twin, server):
        one.kill()
