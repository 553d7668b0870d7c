"""The same training once more, in a server that never crashes: every bit must be the same.

The order is the one that the history tells. It may come from no code that is tested here, but the
kernels are not: `tests/oracle.py` is for them. A round is one push of what NumPy makes of its
contributions, to a session that has no rounds.
"""

import json
import urllib.parse
from collections import defaultdict
from itertools import count, permutations
from typing import NamedTuple

from tests.crash.agreement import over
from tests.crash.history import views
from tests.crash.inspection import state_digest
from tests.crash.reduction import reduced
from tests.crash.violation import BITS, Violation
from tests.crash.wire import Connection
from tests.crash.workload import RAW, SAFE, digest

SAME = ("lr", "grad_norm", "clipped", "applied", "params_finite", "update_norm", "param_norm")
ALL = ("params", "state", "ema")
AT_ONCE = 32


class Step(NamedTuple):
    """One update.

    Attributes:
        place: Epoch and version after it.
        summary: What was told of it.
        at: When it was.
        what: For people.
        keys: Of the push, or of the members of the round with their weights.
        sure: Whether their order is known.
    """

    place: tuple
    summary: dict
    at: float
    what: str
    keys: tuple
    sure: bool = True


class Reference:
    """Replays histories.

    Args:
        port: Of a server that was not killed and will not be.
    """

    def __init__(self, port):
        self._port = port
        self._names = (f"r{number}" for number in count())

    def check(self, history, models):
        """Violations: whatever was seen and is not what this replay shows.

        Args:
            history: Of a run that has ended.
            models: By name.
        """
        found = []
        with Connection(self._port) as connection:
            for view in views(history):
                if view.life is not None:
                    found += _Replay(connection, next(self._names), models[view.session], view)()
        return found


