"""What must hold in a history, whatever was killed: each check is a sort.

The invariants, after notes/durability.md:

1. `keys`: an acknowledged key has exactly one place, whatever happens; no two keys share one.
2. `gaps`: steps are 1..n without holes but for pushes that nobody knows of, and the server never
   claims more or fewer than were sent or acknowledged.
3. `order`: A acknowledged before B was sent: A lies before B.
4. `pulls`: a pull shows what was acknowledged before it, and no later one shows less.
5. bits: `reference.py`.
6. rounds: `agreement.py`, in place of 1 and 2.
7. `conditions`: an upload taken under If-Match found what it named; each epoch began with one.

And of what is no push: `changes` (the learning rate is one that was set), `refusals` (no answer is
a surprise), `lives` (a deleted session is gone, a created one is there), `standings` (what the
server says it knows of each worker).
"""

import bisect
from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

from tests.crash import agreement
from tests.crash.history import NEVER, Gone, Life, Pull, bare, passing, place_of, unsettled, views
from tests.crash.violation import DOUBLED, LOST, Violation

WINDOW = 1024


def check(history, lrs):
    """All violations of a history.

    Args:
        history: Of a run that has ended: whatever could be settled was.
        lrs: The learning rate that each session is created with.
    """
    found = lives(history)
    for view in views(history):
        for one in (agreement.check,) if view.in_rounds else (keys, gaps):
            found += one(view)
        for one in (order, conditions, refusals, standings):
            found += one(view)
        found += changes(view, lrs[view.session])
    return found


UNDONE = ("epoch-changed", "version-unknown", "params-missing", "session-unknown")
"""What nobody is told of a push that was applied."""


def keys(view):
    """1: one place for each key, one key for each place."""
    found = []

    def wrong(column, at, text):
        found.append(Violation(column, "keys", view.session, at, text))

    places, steps = {}, {}
    for fate in view.fates.values():
        fresh = [answer for answer in fate.answers if not answer.summary["replayed"]]
        if len(fresh) > 1:
            wrong(DOUBLED, fresh[1].returned, f"{fate.key} was applied {len(fresh)} times")
        for answer in fate.answers[1:]:
            if bare(answer.summary) != bare(fate.summary):
                wrong(
                    DOUBLED, answer.returned,
                    f"{fate.key} was {place_of(fate.summary)}, then {place_of(answer.summary)}",
                )  # fmt: skip
        for late in fate.attempts:
            if late.invoked > fate.acked and late.slug in UNDONE and not view.ended:
                wrong(LOST, late.returned, f"{fate.key} was acknowledged, then {late.slug}")
        if fate.answers:
            for value, where in ((fate.place, places), (fate.summary["step"], steps)):
                if value in where:
                    at = max(fate.acked, view.fates[where[value]].acked)
                    wrong(LOST, at, f"{fate.key} and {where[value]} are both {value}")
                where[value] = fate.key
    return found


def gaps(view):
    """2: steps without holes; the server's counts are possible ones."""
    found, holes = [], []

    def wrong(column, at, text):
        found.append(Violation(column, "gaps", view.session, at, text))

    last = None
    for fate in view.applied:
        step = fate.summary["step"]
        before = last.summary["step"] if last else 0
        if step < before:
            wrong(LOST, fate.acked, f"step {step} has a later version than step {before}")
        holes += [fate.acked] * (step - before - 1)
        if last and fate.place[0] == last.place[0]:
            versions = fate.place[1] - last.place[1]
            if versions != step - before:
                text = f"{versions} versions and {step - before} steps lie between two pushes"
                wrong(DOUBLED, fate.acked, text)
        last = fate
    unsure = sum(fate.open for fate in view.fates.values())
    if len(holes) > unsure:
        wrong(LOST, holes[0], f"{len(holes)} steps are nobody's, {unsure} pushes are unsettled")
    return found + counts(view)


def counts(view):
    """2: what a look says was acknowledged before it, or sent by then."""
    found = []
    acked = sorted(fate.acked for fate in view.fates.values())
    sent = sorted(fate.sent for fate in view.fates.values() if not fate.never)
    for pull in view.pulls:
        if pull.step is None:
            continue
        least, most = (
            bisect.bisect_left(acked, pull.invoked),
            bisect.bisect_left(sent, pull.returned),
        )
        if pull.step < least:
            text = f"{pull.step} steps, and {least} pushes were acknowledged"
            found.append(Violation(LOST, "gaps", view.session, pull.returned, text))
        if pull.step > most:
            text = f"{pull.step} steps of {most} pushes"
            found.append(Violation(DOUBLED, "gaps", view.session, pull.returned, text))
    return found


