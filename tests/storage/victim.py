"""A process to be killed: pushes to one session for ever, and says which record it acknowledged."""

import sys
from pathlib import Path

from tests.storage.counter import Promise, Server, seeded


class Unbounded(Promise):
    """Takes whatever is there: the parent compares."""

    def check(self, recovery):
        pass


def main(path, turn):
    server = Server(None, path, Unbounded(), seeded("victim", turn))
    if "a" not in server.journals:
        server.create("a")
        print(0, flush=True)
    while True:
        change = server._fresh("a")
        slot = server.reserve("a", change)
        slot.seal(change.kind, key=change.key, meta=change.meta, payload=change.payload)
        (header,) = server.journals["a"].commit([slot])
        server.states["a"].apply(change)
        print(header.number, flush=True)
        if header.number % 7 == 0:
            server.store.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
