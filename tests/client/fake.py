"""A server of rounds, in memory: as much of the protocol as trainers that share a session need.

It knows one rule, sgd, and no time but that of a long poll: a round is closed by its contributions,
by a worker that leaves, or by `abandon`.
"""

import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

from gradpost.inprocess import MemoryAnswer
from gradpost.protocol import JSON, PROBLEM, PROBLEM_PREFIX, SAFETENSORS
from gradpost.protocol.versions import format_version, parse_version
from gradpost.tensors import decode, encode
from tests.client import scripted


class Refused(Exception):
    def __init__(self, status, slug, **members):
        super().__init__(slug)
        self.status = status
        self.document = {
            "type": PROBLEM_PREFIX + slug,
            "status": status,
            "detail": f"It is {slug}.",
            "retryable": False,
            **members,
        }


class Fake:
    """One session.

    Attributes:
        sent: (method, path, headers, bytes of the body) of all requests.
        lost: Called with method and path before each answer; what it raises is what is received.
        lease_s: Of the workers.
    """

    def __init__(self, *, lease_s=60.0):
        self.lease_s = lease_s
        self.sent = []
        self.lost = lambda method, path: None
        self.spec = None
        self.epoch, self.version, self.step = 1, 0, 0
        self.params = {}
        self.live, self.ever, self.retired = set(), set(), set()
        self.rounds = {}
        self.number = 1
        self.told = {}  # (worker, sequence) → (bytes, summary, number of a round)
        self.changed = threading.Condition()

    # What a test does

    def at(self):
        return {"epoch": self.epoch, "version": self.version, "step": self.step}

    def abandon(self, reason="timeout"):
        with self.changed:
            self._close("abandoned", reason, None)

    def restore(self):
        """Begins a new epoch, as an upload or a restore does."""
        with self.changed:
            if self.number in self.rounds:
                self._close("abandoned", "restore", None)
            self.epoch, self.version = self.epoch + 1, 1

    @contextmanager
    def lose(self, method, what, error):
        def lost(sent, path):
            if sent == method and what in path:
                raise error

        self.lost = lost
        yield
        self.lost = lambda method, path: None

    def paths(self, method, what=""):
        return [path for sent, path, _, _ in self.sent if sent == method and what in path]

    # The transport

    def request(self, method, path, headers, body, timeout_s):
        data = b"".join(body)
        self.sent.append((method, path, dict(headers), data))
        url = urlsplit(path)
        query = dict(parse_qsl(url.query))
        found = re.fullmatch(r"/v1/sessions/[^/]+(?:/(\w+))?(?:/(.+))?", url.path)
        what, name = found[1], unquote(found[2] or "")
        try:
            with self.changed:
                call = getattr(self, f"_{method.lower()}_{what or 'session'}")
                found = call(name, query, headers, data)
        except Refused as error:
            found = self._json(error.status, error.document, PROBLEM)
        self.lost(method, path)
        return found

    def close(self):
        pass

    def _json(self, status, document, kind=JSON):
        return MemoryAnswer(status, {"Content-Type": kind}, json.dumps(document).encode())

    def _wait(self, headers, until):
        wait = re.search(r"wait=([0-9.]+)", headers.get("Prefer", ""))
        self.changed.wait_for(until, float(wait[1]) if wait else 0.0)

    def _put_session(self, name, query, headers, data):
        attached, self.spec = self.spec is not None, self.spec or json.loads(data)
        return self._json(200 if attached else 201, self._described(attached))

    def _get_session(self, name, query, headers, data):
        if self.spec is None:
            raise Refused(404, "session-unknown")
        return self._json(200, self._described(True))

    def _delete_session(self, name, query, headers, data):
        return self._json(200, {})

    def _described(self, attached):
        layout = [{"name": n, "shape": list(a.shape)} for n, a in self.params.items()]
        return {
            **{"dtype": "F32", "groups": [], "incarnation": "a" * 32},
            **{"push": "gradient", **self.spec, **self.at(), "layout": layout},
            "attached": attached,
        }

    def _put_params(self, name, query, headers, data):
        if headers.get("If-None-Match") == "*" and self.params:
            raise Refused(412, "precondition-failed")
        self.params |= self._tensors(data)
        self.version += 1
        return self._json(200, self.at())

    def _tensors(self, data):
        received = decode(MemoryAnswer(200, {"Content-Length": str(len(data))}, data), None)
        return {name: np.array(value, np.float32) for name, value in received.tensors.items()}

    def _get_params(self, name, query, headers, data):
        if "min_version" in query and parse_version(query["min_version"])[0] < self.epoch:
            raise Refused(409, "epoch-changed", **self.at())
        kind = {"Content-Type": SAFETENSORS, "Gradpost-Incarnation": "a" * 32}
        where = {f"Gradpost-{n.title()}": str(v) for n, v in self.at().items()}
        return MemoryAnswer(200, {**kind, **where}, b"".join(encode(self.params, "F32")))

    def _put_workers(self, name, query, headers, data):
        new = self._joined(name)
        return self._json(201 if new else 200, {"worker": name, "lease_s": self.lease_s})

    def _delete_workers(self, name, query, headers, data):
        self.live.discard(name)
        self.retired.add(name)
        self._look()
        return MemoryAnswer(204, {}, b"")

    def _get_workers(self, name, query, headers, data):
        return self._json(200, {"workers": [{"worker": one} for one in sorted(self.live)]})

    def _joined(self, worker):
        if worker in self.retired:
            raise Refused(409, "worker-retired", worker=worker)
        new = worker not in self.live
        self.live.add(worker)
        self.ever.add(worker)
        return new

    def _get_rounds(self, name, query, headers, data):
        number = int(name)
        if number not in self.rounds:
            raise Refused(404, "round-unknown", round=number)
        found = self.rounds[number]
        self._wait(headers, lambda: found["status"] != "open")
        return self._json(200, {**found, "held": None, "missing": self._missing(found)})

    # Pushes

    def _post_steps(self, name, query, headers, data):
        key = query["worker"], int(query["sequence"])
        bytes_, summary, number = self.told.get(key, (None, None, None))
        if bytes_ is None:
            number = self._admit(key, query, data)
        elif bytes_ != (tuple(sorted(query.items())), data):
            raise Refused(422, "key-reused")
        again = bytes_ is not None
        if number is not None:
            found = self.rounds[number]
            self._wait(headers, lambda: found["status"] != "open")
            if found["status"] == "open":
                return self._json(202, self._open(found, again))
            if found["status"] == "abandoned":
                raise Refused(
                    409, "round-abandoned", round=number, reason=found["reason"],
                    worker=key[0], sequence=key[1], **self.at(),
                )  # fmt: skip
            summary = found["summary"]
        else:
            summary = summary or self.told[key][1]
        return self._json(200, {**summary, "replayed": again})

    def _open(self, found, again):
        counts = {name: found[name] for name in ("round", "contributions", "passes")}
        return {"applied": False, "replayed": again, "identified": True, **counts,
                "missing": self._missing(found), **self.at()}  # fmt: skip

    def _admit(self, key, query, data):
        """Takes a new push; the number of its round, if it has one."""
        update = self.spec.get("update") or {}
        base = parse_version(query["base_version"])
        if base[0] != self.epoch:
            raise Refused(409, "epoch-changed", **self.at())
        self._joined(key[0])
        weight = float(query.get("weight", 1))
        assert (weight == 0) == (not data)
        grads = self._tensors(data) if data else {}
        if self.spec.get("push") == "delta":
            grads = {name: -value for name, value in grads.items()}
        if update.get("mode") != "sync":
            assert "weight" not in query
            if self.version - base[1] > update.get("max_staleness", 1 << 60):
                raise Refused(409, "stale-gradient", **self.at())
            self._apply(grads)
            ahead = True if update.get("mode") == "bounded" else None
            summary = self._summary(ahead=ahead, staleness=self.version - 1 - base[1])
            self.told[key] = (tuple(sorted(query.items())), data), summary, None
            return None
        if base[1] != self.version:
            raise Refused(
                409, "round-closed", round=self.number, base_version=query["base_version"],
                **self.at(),
            )  # fmt: skip
        found = self.rounds.setdefault(
            self.number,
            {"round": self.number, "status": "open", "reason": None, "members": [], "held": [],
             "base_version": format_version(*base), "contributions": 0, "passes": 0,
             "overrides": query.get("overrides"), "summary": None, **self.at()},
        )  # fmt: skip
        if any(one["worker"] == key[0] for one in found["members"]):
            raise Refused(409, "already-contributed", round=self.number, sequence=1, **self.at())
        if query.get("overrides") != found["overrides"]:
            raise Refused(409, "overrides-differ", round=self.number)
        found["members"].append({"worker": key[0], "sequence": key[1], "weight": weight})
        found["held"].append((weight, grads))
        found["contributions" if weight else "passes"] += 1
        number = self.number
        self.told[key] = (tuple(sorted(query.items())), data), None, number
        self._look()
        return number

    def _missing(self, found):
        update = self.spec["update"]
        there = {one["worker"] for one in found["members"]}
        return len(self.live - there) + max(0, update["workers"] - len(self.ever))

    def _look(self):
        """Closes the open round if it is complete."""
        found = self.rounds.get(self.number)
        if found is None:
            return
        quorum = self.spec["update"].get("quorum", self.spec["update"]["workers"])
        if len(found["members"]) < quorum and self._missing(found):
            return
        total = sum(weight for weight, _ in found["held"])
        if not total:
            summary = self._summary(
                round=self.number, contributions=0, applied=False, skipped="passes"
            )
            self._close("skipped", "complete", summary)
            return
        mean = {name: np.zeros_like(value) for name, value in self.params.items()}
        for weight, grads in found["held"]:
            for name, value in grads.items():
                mean[name] += np.float32(weight / total) * value
        self._apply(mean)
        summary = self._summary(round=self.number, contributions=found["contributions"])
        self._close("applied", "complete", summary)

    def _close(self, status, reason, summary):
        found = self.rounds[self.number]
        found.update(status=status, reason=reason, summary=summary, held=[], **self.at())
        self.number += 1
        self.changed.notify_all()

    def _apply(self, grads):
        lr = np.float32(self.spec["optimizer"].get("lr", 1.0))
        for name, value in grads.items():
            self.params[name] = self.params[name] - lr * value
        self.version += 1
        self.step += 1

    def _summary(self, **members):
        lr = self.spec["optimizer"].get("lr", 1.0)
        blank = {"contributions": None, "round": None, "ahead": None, "wire": None}
        return {**scripted.SUMMARY, **blank, "lr": lr, **self.at(), **members}