class Seen(NamedTuple):
    """Something with a place and a time."""

    invoked: float
    returned: float
    place: tuple
    what: str
    moves: bool


def order(view):
    """3 and 4: who began after another had ended does not lie before it."""
    # Who was told that a round is over is in it, and who comes later is not.
    seen = [
        Seen(f.sent, f.told, f.place, f"push {f.key}", f.summary.get("applied", True))
        for f in view.applied
    ]
    seen += [Seen(p.invoked, p.returned, p.place, f"a pull ({p.what})", False) for p in view.pulls]
    seen += [
        Seen(u.invoked, u.returned, (u.taken, 1), "an upload", False)
        for u in view.uploads if u.taken is not None
    ]  # fmt: skip
    ended = sorted(seen, key=lambda one: one.returned)
    found, at, latest = [], 0, None
    for one in sorted(seen, key=lambda one: one.invoked):
        while at < len(ended) and ended[at].returned < one.invoked:
            if latest is None or ended[at].place > latest.place:
                latest = ended[at]
            at += 1
        if latest is None or one.place > latest.place:
            continue
        if one.place < latest.place or one.moves:
            check = "order" if one.moves and latest.moves else "pulls"
            text = f"{one.what} at {one.place} began after {latest.what} at {latest.place}"
            found.append(Violation(LOST, check, view.session, one.returned, text))
    return found


def conditions(view):
    """7: an upload was taken on what it named, and nothing else begins an epoch."""
    found = []

    def wrong(column, at, text):
        found.append(Violation(column, "conditions", view.session, at, text))

    taken = Counter(upload.taken for upload in view.uploads if upload.taken is not None)
    last = defaultdict(int)
    for epoch, version in (fate.place for fate in view.applied):
        last[epoch] = max(last[epoch], version)
    for upload in view.uploads:
        if upload.taken is None:
            continue
        epoch, version = upload.condition
        if upload.taken != epoch + 1:
            wrong(DOUBLED, upload.returned, f"an upload on epoch {epoch} began {upload.taken}")
        if version is not None and last[epoch] > version:
            text = f"an upload replaced {epoch}-{version}, and {epoch}-{last[epoch]} was there"
            wrong(LOST, upload.returned, text)
        if taken[upload.taken] > 1:
            wrong(LOST, upload.returned, f"two uploads began epoch {upload.taken}")
    first = view.life.epoch if view.life else 1
    begun = {fate.place[0]: fate.acked for fate in view.applied}
    begun |= {pull.epoch: pull.returned for pull in view.pulls}
    for epoch, at in begun.items():
        if epoch != first and not taken[epoch]:
            wrong(DOUBLED, at, f"nothing began epoch {epoch}")
    return found


MAY_BE = {"epoch-changed"}
MAY_BE_IN_ROUNDS = {"round-closed", "round-abandoned", "already-contributed", "norm-exceeded"}
MAY_BE_ENDED = {"session-gone", "params-missing"}
"""What a push may be told when its session was deleted, and perhaps created anew."""


def refusals(view):
    """Answers that no push of this workload can have."""
    found = []
    highest = defaultdict(int)
    for fate in view.fates.values():
        highest[fate.key[0]] = max(highest[fate.key[0]], fate.key[1])
    for fate in view.fates.values():
        for push in fate.attempts:
            if push.status in (None, 200, 202) or (passing(push) and push.status != 500):
                continue
            worker, sequence = fate.key
            expected = push.slug in MAY_BE or (view.ended and push.slug in MAY_BE_ENDED)
            expected |= view.in_rounds and push.slug in MAY_BE_IN_ROUNDS
            if push.slug == "too-old":
                expected = sequence <= highest[worker] - WINDOW
            if push.slug == "worker-retired":
                expected = worker in view.left and view.left[worker].invoked < push.returned
            if not expected:
                text = f"{fate.key} on {push.base}: {push.status} {push.slug}"
                found.append(Violation(LOST, "refusals", view.session, push.returned, text))
    return found