class _Replay:
    def __init__(self, connection, name, model, view):
        self._connection = connection
        self._path = f"/v1/sessions/{name}"
        self._model = model
        self._view = view
        self._uploads = {up.taken: up for up in view.uploads if up.taken is not None}
        self._seen = defaultdict(list)
        for pull in view.pulls:
            if pull.digest is not None:
                self._seen[pull.place].append(pull)
        self._found = []
        self._scratch = None

    def __call__(self):
        self._create()
        place = self._view.life.epoch, 1
        self._look(place, ALL)
        batch = []
        for step in self._steps():
            while place[0] < step.place[0]:
                self._send(batch)
                place = place[0] + 1, 1
                if place[0] not in self._uploads:
                    return self._found  # told by `conditions`
                self._upload(self._uploads[place[0]])
                self._look(place, ALL)
            if step.place != (place[0], place[1] + 1):
                break  # a hole, which is told by `gaps`, or by nobody if its push is unsettled
            place = step.place
            batch.append(step)
            whole = any(pull.what != "params" for pull in self._seen.get(place, ()))
            if whole or len(batch) == AT_ONCE:
                self._send(batch)
                self._look(place)
        self._send(batch)
        for upload in self._uploads.values():
            if upload.taken == place[0] + 1:
                self._upload(upload)
                self._look((upload.taken, 1), ALL)
        self._ask("DELETE", self._path)
        if self._scratch is not None:
            self._ask("DELETE", self._scratch)
        return self._found

    def _steps(self):
        if not self._view.in_rounds:
            return [
                Step(fate.place, fate.summary, fate.acked, f"{fate.key}", (fate.key,))
                for fate in self._view.applied
            ]
        rounds = [one for one in over(self._view) if one.status == "applied"]
        return [
            Step(
                one.place, one.summary, one.at, f"round {one.number}", self._keys(one),
                one.members is not None,
            )
            for one in rounds
        ]  # fmt: skip

    def _keys(self, one):
        """The members of a round with the weights that they were sent with."""
        weights = {key: self._model.weight(*key) for key in one.keys}
        if one.members is None:
            return tuple((*key, weights[key]) for key in sorted(one.keys))
        for *key, weight in one.members:
            if self._model.weight(*key) != weight:
                self._tell(one.at, f"round {one.number} has {key} with weight {weight}")
        return one.members

    def _body(self, step):
        """What is pushed for an update."""
        if not self._view.in_rounds:
            return self._model.push(*step.keys[0])
        keys = step.keys
        if not step.sure and self._model.update.get("order") != "worker":
            keys = self._ordered(step)
        return reduced(self._model, keys)

    def _ordered(self, step):
        """Members whose order nobody saw, in one that gives the norm that was told.

        Nobody is to be pleased by it: a round is asked by whoever was in it, and this is for those
        whose server was killed in between.
        """
        counted = [key for key in step.keys if key[2]]
        if len(counted) < 3:
            return counted
        for keys in permutations(counted):
            if self._norm(reduced(self._model, keys)) == step.summary["grad_norm"]:
                return keys
        self._tell(step.at, f"no order of {counted} is {step.what}")
        return counted

    def _norm(self, body):
        """Of a gradient, by a session that does nothing with it."""
        if self._scratch is None:
            self._scratch = f"{self._path}.scratch"
            spec = {"optimizer": {"rule": "sgd", "lr": 0}, "dtype": self._model.dtype}
            self._ask("PUT", self._scratch, {**spec, "missing": "skip"})
            self._put(1, self._scratch)
        answer = self._ask(
            "POST", f"{self._scratch}/steps", body.data, content_type=body.content_type
        )
        return answer.json["grad_norm"]

    def _ask(self, method, path, body=b"", **headers):
        answer = self._connection.ask(method, path, body, **headers)
        assert answer.status < 300, answer
        return answer

    def _create(self):
        mark, spec = self._view.life.mark, {**self._model.spec}
        for name in ("log_slots", "update"):
            spec.pop(name, None)
        if self._model.ends and mark % 2:
            spec["params"] = self._model.inline(mark)
        self._ask("PUT", self._path, spec)
        if "params" not in spec:
            self._put(mark)

    def _put(self, mark, path=None):
        body = self._model.upload(mark)
        path = path or self._path
        self._ask("PUT", f"{path}/params", body.data, content_type=body.content_type)

    def _upload(self, upload):
        self._put(upload.mark)

    def _send(self, batch):
        """Pushes without waiting for each answer; empties the batch."""
        for step, body in [(step, self._body(step)) for step in batch]:
            lr = urllib.parse.quote(json.dumps({"default": {"lr": step.summary["lr"]}}))
            self._connection.send(
                "POST", f"{self._path}/steps?overrides={lr}", body.data,
                content_type=body.content_type, accept=RAW if self._read(step.place) else "*/*",
            )  # fmt: skip
        for step in batch:
            answer = self._connection.receive()
            assert answer.status == 200, answer
            if self._read(step.place):
                self._compare(step.place, "params", digest(answer.body))
            told = json.loads(answer.headers.get("gradpost-summary") or answer.body)
            for name in SAME:
                if told[name] != step.summary[name]:
                    text = f"{step.what} had {name} {step.summary[name]}, and {told[name]} is right"
                    self._tell(step.at, text)
        batch.clear()

    def _read(self, place):
        return any(pull.what == "params" for pull in self._seen.get(place, ()))

    def _compare(self, place, what, right):
        """Whatever was seen at a place against what is here."""
        for pull in self._seen.get(place, ()):
            if pull.what == what and pull.digest != right:
                self._tell(pull.returned, f"{what} at {place} are not those of a replay")

    def _look(self, place, kinds=("state", "ema")):
        """Compares what no answer to a push carries."""
        for what in kinds:
            if any(pull.what == what for pull in self._seen.get(place, ())):
                self._compare(place, what, self._right(what))

    def _right(self, what):
        if what == "state":
            return state_digest(self._ask("GET", f"{self._path}/state", accept=SAFE).body)
        query = "?of=ema" if what == "ema" else ""
        return digest(self._ask("GET", f"{self._path}/params{query}", accept=RAW).body)

    def _tell(self, at, text):
        self._found.append(Violation(BITS, "bits", self._view.session, at, text))
