"""Stops a running application at every step of the storage, and looks at what comes back."""

import itertools

from tests.storage.counter import Promise, Scratch, Server, seeded
from tests.storage.disk import POWER, Crash, Folder, Mode, Recording


class Explorer:
    """Runs applications and crashes them.

    Args:
        seed: Of everything.
        without: Syncs that do nothing.
        depth: How often a crash may follow a crash.
        act: What an application does next.
    """

    def __init__(self, seed, without=(), depth=2, act=Server.act):
        self.act = act
        self.rng = seeded(seed)
        self.without = without
        self.depth = depth
        self.images = 0
        self.synced = set()

    def run(self, actions, every=1):
        """One application; each `every`-th step is followed by a stop in some mode."""
        promise, steps = Promise(), itertools.count()
        with Scratch() as root:
            calls = Recording(root, Folder(), self.without)

            def look():
                if next(steps) % every == 0:
                    mode = self.rng.choice(list(Mode))
                    self.check(calls.disk.after(mode, self.rng), promise.copy(), self.depth)

            calls.after = look
            try:
                server = Server(calls, root / "data", promise, self.rng)
                for _ in range(actions):
                    self.act(server)
                server.close()
            finally:
                calls.dead = True
                calls.abandon()
        self.synced |= calls.synced

    def check(self, disk, promise, depth):
        """Recovers a disk, goes on for a while or not at all, and crashes again."""
        self.images += 1
        with Scratch() as root:
            disk.build(root)
            calls = Recording(root, disk, self.without)
            if depth == self.depth:
                promise.check_backups(root)
            try:
                server = Server(calls, root / "data", promise, self.rng)
                if depth:
                    self.go_on(server, calls)
            except Crash:
                pass
            finally:
                calls.dead = True
                calls.abandon()
                self.synced |= calls.synced
            if depth:
                mode = self.rng.choice([Mode.KILL, Mode.LOSE, *POWER])
                self.check(disk.after(mode, self.rng), promise, depth - 1)

    def go_on(self, server, calls):
        if self.rng.random() < 0.4:
            return
        if self.rng.random() < 0.8:
            calls.left = self.rng.randrange(120)
        for _ in range(self.rng.randrange(8)):
            self.act(server)
        server.close()
