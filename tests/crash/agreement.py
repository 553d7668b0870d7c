"""What must hold of rounds in a history, whatever was killed.

1. `fates`: a contribution that was acknowledged (202, or 200) stays in its one round, whose end is
   applied, skipped or abandoned, and no later answer to its key says otherwise.
2. `sightings`: a round only grows while it is open, ends once, and is the same ever after.
3. `numbers`: rounds are 1..n, each that was applied is one version and one step, and no other is.
4. `members`: a round has those who were told so and nobody else, each once; who was refused is in
   none.
5. `looks`: no reader sees another number of steps at a version than the rounds up to it have.

That parameters are those of exactly the members of each round, in their order: `reference.py`.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from tests.crash.history import NEVER, bare, passing, place_of
from tests.crash.violation import DOUBLED, LOST, Violation

KEPT = 64
"""Closed rounds that are known after a restart."""
END = ("status", "reason", "base", "place", "step", "contributions", "passes")


class Over(NamedTuple):
    """A round that is over, by all that is known of it.

    Attributes:
        number: From 1.
        at: When it was first told.
        status: applied, skipped or abandoned.
        place: Epoch and version after it; None if nobody was told.
        step: Steps after it; likewise.
        summary: What it did.
        keys: Of all whom an answer told that they are in it.
        sighting: What the server says of it; None if nobody asked in time.
        members: In order, with weights; None likewise.
    """

    number: int
    at: float
    status: str
    place: tuple | None
    step: int | None
    summary: dict | None
    keys: frozenset
    sighting: object
    members: tuple | None


def check(view):
    """All violations of a view whose pushes join rounds."""
    found = []
    for one in (fates, sightings, numbers, members, looks):
        found += one(view)
    return found


def _teller(view, check, found):
    def wrong(column, at, text):
        found.append(Violation(column, check, view.session, at, text))

    return wrong


def shared(summary):
    """A summary as it is in every answer about one round: the wire is each contribution's own."""
    found = bare(summary)
    return found and {name: value for name, value in found.items() if name != "wire"}


def over(view):
    """The rounds that are over, in order."""
    told, seen = defaultdict(list), defaultdict(list)
    for fate in view.fates.values():
        if fate.round is not None:
            told[fate.round].append(fate)
    for one in view.rounds:
        if one.status not in ("open", "unknown"):
            seen[one.number].append(one)
    found = [_over(number, told[number], seen[number]) for number in sorted({*told, *seen})]
    return [one for one in found if one is not None]


def _over(number, told, seen):
    keys = frozenset(fate.key for fate in told)
    answers = [answer for fate in told for answer in fate.answers]
    ended = [one for fate in told for one in fate.joined if one.status != 202]
    at = min((one.returned for one in (*seen, *answers, *ended)), default=None)
    if at is None:
        return None
    sighting = seen[0] if seen else None
    members = next((one.members for one in seen if one.members is not None), None)
    if sighting is not None:
        return Over(
            number, at, sighting.status, sighting.place, sighting.step, sighting.summary, keys,
            sighting, members,
        )  # fmt: skip
    if not answers:
        return Over(number, at, "abandoned", None, None, None, keys, None, None)
    summary = answers[0].summary
    status = "applied" if summary["applied"] else "skipped"
    place = place_of(summary)
    return Over(number, at, status, place, summary["step"], summary, keys, None, None)


def fates(view):
    """1: a contribution stays where it is."""
    found = []
    wrong = _teller(view, "fates", found)
    for fate in view.fates.values():
        told = [*fate.answers, *fate.joined]
        rounds = {one.summary["round"] for one in told}
        if len(rounds) > 1:
            wrong(DOUBLED, max(o.returned for o in told), f"{fate.key} is in {rounds}")
        fresh = [one for one in told if one.status < 300 and not one.summary["replayed"]]
        if len(fresh) > 1:
            wrong(DOUBLED, fresh[1].returned, f"{fate.key} was taken {len(fresh)} times")
        for answer in fate.answers[1:]:
            if bare(answer.summary) != bare(fate.summary):
                text = f"{fate.key} was {fate.summary}, then {answer.summary}"
                wrong(DOUBLED, answer.returned, text)
        found += _ends(view, fate)
    return found


