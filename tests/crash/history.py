"""What was asked, what was answered and when: the history of a run.

Every summary says at which (epoch, version) its push was applied, so no search for an order is
needed: the server has told it. All times are of one monotonic clock, and the history goes on over
all crashes. What must hold in it: `promises.py`.
"""

import math
from typing import NamedTuple

NEVER = math.inf


class Push(NamedTuple):
    """One attempt of a push. `status` is None where there was no answer.

    `whole` is False where the connection was cut inside of the body.
    """

    session: str
    incarnation: str
    worker: str
    sequence: int
    base: tuple
    invoked: float
    returned: float
    whole: bool = True
    status: int | None = None
    slug: str = ""
    summary: dict | None = None

    @property
    def key(self):
        return self.worker, self.sequence


class Pull(NamedTuple):
    """What a reader saw: parameters, state, or only the numbers."""

    session: str
    incarnation: str
    invoked: float
    returned: float
    epoch: int
    version: int
    step: int | None = None
    what: str = "look"
    digest: str | None = None
    lr: float | None = None

    @property
    def place(self):
        return self.epoch, self.version


class Patch(NamedTuple):
    """One attempt to set the learning rate."""

    session: str
    incarnation: str
    invoked: float
    returned: float
    lr: float
    status: int | None = None


class Round(NamedTuple):
    """What the server says of a round; `status` is "unknown" where it knows none of this number.

    `place` and `step` are those of the session after it. `members` are (worker, sequence, weight),
    None where the server has forgotten them.
    """

    session: str
    incarnation: str
    invoked: float
    returned: float
    number: int
    status: str
    reason: str | None = None
    base: tuple = (0, 0)
    place: tuple = (0, 0)
    step: int = 0
    contributions: int = 0
    passes: int = 0
    members: tuple | None = None
    summary: dict | None = None


class Left(NamedTuple):
    """A worker is about to leave, for good."""

    session: str
    incarnation: str
    invoked: float
    worker: str


class Upload(NamedTuple):
    """An upload of parameters until it was settled; `taken` is the epoch that it began, if any."""

    session: str
    incarnation: str
    invoked: float
    returned: float
    condition: tuple
    mark: int
    taken: int | None


class Life(NamedTuple):
    """A creation or deletion until it was settled."""

    session: str
    incarnation: str
    invoked: float
    returned: float
    created: bool
    epoch: int = 0
    mark: int = 0


class Gone(NamedTuple):
    """An answer that said that there is no such session (any more)."""

    session: str
    invoked: float
    returned: float
    slug: str = "session-gone"


class Standing(NamedTuple):
    """What the server says of a worker."""

    session: str
    incarnation: str
    invoked: float
    returned: float
    worker: str
    highest: int | None
    ranges: tuple
    last: dict | None


class Kill(NamedTuple):
    """A server ended."""

    at: float
    point: str


class Fate:
    """All attempts of one key.

    Attributes:
        sent: When its first whole attempt began.
        acked: When the first answer was there by which its number is used: it was applied, or has
            joined a round.
        told: When the first answer was there that said what it did.
        answers: Those.
        joined: Answers that said only in which round it is, or was.
    """

    def __init__(self, key):
        self.key = key
        self.sent = NEVER
        self.acked = NEVER
        self.told = NEVER
        self.answers = []
        self.joined = []
        self.unknown = 0
        self.attempts = []
        self.ended = False

    def add(self, push):
        self.attempts.append(push)
        if push.whole:
            self.sent = min(self.sent, push.invoked)
            self.unknown += unsettled(push.status)
        if push.status == 200:
            self.acked = min(self.acked, push.returned)
            self.told = min(self.told, push.returned)
            self.answers.append(push)
        elif push.status == 202 or push.slug == "round-abandoned":
            self.acked = min(self.acked, push.returned)
            self.joined.append(push)

    @property
    def summary(self):
        return self.answers[0].summary if self.answers else None

    @property
    def place(self):
        return place_of(self.summary)

    @property
    def open(self):
        """Whether nobody knows if it was applied."""
        if self.answers or self.joined or not self.unknown:
            return False
        # Replays come before all refusals, so after an epoch-changed no earlier attempt counts;
        # but the next incarnation, which knows nothing, says the same.
        return self.ended or not any(p.slug == "epoch-changed" for p in self.attempts)

    @property
    def story(self):
        """What became of each attempt, for people."""
        return ", ".join(
            "cut" if not one.whole else "no answer" if one.status is None
            else f"{one.status} {one.slug}".strip()
            for one in self.attempts
        )  # fmt: skip

    @property
    def never(self):
        """Whether it is known that it was not applied."""
        return not self.answers and not self.joined and not self.open

    @property
    def round(self):
        """The round that it was told to be in; None: of none."""
        told = [one.summary.get("round") for one in (*self.answers, *self.joined)]
        return told[0] if told else None


def unsettled(status):
    """Whether an answer (None: there was none) leaves open what became of the request."""
    return status is None or status >= 500


def passing(push):
    """Whether an answer says no more than to ask again."""
    return push.status in (408, 429, 500, 503) or push.slug == "in-flight"


def place_of(summary):
    return summary["epoch"], summary["version"]


def bare(summary):
    """A summary as it is in every answer to one key."""
    if summary is None:
        return None
    own = ("replayed", "ahead", "wire")
    return {name: value for name, value in summary.items() if name not in own}


class History:
    """Grows while the run goes on; appending is all that the workers do."""

    def __init__(self):
        self.events = []

    def begin(self, attempt):
        """Takes note of a push that is about to be sent, for who may not live to see its answer."""

    def add(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if type(event) is kind]


class View(NamedTuple):
    """One incarnation of a session."""

    session: str
    incarnation: str
    fates: dict
    pulls: list
    patches: list
    uploads: list
    standings: list
    life: Life | None
    rounds: list
    left: dict
    ended: bool = False

    @property
    def in_rounds(self):
        """Whether its pushes join rounds."""
        return bool(self.rounds) or any(fate.round is not None for fate in self.fates.values())

    @property
    def applied(self):
        """Fates that have a place, in its order."""
        return sorted((f for f in self.fates.values() if f.answers), key=lambda f: f.place)


def views(history):
    """The history by incarnation."""
    found = {}

    def view(event):
        name = event.session, event.incarnation
        if name not in found:
            found[name] = View(*name, {}, [], [], [], [], None, [], {})
        return found[name]

    for event in history.events:
        match event:
            case Push():
                fates = view(event).fates
                if event.key not in fates:
                    fates[event.key] = Fate(event.key)
                fates[event.key].add(event)
            case Pull():
                view(event).pulls.append(event)
            case Patch():
                view(event).patches.append(event)
            case Upload():
                view(event).uploads.append(event)
            case Standing():
                view(event).standings.append(event)
            case Round():
                view(event).rounds.append(event)
            case Left():
                view(event).left.setdefault(event.worker, event)
            case Life(created=True):
                found[event.session, event.incarnation] = view(event)._replace(life=event)
            case Life(created=False):
                found[event.session, event.incarnation] = view(event)._replace(ended=True)
    for ended in found.values():
        for fate in ended.fates.values():
            fate.ended = ended.ended
    return list(found.values())
