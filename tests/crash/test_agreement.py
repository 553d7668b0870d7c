"""The checker of rounds: a good history passes, and each planted lie is found by its own check."""

import pytest

from tests.crash.history import History, Kill, Left, Life, Pull, Push, Round, Standing, Upload
from tests.crash.promises import check
from tests.crash.violation import DOUBLED, LOST

LR = 0.5


def summary(number, version, step, epoch=1, contributions=2, applied=True, **changes):
    return {
        "epoch": epoch, "version": version, "step": step, "lr": LR, "replayed": False,
        "applied": applied, "round": number, "contributions": contributions, "wire": None,
        **changes,
    }  # fmt: skip


def push(worker, sequence, begin, end, told=None, status=None, slug="", base=(1, 1), **fields):
    if status is None and told is not None:
        status = 200
    attempt = Push("a", "i", worker, sequence, base, begin, end)
    return attempt._replace(status=status, slug=slug, summary=told, **fields)


def joined(worker, sequence, begin, end, number, replayed=False):
    told = {"applied": False, "replayed": replayed, "round": number, "missing": 1}
    return push(worker, sequence, begin, end, told, 202)


def given_up(worker, sequence, begin, end, number, reason="timeout"):
    told = {"round": number, "reason": reason}
    return push(worker, sequence, begin, end, told, 409, "round-abandoned")


def refused(worker, sequence, begin, end, slug, told=None):
    return push(worker, sequence, begin, end, told, 409, slug)


def sighting(number, begin, members, status="applied", version=2, step=1, epoch=1, **fields):
    counted = [] if members is None else [one for one in members if one[2]]
    told = None
    if status in ("applied", "skipped"):
        told = summary(number, version, step, epoch, len(counted), status == "applied")
    one = Round("a", "i", begin, begin + 0.1, number, status)
    base = (epoch, version - (status == "applied"))
    passes = 0 if members is None else len(members) - len(counted)
    return one._replace(
        reason="complete", base=base, place=(epoch, version), step=step, members=members,
        contributions=len(counted), passes=passes, summary=told,
    )._replace(**fields)  # fmt: skip


def standing(begin, worker, *ranges, last):
    highest = max(end for _, end in ranges)
    return Standing("a", "i", begin, begin + 0.1, worker, highest, ranges, last)


def pull(begin, version, step, epoch=1):
    return Pull("a", "i", begin, begin + 0.1, epoch, version, step)


FIRST = (("w", 1, 1.0), ("v", 1, 2.0))
GOOD = [
    Life("a", "i", 0.0, 1.0, True, 1, 1),
    joined("w", 1, 2.0, 2.1, 1),
    sighting(1, 2.2, FIRST[:1], "open", version=1, step=0),
    refused("w", 9, 2.3, 2.4, "already-contributed", {"round": 1, "sequence": 1}),
    push("v", 1, 3.0, 4.0),  # killed, and durable
    Kill(4.0, "run:fdatasync.RING_COMMIT-contribution.after"),
    push("v", 1, 5.0, 6.0, summary(1, 2, 1, replayed=True)),
    push("w", 1, 5.0, 6.1, summary(1, 2, 1, replayed=True)),
    sighting(1, 6.5, FIRST),
    refused("u", 1, 6.6, 6.7, "round-closed"),
    pull(6.8, 2, 1),
    # of passes only
    push("w", 2, 7.0, 8.0, summary(2, 2, 1, applied=False, contributions=0), base=(1, 2)),
    sighting(2, 8.1, (("w", 2, 0.0),), "skipped", version=2, step=1),
    # without the second one in time
    joined("w", 3, 9.0, 9.1, 3),
    given_up("w", 3, 9.2, 9.3, 3),
    sighting(3, 9.4, (("w", 3, 1.0),), "abandoned", version=2, step=1),
    Upload("a", "i", 10.0, 11.0, (1, 2), 2, 2),
    push("w", 4, 12.0, 13.0, summary(4, 2, 2, epoch=2, contributions=1), base=(2, 1)),
    sighting(4, 13.1, (("w", 4, 1.0),), version=2, step=2, epoch=2),
    pull(13.5, 2, 2, epoch=2),
    standing(14.0, "w", (1, 4), last=summary(4, 2, 2, epoch=2, contributions=1)),
    sighting(1, 15.0, None, contributions=2, summary=summary(1, 2, 1)),
]  # fmt: skip
FIFTH = [joined("w", 5, 16.0, 16.1, 5)]
LEFT = Left("a", "i", 16.0, "w")