def changes(view, first):
    """The learning rate of each update, and each look, is one that may have been set then."""
    begin = view.life.invoked if view.life else -NEVER
    sets = [
        (p.invoked, p.returned, p.lr)
        for p in view.patches
        if p.status == 200 or unsettled(p.status)
    ]
    sure = [(p.returned, p.invoked) for p in view.patches if p.status == 200]
    by_lr = defaultdict(list, {first: [(begin, begin)]})
    for invoked, returned, lr in sets:
        by_lr[lr].append((invoked, returned))
    ends, newest = [], [-NEVER]
    for returned, invoked in sorted(sure):
        ends.append(returned)
        newest.append(max(newest[-1], invoked))
    found = []
    reads = [(f.sent, f.told, f.summary["lr"], f"push {f.key}") for f in view.applied]
    reads += [(p.invoked, p.returned, p.lr, "a look") for p in view.pulls if p.lr is not None]
    for invoked, returned, lr, what in reads:
        # Whatever had ended when the newest of those began that ended before the read is past.
        past = newest[bisect.bisect_left(ends, invoked)]
        if not any(start < returned and end >= past for start, end in by_lr[lr]):
            text = f"{what} has lr {lr}, which was not set then"
            found.append(Violation(LOST, "changes", view.session, returned, text))
    return found


def standings(view):
    """What the server says of each worker is what was acknowledged, and no more."""
    found = []
    by_worker = defaultdict(list)
    for fate in view.fates.values():
        by_worker[fate.key[0]].append(fate)
    for standing in view.standings:
        if standing.worker in view.left and view.left[standing.worker].invoked < standing.returned:
            continue  # its numbers are forgotten, unless a crash came between
        has = {n for begin, end in standing.ranges for n in range(begin, end + 1)}
        floor = (standing.highest or 0) - WINDOW
        for fate in by_worker[standing.worker]:
            sequence, text = fate.key[1], None
            if fate.acked < standing.invoked and sequence > floor and sequence not in has:
                column, text = LOST, f"{fate.key} was acknowledged and is not known"
            elif sequence in has and fate.never:
                column, text = DOUBLED, f"{fate.key} is known, after: {fate.story}"
            elif sequence in has and fate.sent > standing.returned:
                column, text = DOUBLED, f"{fate.key} is known before it was sent"
            if text:
                found.append(Violation(column, "standings", view.session, standing.returned, text))
        known = {fate.key[1] for fate in by_worker[standing.worker]}
        for sequence in sorted(has - known):
            text = f"({standing.worker}, {sequence}) is known and was never sent"
            found.append(Violation(DOUBLED, "standings", view.session, standing.returned, text))
        newest = view.fates.get((standing.worker, standing.highest))
        if newest is not None and not is_last(standing, newest):
            text = f"the last summary of {standing.worker} is {standing.last}"
            found.append(Violation(DOUBLED, "standings", view.session, standing.returned, text))
    return found


def is_last(standing, fate):
    """Whether what is said of a worker's newest push is what became of it."""
    last = standing.last
    if last is None:
        return not fate.answers
    if fate.round is not None and "abandoned" in last:
        return last["round"] == fate.round and not fate.answers
    if fate.round is not None and "missing" in last:  # its round was open
        return last["round"] == fate.round and standing.invoked < fate.told
    return not fate.answers or bare(last) == bare(fate.summary)


def lives(history):
    """A deleted session is gone and a created one is there; each has epochs of its own."""
    found = []
    by_session = defaultdict(list)
    for event in history.events:
        by_session[getattr(event, "session", None)].append(event)
    for session, events in by_session.items():
        if session is not None:
            found += _lives(session, events)
    return found


def _lives(session, events):
    found = []
    ends = {e.incarnation: e for e in events if type(e) is Life and not e.created}
    begins = [e for e in events if type(e) is Life and e.created]
    for event in events:
        if type(event) is Gone:
            first = min((b.returned for b in begins), default=NEVER)
            if event.slug == "session-unknown" and first < event.invoked:
                text = "it was created once, and nobody remembers"
                found.append(Violation(LOST, "lives", session, event.returned, text))
            alive = [
                b for b in begins
                if b.returned < event.invoked
                and (b.incarnation not in ends or ends[b.incarnation].invoked > event.returned)
            ]  # fmt: skip
            if alive:
                text = f"incarnation {alive[0].incarnation} is not there"
                found.append(Violation(LOST, "lives", session, event.returned, text))
        elif type(event) is Pull:
            end = ends.get(event.incarnation)
            if end is not None and end.returned < event.invoked:
                text = f"incarnation {event.incarnation} was deleted and is there"
                found.append(Violation(DOUBLED, "lives", session, event.returned, text))
            if event.incarnation not in {b.incarnation for b in begins}:
                text = f"nobody created incarnation {event.incarnation}"
                found.append(Violation(DOUBLED, "lives", session, event.returned, text))
    begins.sort(key=lambda life: life.invoked)
    for before, after in pairwise(begins):
        if after.epoch <= before.epoch:
            text = f"created in epoch {after.epoch}, after one in {before.epoch}"
            found.append(Violation(LOST, "lives", session, after.returned, text))
    return found