def _ends(view, fate):
    """Whether a contribution has one end, after which there is no other answer."""
    found = []
    wrong = _teller(view, "fates", found)
    given_up = [one for one in fate.joined if one.status != 202]
    over = min((one.returned for one in (*fate.answers, *given_up)), default=NEVER)
    if fate.answers and given_up:
        at = max(fate.told, given_up[0].returned)
        wrong(LOST, at, f"{fate.key} was given up and counted: {fate.story}")
    if len({one.summary["reason"] for one in given_up}) > 1:
        wrong(LOST, given_up[-1].returned, f"{fate.key} was given up for two reasons")
    for late in fate.attempts:
        if late.status == 202 and late.invoked > over:
            wrong(LOST, late.returned, f"{fate.key} was over, and its round is open")
        settles = late.status not in (None, 200, 202) and not passing(late)
        gone = late.slug == "worker-retired" and fate.key[0] in view.left
        if settles and late.invoked > fate.acked and late.slug != "round-abandoned" and not gone:
            wrong(LOST, late.returned, f"{fate.key} was acknowledged, then {late.slug}")
        if late.slug == "already-contributed":
            other = view.fates.get((fate.key[0], late.summary["sequence"]))
            if other is None or other.never or other.key == fate.key:
                text = f"{fate.key} was refused for {late.summary['sequence']}, which is in nothing"
                wrong(DOUBLED, late.returned, text)
    return found


def sightings(view):
    """2: a round grows, ends, and stays as it is."""
    found = []
    wrong = _teller(view, "sightings", found)
    by_number = defaultdict(list)
    for one in sorted(view.rounds, key=lambda one: one.returned):
        by_number[one.number].append(one)
    for number, seen in by_number.items():
        ends = [one for one in seen if one.status not in ("open", "unknown")]
        for one in ends[1:]:
            differs = [name for name in END if getattr(one, name) != getattr(ends[0], name)]
            if differs or shared(one.summary) != shared(ends[0].summary):
                text = f"round {number} has another {', '.join(differs) or 'summary'} than before"
                wrong(DOUBLED, one.returned, text)
        for one in seen:
            if ends and one.status == "open" and one.invoked > ends[0].returned:
                wrong(LOST, one.returned, f"round {number} was over and is open")
            if one.status == "unknown" and _should_know(view, one):
                wrong(LOST, one.returned, f"round {number} is not known")
        found += _growth(view, number, [one for one in seen if one.members is not None])
    return found


def _should_know(view, unknown):
    """Whether a round was told of, and not so long ago that it may be forgotten."""
    told = [
        one.number
        for one in view.rounds
        if one.returned < unknown.invoked and one.status not in ("open", "unknown")
    ]
    told += [fate.round for fate in view.fates.values()
             if fate.round is not None and fate.acked < unknown.invoked]  # fmt: skip
    begun = [one.number for one in view.rounds if one.invoked < unknown.returned]
    begun += [fate.round for fate in view.fates.values()
              if fate.round is not None and fate.sent < unknown.returned]  # fmt: skip
    return unknown.number in told and unknown.number > max(begun) - KEPT


def _growth(view, number, seen):
    """Whoever was seen in a round is in it later, at the same place."""
    found = []
    most = None
    for one in seen:
        if most is not None and most.returned < one.invoked:
            same = one.members[: len(most.members)] == most.members
            ended = most.status != "open" and len(one.members) != len(most.members)
            if not same or ended:
                text = f"round {number} had {most.members} and has {one.members}"
                found.append(Violation(LOST, "sightings", view.session, one.returned, text))
        if most is None or len(one.members) >= len(most.members):
            most = one
    return found


def numbers(view):
    """3: rounds without holes, each one step and one version, or none."""
    found = []
    wrong = _teller(view, "numbers", found)
    rounds = over(view)
    last = max((one.number for one in rounds), default=0)
    holes = sorted(set(range(1, last + 1)) - {one.number for one in rounds})
    unsure = sum(fate.open for fate in view.fates.values())
    if len(holes) > unsure:
        at = next(one.at for one in rounds if one.number > holes[0])
        wrong(LOST, at, f"rounds {holes} are nobody's, {unsure} pushes are unsettled")
    place, step = (view.life.epoch if view.life else 1, 1), 0
    for one in rounds:
        if one.place is None:
            continue
        begins = (one.place[0], 1) if one.place[0] > place[0] else place
        applied = one.status == "applied"
        expected = begins[0], begins[1] + applied
        if one.place != expected and not holes:
            column = DOUBLED if one.place > expected else LOST
            text = f"round {one.number} ({one.status}) is at {one.place}, behind {place}"
            wrong(column, one.at, text)
        if one.step != step + applied and not holes:
            column = DOUBLED if one.step > step + applied else LOST
            wrong(column, one.at, f"round {one.number} is at step {one.step}, behind {step}")
        if one.sighting is not None and applied and one.sighting.base[1] + 1 != one.place[1]:
            text = f"round {one.number} is of {one.sighting.base} and led to {one.place}"
            wrong(LOST, one.at, text)
        place, step = one.place, one.step
    return found


