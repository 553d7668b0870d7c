"""The checker itself: a good history passes, and each planted lie is found by its own check."""

import pytest

from tests.crash.history import (
    Gone,
    History,
    Kill,
    Life,
    Patch,
    Pull,
    Push,
    Standing,
    Upload,
)
from tests.crash.promises import check
from tests.crash.violation import DOUBLED, LOST

LR = 0.5


def summary(version, epoch=1, step=None, **changes):
    numbers = {"epoch": epoch, "version": version, "step": step or version - 1}
    return {**numbers, "lr": LR, "replayed": False, **changes}


def push(sequence, begin, end, version=None, epoch=1, worker="w", **changes):
    """An attempt that got a summary, or no answer at all."""
    fields = {name: changes.pop(name) for name in tuple(changes) if name in Push._fields}
    attempt = Push("a", "i", worker, sequence, (1, 1), begin, end)
    if version is not None:
        told = summary(version, epoch, **changes)
        attempt = attempt._replace(status=200, summary=told)
    return attempt._replace(**fields)


def pull(begin, end, version, epoch=1, **fields):
    return Pull("a", "i", begin, end, epoch, version)._replace(**fields)


def refusal(sequence, begin, end, status, slug):
    return push(sequence, begin, end, status=status, slug=slug)


def standing(at, *ranges, last=None):
    highest = max((end for _, end in ranges), default=None)
    return Standing("a", "i", at, at + 0.1, "w", highest, ranges, last or LAST.get(highest))


GOOD = [
    Life("a", "i", 0.0, 1.0, True, 1, 1),
    push(1, 2.0, 3.0, 2),
    push(2, 3.5, 5.0),  # killed, and applied
    Kill(5.0, "run:answer.steps.before"),
    push(2, 6.0, 7.0, 3, replayed=True),
    push(3, 7.5, 8.0, whole=False),  # cut, and then whole
    push(3, 8.1, 9.0, 4),
    push(1, 9.5, 10.0, 2, replayed=True),
    push(7, 10.0, 10.5, whole=False),
    pull(9.1, 9.2, 4, step=3),
    standing(11.0, (1, 3), last=summary(4)),
    Patch("a", "i", 12.0, 13.0, 0.25, 200),
    push(4, 14.0, 15.0, 5, lr=0.25),
    Upload("a", "i", 16.0, 17.0, (1, 5), 2, 2),
    refusal(5, 18.0, 19.0, 409, "epoch-changed"),
    push(6, 20.0, 21.0, 2, epoch=2, step=5, lr=0.25),
    pull(22.0, 23.0, 2, epoch=2, step=5, lr=0.25),
]


LAST = {3: summary(4), 4: summary(5, lr=0.25), 6: summary(2, epoch=2, step=5, lr=0.25)}


def found(*events):
    history = History()
    for event in events:
        history.add(event)
    return {(one.check, one.column) for one in check(history, {"a": LR})}


def without(*indexes):
    return [event for at, event in enumerate(GOOD) if at not in indexes]


def test_a_good_history_passes():
    assert found(*GOOD) == set()


def test_each_event_alone_may_be_unseen():
    """Nobody need see everything: pulls, standings, unanswered attempts are no duty."""
    for at, event in enumerate(GOOD):
        unseen = isinstance(event, Pull | Standing) or getattr(event, "status", 0) is None
        if unseen and at != 2:
            assert found(*without(at)) == set(), event


