"""The same training once more, in a server that never crashes: every bit must be the same.

The order is the one that the history tells. It may come from no code that is tested here, but the
kernels are not: `tests/oracle.py` is for them.
"""

import json
import urllib.parse
from collections import defaultdict
from itertools import count

from tests.crash.history import views
from tests.crash.inspection import state_digest
from tests.crash.promises import BITS, Violation
from tests.crash.wire import Connection
from tests.crash.workload import RAW, SAFE, digest

SAME = ("lr", "grad_norm", "clipped", "applied", "params_finite", "update_norm", "param_norm")
ALL = ("params", "state", "ema")
AT_ONCE = 32


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

    def __call__(self):
        self._create()
        place = self._view.life.epoch, 1
        self._look(place, ALL)
        batch = []
        for fate in self._view.applied:
            while place[0] < fate.place[0]:
                self._send(batch)
                place = place[0] + 1, 1
                if place[0] not in self._uploads:
                    return self._found  # told by `conditions`
                self._upload(self._uploads[place[0]])
                self._look(place, ALL)
            if fate.place != (place[0], place[1] + 1):
                break  # a hole, which is told by `gaps`, or by nobody if its push is unsettled
            place = fate.place
            batch.append(fate)
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
        return self._found

    def _ask(self, method, path, body=b"", **headers):
        answer = self._connection.ask(method, path, body, **headers)
        assert answer.status < 300, answer
        return answer

    def _create(self):
        mark, spec = self._view.life.mark, {**self._model.spec}
        spec.pop("log_slots", None)
        if self._model.ends and mark % 2:
            spec["params"] = self._model.inline(mark)
        self._ask("PUT", self._path, spec)
        if "params" not in spec:
            self._put(mark)

    def _put(self, mark):
        body = self._model.upload(mark)
        self._ask("PUT", f"{self._path}/params", body.data, content_type=body.content_type)

    def _upload(self, upload):
        self._put(upload.mark)

    def _send(self, batch):
        """Pushes without waiting for each answer; empties the batch."""
        for fate in batch:
            body = self._model.push(*fate.key)
            lr = urllib.parse.quote(json.dumps({"default": {"lr": fate.summary["lr"]}}))
            self._connection.send(
                "POST", f"{self._path}/steps?overrides={lr}", body.data,
                content_type=body.content_type, accept=RAW if self._read(fate.place) else "*/*",
            )  # fmt: skip
        for fate in batch:
            answer = self._connection.receive()
            assert answer.status == 200, answer
            if self._read(fate.place):
                self._compare(fate.place, "params", digest(answer.body))
            told = json.loads(answer.headers.get("gradpost-summary") or answer.body)
            for name in SAME:
                if told[name] != fate.summary[name]:
                    text = f"{fate.key} had {name} {fate.summary[name]}, and {told[name]} is right"
                    self._tell(fate.acked, text)
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
