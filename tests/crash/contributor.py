"""Trainers of sessions that have rounds, or bound how far a worker may be ahead.

A contribution is followed until its round is over: its answer waits for that, or the round is
asked, or the same bytes are sent again, or the trainer goes on and comes back to it. Trainers leave
and come again under another id, and are silent for longer than their lease.
"""

import json
import time

from tests.crash.door import rest
from tests.crash.history import Left, Round
from tests.crash.owner import Owner
from tests.crash.workload import Worker

NAP_S = 1.1
"""Longer than a lease."""
PATIENCE_S = 0.5


class Contributor(Worker):
    """One member of a team, which trains one session."""

    def __init__(self, *others):
        super().__init__(*others)
        (self.model,) = self.models
        self._former = []
        self._old = []
        self._unsettled = []

    @property
    def names(self):
        return [*self._former, self.called]

    def act(self):
        known, dice = self.known[self.model.name], self.rng.random()
        if known.at is None or dice > 0.07:
            super().act()
        elif dice < 0.012:
            self.leave()
        elif dice < 0.03:
            self.nap()
        elif dice < 0.045:
            self.enter()
        elif self._old:
            self.settle(self.rng.choice(self._old))

    def finish(self):
        """The fate of each contribution is known."""
        super().finish()
        self._come_back()

    # Contributions

    def send(self, call):
        done = super().send(call)
        if self.model.mode != "sync" or done is None:
            return done
        if done.status == 202:
            done = self._follow(call, done)
        elif done.slug in ("round-closed", "already-contributed"):
            self._come_back()
            self.known[self.model.name].at = None
        if done is not None and (done.status == 200 or done.slug == "round-abandoned"):
            self.ask(told_by(done)["round"])
        return done

    def settle(self, call, **headers):
        if "prefer" not in headers:
            headers |= self._patience(call)
        return super().settle(call, **headers)

    def _patience(self, call):
        if call.model.mode == "bounded":
            return {"prefer": f"wait={self.rng.choice((0.05, 0.3, 1))}"}
        return {"prefer": f"wait={PATIENCE_S}"} if self.rng.random() < 0.5 else {}

    def _follow(self, call, answer):
        """Learns what became of a contribution whose round is open; None: later."""
        dice = self.rng.random()
        if dice < 0.2:
            self._unsettled.append(call)
            return None
        if dice < 0.6:
            self.ask(answer.json["round"], until_over=True)
        return self._until_over(call)

    def _until_over(self, call):
        while True:
            answer = self.settle(call, prefer=f"wait={PATIENCE_S}")
            if answer.status != 202:
                return answer

    def _come_back(self):
        """Settles what was left open."""
        while self._unsettled:
            self._until_over(self._unsettled[0])
            del self._unsettled[0]

    # Rounds

    def ask(self, number, *, until_over=False):
        """What the server says of a round."""
        prefer = {"prefer": f"wait={PATIENCE_S}"} if until_over else {}
        path = f"/v1/sessions/{self.model.name}/rounds/{number}"
        while True:
            invoked, returned, answer = self.settled("GET", path, **prefer)
            incarnation = self.known[self.model.name].incarnation
            seen = seen_round(self.model.name, incarnation, invoked, returned, number, answer)
            self.history.add(seen)
            if not until_over or seen.status != "open":
                return

    # Membership

    def enter(self):
        """Says that it is there."""
        path = f"/v1/sessions/{self.model.name}/workers/{self.called}"
        _, _, answer = self.settled("PUT", path, {"lease_s": 1.0})
        assert answer.status in (200, 201) or answer.slug == "session-gone", answer

    def leave(self):
        """Leaves, and goes on as another one."""
        self._come_back()
        known = self.known[self.model.name]
        path = f"/v1/sessions/{self.model.name}/workers/{self.called}"
        self.history.add(
            Left(self.model.name, known.incarnation, time.monotonic(), self.called)
        )  # fmt: skip
        _, _, answer = self.settled("DELETE", path)
        assert answer.status == 204 or answer.slug in ("worker-unknown", "worker-retired"), answer
        self._former.append(self.called)
        self._old += known.acked[-20:]
        self.called = f"{self.name}.{len(self._former)}"
        known.sequence, known.acked = 0, []

    def nap(self):
        """Says nothing for longer than its lease."""
        ends = time.monotonic() + NAP_S
        while time.monotonic() < ends and not self.disturbed:
            rest()


class Leader(Owner, Contributor):
    """The member of a team that creates and changes the session."""

    def finish(self):
        Owner.finish(self)
        Contributor.finish(self)


def told_by(answer):
    """What the answer to a push says of it; its body may be parameters."""
    return json.loads(answer.headers.get("gradpost-summary") or answer.body)


def seen_round(session, incarnation, invoked, returned, number, answer):
    """An answer about a round, as an event."""
    if answer.slug == "round-unknown":
        return Round(session, incarnation, invoked, returned, number, "unknown")
    assert answer.status == 200, answer
    told = answer.json
    members = told["members"]
    if members is not None:
        members = tuple((one["worker"], one["sequence"], one["weight"]) for one in members)
    epoch, version = map(int, told["base_version"].split("-"))
    return Round(
        session, incarnation, invoked, returned, told["round"], told["status"], told["reason"],
        (epoch, version), (told["epoch"], told["version"]), told["step"], told["contributions"],
        told["passes"], members, told["summary"],
    )  # fmt: skip