PLANTED = {
    "an acknowledged push moves": (
        [*GOOD, push(1, 24.0, 25.0, 3, replayed=True)],
        ("keys", DOUBLED),
    ),
    "its summary changes": (
        [*GOOD, push(1, 24.0, 25.0, 2, replayed=True, lr=0.75)],
        ("keys", DOUBLED),
    ),
    "it is applied again": (
        [*GOOD, push(1, 24.0, 25.0, 3, epoch=2, step=6, lr=0.25)],
        ("keys", DOUBLED),
    ),
    "it is refused later": (
        [*GOOD, refusal(1, 24.0, 25.0, 409, "epoch-changed")],
        ("keys", LOST),
    ),
    "two pushes have one place": (
        [*GOOD, push(8, 24.0, 25.0, 2, epoch=2, step=6, lr=0.25)],
        ("keys", LOST),
    ),
    "two pushes have one step": (
        [*GOOD, push(8, 24.0, 25.0, 3, epoch=2, step=5, lr=0.25)],
        ("keys", LOST),
    ),
    "a step is nobody's": (
        [*GOOD, push(8, 24.0, 25.0, 4, epoch=2, step=7, lr=0.25)],
        ("gaps", LOST),
    ),
    "a step is counted that has no version": (
        [*GOOD, push(8, 23.9, 24.0), push(9, 24.0, 25.0, 3, epoch=2, step=7, lr=0.25)],
        ("gaps", DOUBLED),
    ),
    "steps go back where versions go on": (
        [GOOD[0], push(1, 2.0, 3.0, 2, step=2), push(2, 2.0, 3.0, 3, step=1)],
        ("gaps", LOST),
    ),
    "fewer steps than acknowledged": (
        [*GOOD, pull(24.0, 25.0, 2, epoch=2, step=4)],
        ("gaps", LOST),
    ),
    "more steps than sent": (
        [*GOOD, pull(24.0, 25.0, 3, epoch=2, step=6)],
        ("gaps", DOUBLED),
    ),
    "a cut body was applied": (
        [*GOOD, pull(10.6, 10.7, 5, step=4)],
        ("gaps", DOUBLED),
    ),
    "a later push lies before an earlier one": (
        [GOOD[0], push(1, 2.0, 3.0, 3), push(2, 4.0, 5.0, 2)],
        ("order", LOST),
    ),
    "a pull does not show what was acknowledged": (
        [*GOOD, pull(24.0, 25.0, 5)],
        ("pulls", LOST),
    ),
    "a pull shows less than one before": (
        [GOOD[0], push(1, 2.0, 9.0, 2), pull(3.0, 4.0, 2), pull(5.0, 6.0, 1)],
        ("pulls", LOST),
    ),
    "a pull showed what was sent after it": (
        [*GOOD, pull(5.5, 5.6, 4)],
        ("pulls", LOST),
    ),
    "an upload was taken on a version that had passed": (
        [*without(13), Upload("a", "i", 16.0, 17.0, (1, 4), 2, 2)],
        ("conditions", LOST),
    ),
    "an upload was taken in another epoch": (
        [*without(13), Upload("a", "i", 16.0, 17.0, (1, 5), 2, 3)],
        ("conditions", DOUBLED),
    ),
    "two uploads began one epoch": (
        [*GOOD, Upload("a", "i", 16.0, 17.5, (1, None), 3, 2)],
        ("conditions", LOST),
    ),
    "an epoch began by itself": (
        [*GOOD, pull(24.0, 25.0, 1, epoch=3)],
        ("conditions", DOUBLED),
    ),
    "a change is lost": (
        [*without(12), push(4, 14.0, 15.0, 5)],
        ("changes", LOST),
    ),
    "a look shows the rate of before": (
        [*GOOD, pull(24.0, 25.0, 2, epoch=2, lr=LR)],
        ("changes", LOST),
    ),
    "a rate that nobody has set": (
        [*GOOD, pull(24.0, 25.0, 2, epoch=2, lr=0.75)],
        ("changes", LOST),
    ),
    "a version was promised and is not known": (
        [*GOOD, refusal(8, 24.0, 25.0, 409, "version-unknown")],
        ("refusals", LOST),
    ),
    "a failure that nobody expects": (
        [*GOOD, refusal(8, 24.0, 25.0, 500, "internal")],
        ("refusals", LOST),
    ),
    "other bytes under a key": (
        [*GOOD, refusal(8, 24.0, 25.0, 422, "key-reused")],
        ("refusals", LOST),
    ),
    "too old, and it is not": (
        [*GOOD, refusal(1, 24.0, 25.0, 409, "too-old")],
        ("refusals", LOST),
    ),
    "a worker's push is not known": (
        [*GOOD, standing(24.0, (1, 1), (3, 4), (6, 6))],
        ("standings", LOST),
    ),
    "a push is known that was cut": (
        [*GOOD, standing(24.0, (1, 4), (6, 7))],
        ("standings", DOUBLED),
    ),
    "a push is known that was refused": (
        [*GOOD, standing(24.0, (1, 6))],
        ("standings", DOUBLED),
    ),
    "a push is known that nobody sent": (
        [*GOOD, standing(24.0, (1, 4), (6, 6), (99, 99))],
        ("standings", DOUBLED),
    ),
    "a push is known before it was sent": (
        [*GOOD, standing(9.6, (1, 4))],
        ("standings", DOUBLED),
    ),
    "a worker's last summary is nobody's": (
        [*GOOD, standing(24.0, (1, 4), (6, 6), last=summary(9, epoch=2, step=12))],
        ("standings", DOUBLED),
    ),
    "a session is gone": (
        [*GOOD, Gone("a", 24.0, 25.0)],
        ("lives", LOST),
    ),
    "a deleted session is there": (
        [*GOOD, Life("a", "i", 24.0, 25.0, False), pull(26.0, 27.0, 2, epoch=2)],
        ("lives", DOUBLED),
    ),
    "a deleted session is forgotten": (
        [*GOOD, Life("a", "i", 24.0, 25.0, False), Gone("a", 26.0, 27.0, "session-unknown")],
        ("lives", LOST),
    ),
    "a session is there that nobody created": (
        [*GOOD, pull(24.0, 25.0, 1, incarnation="j")],
        ("lives", DOUBLED),
    ),
    "a session is created anew in an epoch of before": (
        [
            *GOOD, Life("a", "i", 24.0, 25.0, False), Life("a", "j", 26.0, 27.0, True, 1, 3),
        ],
        ("lives", LOST),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name):
    events, expected = PLANTED[name]
    assert expected in found(*events)


def test_after_its_end_a_push_may_be_told_so():
    end = Life("a", "i", 24.0, 25.0, False)
    late = [refusal(1, 26.0, 27.0, 410, "session-gone"), Gone("a", 26.0, 27.0)]
    again = Life("a", "j", 28.0, 29.0, True, 3, 3)
    later = refusal(8, 30.0, 31.0, 409, "epoch-changed")
    assert found(*GOOD, end, *late, again, later) == set()


def test_what_the_next_incarnation_says_settles_no_push_of_this_one():
    end = Life("a", "i", 24.5, 25.5, False)
    again = Life("a", "j", 28.0, 29.0, True, 3, 3)
    refused = refusal(8, 30.0, 31.0, 409, "epoch-changed")
    unknown, seen = push(8, 23.0, 24.0), pull(24.1, 24.2, 3, epoch=2, step=6)
    assert found(*GOOD, unknown, seen, end, again, refused) == set()
    assert ("gaps", DOUBLED) in found(*GOOD, unknown, seen, refused)


def test_a_4xx_settles_that_an_attempt_changed_nothing_and_a_5xx_does_not():
    seen = pull(30.0, 31.0, 3, epoch=2, step=6)
    assert found(*GOOD, refusal(8, 24.0, 25.0, 503, "shutting-down"), seen) == set()
    assert found(*GOOD, refusal(8, 24.0, 25.0, 429, "log-full"), seen) == {("gaps", DOUBLED)}
    end = Life("a", "i", 32.0, 33.0, False)
    gone = refusal(8, 24.0, 25.0, 410, "session-gone")
    assert found(*GOOD, gone, seen, end) == {("gaps", DOUBLED)}


def test_an_unsettled_push_explains_one_step_and_no_more():
    unknown = push(8, 24.0, 25.0)
    after = push(9, 26.0, 27.0, 4, epoch=2, step=7, lr=0.25)
    assert found(*GOOD, unknown, after) == set()
    beyond = push(9, 26.0, 27.0, 5, epoch=2, step=8, lr=0.25)
    assert ("gaps", LOST) in found(*GOOD, unknown, beyond)


def test_a_number_below_the_window_may_be_too_old():
    far = push(2000, 24.0, 25.0, 3, epoch=2, step=6, lr=0.25)
    assert found(*GOOD, far, refusal(1, 26.0, 27.0, 409, "too-old")) == set()