def found(*events):
    history = History()
    for event in events:
        history.add(event)
    return {(one.check, one.column) for one in check(history, {"a": LR})}


def without(*indexes):
    return [event for at, event in enumerate(GOOD) if at not in indexes]


def test_a_good_history_passes():
    assert found(*GOOD) == set()
    assert found(*GOOD, *FIFTH) == set(), "a round may be open at the end"


@pytest.mark.parametrize("at", [2, 3, 4, 8, 9, 10, 12, 15, 18, 19, 20, 21])
def test_each_sight_alone_may_be_missed(at):
    assert found(*without(at)) == set(), GOOD[at]


PLANTED = {
    "it changes rounds": (
        [*GOOD, *FIFTH, joined("w", 5, 17.0, 17.1, 6, replayed=True)],
        ("fates", DOUBLED),
    ),
    "it is taken twice": (
        [*GOOD, *FIFTH, joined("w", 5, 17.0, 17.1, 5)],
        ("fates", DOUBLED),
    ),
    "its summary changes": (
        [*GOOD, push("w", 1, 17.0, 17.1, summary(1, 2, 1, replayed=True, lr=0.25))],
        ("fates", DOUBLED),
    ),
    "it is over and open again": (
        [*GOOD, joined("w", 1, 17.0, 17.1, 1, replayed=True)],
        ("fates", LOST),
    ),
    "it counted and is given up": (
        [*GOOD, given_up("w", 1, 17.0, 17.1, 1)],
        ("fates", LOST),
    ),
    "it was given up and counts": (
        [*GOOD, push("w", 3, 17.0, 17.1, summary(3, 3, 2))],
        ("fates", LOST),
    ),
    "it is given up for another reason": (
        [*GOOD, given_up("w", 3, 17.0, 17.1, 3, "params")],
        ("fates", LOST),
    ),
    "it is not known any more": (
        [*GOOD, *FIFTH, refused("w", 5, 17.0, 17.1, "epoch-changed")],
        ("fates", LOST),
    ),
    "it comes too late for its own round": (
        [*GOOD, *FIFTH, refused("w", 5, 17.0, 17.1, "round-closed")],
        ("fates", LOST),
    ),
    "its worker is retired and did not leave": (
        [*GOOD, *FIFTH, refused("w", 5, 17.0, 17.1, "worker-retired")],
        ("refusals", LOST),
    ),
    "what it is refused for was never sent": (
        [*GOOD, refused("w", 9, 17.0, 17.1, "already-contributed", {"round": 5, "sequence": 8})],
        ("fates", DOUBLED),
    ),
    "a round shrinks": (
        [*GOOD, sighting(5, 17.0, FIFTH_SEEN := (("w", 5, 1.0), ("v", 5, 1.0)), "open"),
         sighting(5, 18.0, FIFTH_SEEN[1:], "open")],
        ("sightings", LOST),
    ),
    "a round turns": (
        [*GOOD, sighting(5, 17.0, FIFTH_SEEN, "open"),
         sighting(5, 18.0, FIFTH_SEEN[::-1], "open")],
        ("sightings", LOST),
    ),
    "a round grows when it is over": (
        [*GOOD, sighting(1, 17.0, (*FIRST, ("u", 1, 1.0)))],
        ("sightings", LOST),
    ),
    "a round ends twice": (
        [*GOOD, sighting(1, 17.0, FIRST, "abandoned", version=2)],
        ("sightings", DOUBLED),
    ),
    "a round has another summary": (
        [*GOOD, sighting(1, 17.0, FIRST, summary=summary(1, 2, 1, lr=0.25))],
        ("sightings", DOUBLED),
    ),
    "a round is over and open": (
        [*GOOD, sighting(4, 17.0, (("w", 4, 1.0),), "open", epoch=2)],
        ("sightings", LOST),
    ),
    "a round is forgotten": (
        [*GOOD, sighting(4, 17.0, None, "unknown")],
        ("sightings", LOST),
    ),
    "a round is nobody's": (
        [*GOOD, push("w", 6, 17.0, 18.0, summary(6, 4, 4, epoch=2, contributions=1))],
        ("numbers", LOST),
    ),
    "a round is applied twice": (
        [*GOOD, push("w", 5, 17.0, 18.0, summary(5, 4, 4, epoch=2, contributions=1))],
        ("numbers", DOUBLED),
    ),
    "two rounds have one version": (
        [*GOOD, push("w", 5, 17.0, 18.0, summary(5, 2, 2, epoch=2, contributions=1))],
        ("numbers", LOST),
    ),
    "a skipped round moves the version": (
        [*GOOD,
         push("w", 5, 17.0, 18.0, summary(5, 3, 3, epoch=2, contributions=0, applied=False))],
        ("numbers", DOUBLED),
    ),
    "a round is applied on another version": (
        [*without(18), sighting(4, 13.1, (("w", 4, 1.0),), step=2, epoch=2, base=(2, 0))],
        ("numbers", LOST),
    ),
    "a round lacks one who was told so": (
        [*without(2, 8), sighting(1, 6.5, FIRST[:1], contributions=2)],
        ("members", LOST),
    ),
    "a round has what nobody sent": (
        [*without(8), sighting(1, 6.5, (*FIRST, ("x", 1, 0.0)))],
        ("members", DOUBLED),
    ),
    "a round has who was refused": (
        [*without(8), sighting(1, 6.5, (*FIRST, ("u", 1, 0.0)))],
        ("members", DOUBLED),
    ),
    "a round has what was cut": (
        [*without(8), push("u", 2, 2.0, 2.1, whole=False),
         sighting(1, 6.5, (*FIRST, ("u", 2, 0.0)))],
        ("members", DOUBLED),
    ),
    "one is in two rounds": (
        [*without(12), sighting(2, 8.1, (("w", 2, 0.0), ("v", 1, 0.0)), "skipped", step=1)],
        ("members", DOUBLED),
    ),
    "a worker is in a round twice": (
        [*without(8), sighting(1, 6.5, (*FIRST, ("w", 9, 0.0)))],
        ("members", DOUBLED),
    ),
    "a round counts more than it has": (
        [*without(8, 21), sighting(1, 6.5, FIRST, contributions=3)],
        ("members", DOUBLED),
    ),
    "a forgotten round had one more": (
        [*without(2, 8, 21), sighting(1, 15.0, None, contributions=3, summary=summary(1, 2, 1))],
        ("members", DOUBLED),
    ),
    "a forgotten round had one less": (
        [*without(2, 8, 21), sighting(1, 15.0, None, contributions=1, summary=summary(1, 2, 1))],
        ("members", LOST),
    ),
    "its round was given up and it was told otherwise": (
        [*without(12), sighting(2, 8.1, (("w", 2, 0.0),), "abandoned", version=2, step=1)],
        ("members", LOST),
    ),
    "it was given up and its round was applied": (
        [*without(15), sighting(3, 9.4, (("w", 3, 1.0),), version=3, step=2)],
        ("members", LOST),
    ),
    "a reader sees half of a round": (
        [*GOOD, pull(17.0, 3, 2, epoch=2)],
        ("looks", DOUBLED),
    ),
    "a reader sees a step too few": (
        [*GOOD, pull(17.0, 2, 1, epoch=2)],
        ("looks", LOST),
    ),
    "who was late is in the round": (
        [*GOOD, push("v", 4, 17.0, 18.0, summary(4, 2, 2, epoch=2, contributions=1))],
        ("order", LOST),
    ),
    "a pull does not show what was told": (
        [*GOOD, pull(17.0, 2, 1)],
        ("pulls", LOST),
    ),
    "a contribution is not known": (
        [*GOOD, *FIFTH, standing(17.0, "w", (1, 4), last=summary(4, 2, 2, 2, 1))],
        ("standings", LOST),
    ),
    "a refused one is known": (
        [*GOOD, standing(17.0, "u", (1, 1), last={"round": 1, "missing": 1})],
        ("standings", DOUBLED),
    ),
    "a worker's last round is open and was over": (
        [*GOOD, standing(17.0, "w", (1, 4), last={"round": 4, "missing": 1})],
        ("standings", DOUBLED),
    ),
    "a worker's last round was given up and counted": (
        [*GOOD, standing(17.0, "w", (1, 4), last={"round": 4, "abandoned": "timeout"})],
        ("standings", DOUBLED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name):
    events, expected = PLANTED[name]
    assert expected in found(*events)


def test_who_has_left_may_be_told_so():
    late = refused("w", 4, 17.0, 17.1, "worker-retired")
    assert found(*GOOD, LEFT, late) == set()


def test_an_unsettled_contribution_may_be_in_a_round():
    unknown = push("u", 2, 2.0, 2.1)
    seen = sighting(1, 6.5, (*FIRST, ("u", 2, 0.0)))
    assert found(*without(8, 21), unknown, seen) == set()
