"""Hypothesis drives the application, and stops it where it likes."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.storage.counter import SHAPE, WIDER, Promise, Scratch, Server, seeded
from tests.storage.disk import Crash, Folder, Mode, Recording

NAMES = st.sampled_from(["a", "b"])
MODES = st.sampled_from(Mode)
SEEDS = st.integers(0, 2**16)


class Machine(RuleBasedStateMachine):
    """Each rule may be cut short by a crash that an earlier rule has set."""

    @initialize(seed=SEEDS)
    def start(self, seed):
        self.rng, self.promise = seeded("machine", seed), Promise()
        self.disk, self.mode = Folder(), Mode.LOSE
        self.scratch = Scratch()
        self.calls = None
        self.boot()

    def boot(self):
        root = self.scratch.__enter__()
        self.disk.build(root)
        self.calls = Recording(root, self.disk)
        self.server = Server(self.calls, root / "data", self.promise, self.rng)

    def crash(self, mode):
        self.calls.dead = True
        self.calls.abandon()
        self.scratch.__exit__()
        self.disk = self.disk.after(mode, self.rng)
        self.boot()

    def attempt(self, action, *arguments):
        try:
            action(*arguments)
        except Crash:
            self.crash(self.mode)

    def here(self, name):
        return name in self.server.journals

    @rule(name=NAMES, shape=st.sampled_from([None, SHAPE, WIDER]))
    def create(self, name, shape):
        if not self.here(name):
            self.attempt(self.server.create, name, shape)

    @rule(name=NAMES, count=st.integers(1, 3))
    def push(self, name, count):
        if self.here(name) and self.server.journals[name].ring is not None:
            self.attempt(self.server.push, name, count)

    @rule(name=NAMES)
    def patch(self, name):
        if self.here(name) and self.server.journals[name].ring is not None:
            self.attempt(self.server.patch, name)

    @rule(name=NAMES)
    def copy(self, name):
        if self.here(name):
            self.server.copy(name)

    @rule(name=NAMES)
    def snapshot(self, name):
        if self.here(name):
            self.attempt(self.server.snapshot, name)

    @rule(name=NAMES, shape=st.sampled_from([None, SHAPE, WIDER]))
    def replace(self, name, shape):
        if self.here(name):
            self.attempt(self.server.replace, name, shape)

    @rule(name=NAMES)
    def delete(self, name):
        if self.here(name):
            self.attempt(self.server.delete, name)

    @rule()
    def flush(self):
        self.attempt(self.server.store.flush)

    @rule(mode=MODES)
    def stop_now(self, mode):
        self.crash(mode)

    @precondition(lambda self: self.calls.left is None)
    @rule(mode=MODES, steps=st.integers(0, 30))
    def stop_soon(self, mode, steps):
        self.mode, self.calls.left = mode, steps

    @rule()
    def restart(self):
        self.attempt(self.server.close)
        if not self.calls.dead:
            self.crash(Mode.KEEP)

    def teardown(self):
        if getattr(self, "calls", None) is not None:
            self.crash(Mode.LOSE)
            self.calls.abandon()
            self.scratch.__exit__()


Machine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestMachine = Machine.TestCase
