"""Stops at every step: nothing acknowledged is lost, nothing is applied twice, all comes back.

And the other way round: with any one sync taken away, something is.
"""

import subprocess
import sys
import time

import pytest

from service.storage.failures import Refused
from service.storage.files import Files, Sync
from service.storage.store import Store
from tests.storage.counter import (
    ROOT,
    SCALE,
    Loss,
    Promise,
    Scratch,
    Server,
    resume,
    seeded,
    taken_up,
)
from tests.storage.disk import Folder, Mode, Recording
from tests.storage.explorer import Explorer

IMAGES = 2000 * SCALE


def short_lives(server):
    return server.delete("a") if "a" in server.journals else server.create("a")


def copied_soon(server):
    """Two sessions, some checkpoints, a backup."""
    step = next((name for name in ("a", "b") if name not in server.journals), None)
    if step is not None:
        return server.create(step)
    action = server.rng.choice([server.checkpoint, server.back_up, lambda: server.push("a")])
    return action()


ELSEWHERE = {Sync.FORGET_ORPHANS, Sync.FORGET_SESSIONS}
"""In test_offline.py: only an operator does that."""
OFTEN = {
    "INDEX_OPEN": (short_lives, 1),
    "CHECKPOINT": (Server.checkpoint, 3),
    "BACKUP": (copied_soon, 3),
}
"""What to do most, to need a sync soon, and which steps are followed by a stop."""
ALONE = ELSEWHERE | {Sync.INDEX_WITNESS}


def test_every_crash_keeps_every_promise():
    images, synced = 0, set()
    for seed in range(1000 * SCALE):
        explorer = Explorer(seed)
        explorer.run(actions=25, every=2)
        images += explorer.images
        synced |= explorer.synced
        if images >= IMAGES and synced == set(Sync) - ELSEWHERE:
            break
    assert images >= IMAGES
    assert synced == set(Sync) - ELSEWHERE, "a sync that no run reaches proves nothing"


@pytest.mark.parametrize("site", [site for site in Sync if site not in ALONE])
def test_no_sync_can_be_left_out(site):
    often = [how for name, how in OFTEN.items() if site.name.startswith(name)]
    act, every = often[0] if often else (Server.act, 1)

    def until_it_breaks():
        for seed in range(60):
            Explorer(seed, without=[site], act=act).run(actions=25, every=every)

    with pytest.raises((Loss, Refused)):
        until_it_breaks()


@pytest.mark.parametrize("without", [[], [Sync.INDEX_WITNESS]])
def test_witnesses_tell_damage_from_a_torn_end(scratch, without):
    """Record rows are needed when two things go wrong: power is lost, and the last record rots."""
    disk, rng = Folder(), seeded("witness")
    calls = Recording(scratch, disk, without)
    server = Server(calls, scratch / "data", Promise(), rng)
    server.create("a")
    server.push("a")
    server.push("a")
    server.store.flush()
    place = server.journals["a"].ring.shape.offset(1)
    calls.abandon()
    with Scratch() as root:
        disk.after(Mode.LOSE, rng).build(root)
        (path,) = root.glob("data/sessions/*/ring-0")
        content = bytearray(path.read_bytes())
        for offset in range(place, len(content), 4096):
            content[offset] ^= bool(content[offset])  # whichever place record 2 has
        path.write_bytes(content)
        store = Store(root / "data")
        recovery = taken_up(store)
        store.close()
    assert bool(recovery.damaged) == (not without)


def test_a_process_that_is_killed_keeps_every_promise(scratch):
    """The same application with real calls, in a process of its own, killed 12 times."""
    rng, floor = seeded("kill"), 0
    for turn in range(12):
        command = [sys.executable, "-m", "tests.storage.victim", str(scratch / "data"), str(turn)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            told = [child.stdout.readline()]
            time.sleep(rng.random() * 0.3)
            child.kill()
            told += child.stdout.readlines()
        whole = [line for line in told if line.endswith("\n")]
        floor = max([floor, *(int(line) for line in whole)])
        store = Store(scratch / "data", Files())
        recovery = taken_up(store)
        store.close()
        assert not recovery.damaged
        state = resume(recovery.sessions["a"])
        assert state.number in (floor, floor + 1)
        assert sorted(state.seen.values()) == list(range(1, state.number + 1))
        floor = state.number
    assert floor > 12
