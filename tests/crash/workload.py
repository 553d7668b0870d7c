"""Trainers over real sockets, who repeat every call until they know what became of it.

Each worker has its own seed, its own connection and its own keys. A call that got no answer is
sent again with the same bytes when there is a server again. On the way some pushes are sent twice,
also at once and also long after, and some bodies are cut in the middle.
"""

import hashlib
import json
import random
import threading
import time

from tests.crash.door import Abandoned, rest
from tests.crash.history import NEVER, Gone, Pull, Push
from tests.crash.wire import Connection, Lost

RAW, SAFE = "application/octet-stream", "application/vnd.safetensors"
AGAIN = (
    "in-flight", "log-full", "overloaded", "shutting-down", "recovering", "internal",
    "too-many-workers",
)  # fmt: skip
TELLING = ("round-abandoned", "already-contributed")
"""Refusals of which more than their kind is to be kept."""
WINDOW = 1024


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Known:
    """What a worker knows of a session: its incarnation and version, and its own keys there."""

    def __init__(self):
        self.incarnation = None
        self.at = None
        self.tag = None
        self.sequence = 0
        self.acked = []


class Worker(threading.Thread):
    """One trainer.

    Args:
        index: Which.
        seed: Of everything it does.
        models: What it trains.
        door: Where it learns which server to ask.
        history: What it writes down.
    """

    def __init__(self, index, seed, models, door, history):
        super().__init__(name=f"w{index}", daemon=True)
        self.rng = random.Random(f"{seed} {index}")
        self.models = models
        self.known = {model.name: Known() for model in models}
        self.error = None
        self.called = self.name
        """Its worker id."""
        self._door = door
        self.history = history
        self._turn = 0
        self._connection = None

    def run(self):
        try:
            self._turn, _ = self._door.wait(0)
            while not self._door.closing:
                self.act()
            self.finish()
        except Abandoned:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._drop()
            self._door.leave()

    def act(self):
        """Something at random."""
        model = self.rng.choice(self.models)
        if self.known[model.name].at is None or self.rng.random() < 0.08:
            self.pull(model)
        else:
            self.push(model)

    def finish(self):
        """What is to be done before it leaves."""

    @property
    def names(self):
        """All its worker ids."""
        return [self.called]

    # Calls

    def _drop(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def open(self):
        """The connection; waits for the next server where this one is gone."""
        while self._door.shutting or self._connection is None:
            if self._door.shutting:
                self._drop()
                self._turn, _ = self._door.wait(self._turn)
            try:
                self._connection = Connection(self._door.port)
            except Lost:
                self._turn, _ = self._door.wait(self._turn)
        return self._connection

    @property
    def disturbed(self):
        """Whether there is something better to do than to wait."""
        return self._door.shutting or self._door.closing

    def once(self, method, path, body=b"", **headers):
        """One attempt: when it began and ended, and the answer; None is no answer."""
        connection = self.open()
        invoked = time.monotonic()
        try:
            answer = connection.ask(method, path, body, **headers)
        except Lost:
            self._drop()
            answer = None
        return invoked, time.monotonic(), answer

    def settled(self, method, path, body=b"", **headers):
        """Attempts until there is an answer that settles the call."""
        first = None
        while True:
            invoked, returned, answer = self.once(method, path, body, **headers)
            first = first or invoked
            if answer is not None and answer.slug not in AGAIN:
                return first, returned, answer
            if answer is not None:
                rest()

    # Pushes

    def push(self, model):
        """A new push, perhaps cut first, perhaps sent twice at once; then perhaps an old one."""
        known = self.known[model.name]
        known.sequence += 1
        call = Call(model, known.incarnation, self.called, known.sequence, known.at)
        done = self.send(call)
        if done is not None and done.status == 200:
            known.acked.append(call)
        if known.acked and self.rng.random() < 0.1:
            self.settle(self.rng.choice(known.acked[-WINDOW - 50 :]))

    def send(self, call):
        """Sends a push, perhaps also cut before or twice at once; None: it was only cut."""
        dice = self.rng.random()
        if dice < 0.1 and call.body.data:
            self._cut(call)
            if dice < 0.03:
                return None  # and never whole: it must not be known to anyone
        twin = self._twin(call) if dice > 0.96 else None
        try:
            return self.settle(call, with_params=self.rng.random() < 0.3)
        finally:
            if twin is not None:
                self._receive(call, *twin)

    def settle(self, call, *, with_params=False, **headers):
        """Attempts until there is an answer that settles the push."""
        if with_params:
            headers["accept"] = RAW
        while True:
            self.history.begin(call.attempt(time.monotonic(), NEVER))
            invoked, returned, answer = self.once(
                "POST", call.path, call.body.data, **call.headers, **headers
            )
            self.note(call, invoked, returned, answer)
            if answer is None:
                continue
            if answer.slug in AGAIN:
                rest()
                continue
            if answer.slug in ("epoch-changed", "session-gone", "params-missing"):
                self.known[call.model.name].at = None
            return answer

    def note(self, call, invoked, returned, answer):
        """Writes an attempt of a push and its answer down."""
        push = call.attempt(invoked, returned)
        if answer is None:
            self.history.add(push)
            return
        push = push._replace(status=answer.status, slug=answer.slug)
        if answer.status == 200:
            told = answer.headers.get("gradpost-summary")
            push = push._replace(summary=json.loads(told) if told else answer.json)
            if told:  # the body holds the parameters
                self._saw(call.model, call.incarnation, invoked, returned, answer)
            elif not push.summary["replayed"]:  # a repeat tells where the session was once
                self._reached(call.model, (push.summary["epoch"], push.summary["version"]))
        elif answer.status == 202 or answer.slug in TELLING:
            push = push._replace(summary=answer.json)
        self.history.add(push)

    def _cut(self, call):
        """Sends a part of a push and hangs up."""
        connection = self.open()
        invoked = time.monotonic()
        part = self.rng.randrange(len(call.body.data))
        try:
            connection.send("POST", call.path, call.body.data, **call.headers, cut=part)
        except Lost:
            pass
        self._drop()
        self.history.add(call.attempt(invoked, time.monotonic())._replace(whole=False))

    def _twin(self, call):
        """Sends a push on a connection of its own, whose answer is read later."""
        try:
            connection = Connection(self._door.port)
        except Lost:
            return None
        invoked = time.monotonic()
        self.history.begin(call.attempt(invoked, NEVER))
        try:
            connection.send("POST", call.path, call.body.data, **call.headers)
        except Lost:
            connection.close()
            self.history.add(call.attempt(invoked, time.monotonic()))
            return None
        return connection, invoked

    def _receive(self, call, connection, invoked):
        with connection:
            try:
                answer = connection.receive()
            except Lost:
                answer = None
        self.note(call, invoked, time.monotonic(), answer)

    # Pulls

    def pull(self, model):
        """The parameters, or that they are those of before."""
        known = self.known[model.name]
        headers = {"accept": RAW}
        if known.tag is not None and self.rng.random() < 0.5:
            headers["if_none_match"] = known.tag
        path = f"/v1/sessions/{model.name}/params"
        invoked, returned, answer = self.settled("GET", path, **headers)
        if answer.status == 304:
            epoch, version, *_ = answer.headers["etag"].strip('"').split("-")
            place = int(epoch), int(version)
            self.history.add(Pull(model.name, known.incarnation, invoked, returned, *place))
            self._reached(model, place)
        elif answer.status == 200:
            incarnation = answer.headers["gradpost-incarnation"]
            if incarnation != known.incarnation:
                known.incarnation, known.at, known.acked = incarnation, None, []
            known.tag = answer.headers["etag"]
            self._saw(model, incarnation, invoked, returned, answer)
        else:
            self._missing(model, invoked, returned, answer)

    def _saw(self, model, incarnation, invoked, returned, answer):
        """Notes parameters that an answer carries."""
        numbers = (int(answer.headers[f"gradpost-{name}"]) for name in ("epoch", "version", "step"))
        epoch, version, step = numbers
        self.history.add(
            Pull(
                model.name, incarnation, invoked, returned, epoch, version, step, "params",
                digest(answer.body),
            )
        )  # fmt: skip
        if incarnation == self.known[model.name].incarnation:
            self._reached(model, (epoch, version))

    def _reached(self, model, place):
        known = self.known[model.name]
        known.at = max(known.at or place, place)

    def _missing(self, model, invoked, returned, answer):
        self.known[model.name].at = None
        if answer.slug in ("session-gone", "session-unknown"):
            self.history.add(Gone(model.name, invoked, returned, answer.slug))
        elif answer.slug != "params-missing":
            raise AssertionError(f"a pull of {model.name} is {answer.status} {answer.slug}")
        rest()


class Call:
    """A push, as it is sent every time."""

    def __init__(self, model, incarnation, worker, sequence, base):
        self.model = model
        self.incarnation = incarnation
        self.worker = worker
        self.sequence = sequence
        self.base = base

    @property
    def body(self):
        return self.model.push(self.worker, self.sequence)

    @property
    def headers(self):
        """Of its body; a pass has none."""
        kind = self.body.content_type
        return {} if kind is None else {"content_type": kind}

    @property
    def path(self):
        epoch, version = self.base
        weight = ""
        if self.model.mode == "sync":
            weight = f"&weight={self.model.weight(self.worker, self.sequence)}"
        return (
            f"/v1/sessions/{self.model.name}/steps?worker={self.worker}&sequence={self.sequence}"
            f"&base_version={epoch}-{version}&incarnation={self.incarnation}{weight}"
        )

    def attempt(self, invoked, returned):
        return Push(
            self.model.name, self.incarnation, self.worker, self.sequence, self.base, invoked,
            returned,
        )  # fmt: skip
