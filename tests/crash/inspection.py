"""What a server shows while nobody writes: each session's numbers, arrays and workers."""

import time

from tests.crash.contributor import seen_round
from tests.crash.history import Gone, Pull, Standing
from tests.crash.models import tensors_of
from tests.crash.wire import Connection
from tests.crash.workload import RAW, SAFE, digest

ROUNDS = 16


def inspect(port, models, workers, history, *, standings=True):
    """Writes all that can be seen down as pulls and standings.

    Args:
        port: Of the server.
        models: Which sessions to look at.
        workers: Who train.
        history: Where it is written down.
        standings: Ask for the workers too.
    """
    with Connection(port) as connection:
        for model in models:
            mine = [one for one in workers if model in one.models] if standings else ()
            names = [name for one in mine for name in one.names]
            _inspect(connection, model, names, history)


def _inspect(connection, model, workers, history):
    path = f"/v1/sessions/{model.name}"
    invoked = time.monotonic()
    answer = connection.ask("GET", path)
    if answer.slug in ("session-gone", "session-unknown"):
        history.add(Gone(model.name, invoked, time.monotonic(), answer.slug))
        return
    assert answer.status == 200, answer
    told = answer.json
    if told["status"] == "empty":
        return  # its creation is in two parts, and the second has not come yet
    numbers = told["epoch"], told["version"], told["step"]
    seen = Pull(model.name, told["incarnation"], invoked, time.monotonic(), *numbers)
    history.add(seen._replace(lr=told["optimizer"]["lr"]))
    arrays = {"params": {"accept": RAW}, "state": {"accept": SAFE}}
    for what, headers in arrays.items():
        found = connection.ask("GET", f"{path}/{what}", **headers)
        assert found.status == 200, found
        value = digest(found.body) if what == "params" else state_digest(found.body)
        place = (int(found.headers[f"gradpost-{n}"]) for n in ("epoch", "version", "step"))
        history.add(
            Pull(seen.session, seen.incarnation, invoked, time.monotonic(), *place, what, value)
        )
    if "ema" in model.spec:
        found = connection.ask("GET", f"{path}/params?of=ema", accept=RAW)
        history.add(seen._replace(what="ema", digest=digest(found.body)))
    if model.mode == "sync":
        _inspect_rounds(connection, path, seen, history)
    for worker in workers:
        invoked = time.monotonic()
        answer = connection.ask("GET", f"{path}/workers/{worker}")
        if answer.slug == "worker-retired":
            continue
        told = {"highest": None, "ranges": [], "last": None}  # it never pushed
        if answer.status != 404:
            assert answer.status == 200, answer
            told = answer.json
        history.add(
            Standing(
                model.name, seen.incarnation, invoked, time.monotonic(), worker, told["highest"],
                tuple(map(tuple, told["ranges"])), told["last"],
            )
        )  # fmt: skip


def _inspect_rounds(connection, path, seen, history):
    """The last rounds: a log has more of them than a snapshot."""
    unknown = connection.ask("GET", f"{path}/rounds/{1 << 62}")
    assert unknown.slug == "round-unknown", unknown
    last = unknown.json["round"]
    for number in range(max(1, last - ROUNDS), last + 1):
        invoked = time.monotonic()
        answer = connection.ask("GET", f"{path}/rounds/{number}")
        history.add(
            seen_round(
                seen.session, seen.incarnation, invoked, time.monotonic(), number, answer
            )
        )  # fmt: skip


def state_digest(body):
    """Of tensors, counts and scalars, without the numbers of the version."""
    tensors, facts = tensors_of(body)
    kept = {name: facts[name] for name in sorted(facts) if name in ("step", "counts", "scalars")}
    return digest(repr((sorted(tensors.items()), kept)).encode())
