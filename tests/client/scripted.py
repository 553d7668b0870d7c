"""A transport that answers from a script, and a clock that only sleeping moves."""

import json
from typing import NamedTuple

from gradpost.inprocess import MemoryAnswer
from gradpost.protocol import PROBLEM, PROBLEM_PREFIX, PROBLEMS

SUMMARY = {
    "step": 1,
    "epoch": 1,
    "version": 1,
    "applied": True,
    "replayed": False,
    "identified": True,
    "staleness": 0,
    "lr": 0.001,
    "grad_norm": 1.0,
    "clipped": False,
    "skipped": None,
    "params_finite": True,
    "update_norm": None,
    "param_norm": None,
}


class Sent(NamedTuple):
    """What went over the wire in one attempt."""

    method: str
    path: str
    headers: dict
    body: bytes


def answer(status, document=None, **headers):
    body = b"" if document is None else json.dumps(document).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return MemoryAnswer(status, named, body)


def done():
    return answer(200, SUMMARY, Content_Type="application/json")


def problem(status, slug, **headers):
    document = {
        "type": PROBLEM_PREFIX + slug,
        "title": slug,
        "status": status,
        "detail": f"It is {slug}.",
        "retryable": PROBLEMS[slug],
    }
    return answer(status, document, Content_Type=PROBLEM, **headers)


class Scripted:
    """Gives or raises the next of the script; the last one for ever."""

    def __init__(self, *script):
        self.script = list(script)
        self.sent = []
        self.timeouts = []
        self.closed = 0

    def request(self, method, path, headers, body, timeout_s):
        self.sent.append(Sent(method, path, dict(headers), b"".join(body)))
        self.timeouts.append(timeout_s)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        found = step() if callable(step) else step
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        self.closed += 1


class Clock:
    """Seconds, moved by sleep."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
