"""A process whose disk fails at one kind of sync: `python -m tests.durability.failing DATA SITE`.

Prints the digest of the session before the failure, then does what syncs there.
"""

import errno
import hashlib
import os
import sys
from pathlib import Path

from service.storage.files import Calls, Files, Sync
from tests.durability.conftest import Server
from tests.durability.test_recovery import make, push_some


class Failing(Calls):
    """Fails each sync of one site, once it is armed."""

    site: Sync | None = None

    def _check(self, at):
        if at is self.site:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fdatasync(self, fd, site):
        self._check(site)
        super().fdatasync(fd, site)

    def fsync(self, fd, site):
        self._check(site)
        super().fsync(fd, site)

    def fsync_folder(self, path, site):
        self._check(site)
        super().fsync_folder(path, site)

    def commit(self, connection, site):
        self._check(site)
        super().commit(connection, site)


def digest(server):
    """Of everything that a recovery must bring back."""
    return hashlib.sha256(repr(sorted(server.state_of().items())).encode()).hexdigest()


def main():
    folder, site = Path(sys.argv[1]), Sync[sys.argv[2]]
    calls = Failing()
    server = Server(folder, Files(calls))
    session = make(server)
    push_some(server, 2)
    print(digest(server), flush=True)
    calls.site = site
    if site is Sync.RING_COMMIT:
        server.push(worker="w", sequence=9, base_version=1)
    else:
        server.on_loop(session.durable.snapshot())
    print("still here", flush=True)


if __name__ == "__main__":
    main()