def members(view):
    """4: a round has those who were told that they are in it."""
    found = []
    wrong = _teller(view, "members", found)
    where = Counter()
    for one in over(view):
        for key in one.keys:
            found += _agrees(view, one, view.fates[key])
        if one.members is None:
            continue
        has = [key[:2] for key in one.members]
        where.update(set(has))
        if len({worker for worker, _ in has}) != len(has):
            wrong(DOUBLED, one.at, f"round {one.number} has a worker twice: {has}")
        if missing := one.keys - set(has):
            wrong(LOST, one.at, f"round {one.number} lacks {missing}")
        for key in has:
            fate = view.fates.get(key)
            if fate is None or fate.sent == NEVER:
                wrong(DOUBLED, one.at, f"round {one.number} has {key}, never sent")
            elif fate.never:
                text = f"round {one.number} has {key}, after: {fate.story}"
                wrong(DOUBLED, one.at, text)
            elif fate.round not in (None, one.number):
                text = f"round {one.number} has {key}, which is in {fate.round}"
                wrong(DOUBLED, one.at, text)
        counted = sum(weight > 0 for *_, weight in one.members)
        if (counted, len(has) - counted) != (one.sighting.contributions, one.sighting.passes):
            wrong(DOUBLED, one.at, f"round {one.number} counts otherwise than it has")
    for key, times in where.items():
        if times > 1:
            at = max(one.at for one in over(view) if key in [m[:2] for m in one.members or ()])
            wrong(DOUBLED, at, f"{key} is in {times} rounds")
    return found + _counts(view)


def _counts(view):
    """Rounds whose members are forgotten have as many as were told so."""
    found = []
    unsure = sum(fate.open for fate in view.fates.values())
    for one in over(view):
        if one.members is not None or one.sighting is None:
            continue
        total = one.sighting.contributions + one.sighting.passes
        if not len(one.keys) <= total <= len(one.keys) + unsure:
            column = DOUBLED if total > len(one.keys) else LOST
            text = f"round {one.number} had {total} contributions, and {len(one.keys)} were told so"
            found.append(Violation(column, "members", view.session, one.at, text))
    return found


def _agrees(view, one, fate):
    """Whether the fate of a contribution is that of its round."""
    found = []
    wrong = _teller(view, "members", found)
    given_up = any(late.status != 202 for late in fate.joined)
    if fate.answers and one.status == "abandoned":
        wrong(LOST, fate.told, f"{fate.key} counted, and round {one.number} was given up")
    if given_up and one.status != "abandoned":
        text = f"{fate.key} was given up, and round {one.number} was {one.status}"
        wrong(LOST, one.at, text)
    if fate.answers and one.summary is not None and shared(fate.summary) != shared(one.summary):
        text = f"{fate.key} was told {fate.summary}, and round {one.number} was {one.summary}"
        wrong(DOUBLED, fate.told, text)
    return found


def looks(view):
    """5: steps and versions of readers are those of the rounds."""
    found = []
    wrong = _teller(view, "looks", found)
    rounds = over(view)
    steps = {one.place: one.step for one in rounds if one.status == "applied"}
    unsure = any(fate.open for fate in view.fates.values())
    for pull in view.pulls:
        if pull.place[1] == 1:
            before = [step for place, step in steps.items() if place < pull.place]
            expected = max(before, default=0)
        else:
            expected = steps.get(pull.place)
        if expected is None and not unsure:
            text = f"a pull shows {pull.place}, which no round led to"
            wrong(DOUBLED, pull.returned, text)
        elif None not in (expected, pull.step) and pull.step != expected:
            column = DOUBLED if pull.step > expected else LOST
            text = f"a pull shows {pull.step} steps at {pull.place}, which is step {expected}"
            wrong(column, pull.returned, text)
    return found
