"""What many kills came to, as a table for docs/reliability.md."""

from collections import Counter, defaultdict

from tests.crash.campaign import RANDOM
from tests.crash.violation import BITS, DOUBLED, LOST

BEGIN, END = "<!-- crash table -->", "<!-- /crash table -->"
MOMENTS = ("before", "torn", "half", "after")
COLUMNS = (LOST, DOUBLED, BITS)


class Table:
    """Counts kills and what was found after each, by place; its moments share a row."""

    def __init__(self):
        self._kills = Counter()
        self._moments = defaultdict(set)
        self._found = {column: Counter() for column in COLUMNS}

    def add(self, report):
        """Takes the kills of a campaign, and each violation to the kill before it."""
        for kill in report.kills:
            place, moment = _split(kill.point)
            self._kills[place] += 1
            self._moments[place].add(moment)
        for violation in report.violations:
            before = [kill for kill in report.kills if kill.at <= violation.at]
            place, _ = _split(max(before).point if before else RANDOM)
            self._found[violation.column][place] += 1

    @property
    def kills(self):
        """How many there were."""
        return self._kills.total()

    def __str__(self):
        rows = [_row("point", "kills", *COLUMNS), _row("---", *["--:"] * 4)]
        for place in sorted(self._kills | sum(self._found.values(), Counter()), key=_order):
            moments = [moment for moment in MOMENTS if moment in self._moments[place]]
            name = " ".join([f"`{place}`", ", ".join(moments)]).strip()
            found = (self._found[column][place] for column in COLUMNS)
            rows.append(_row(name, self._kills[place], *found))
        totals = (self._found[column].total() for column in COLUMNS)
        rows.append(_row("all", self.kills, *totals))
        return "\n".join(rows)


def _split(point):
    place, _, moment = point.rpartition(".")
    return (place, moment) if moment in MOMENTS else (point, "")


def _row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def _order(place):
    phase, _, rest = place.rpartition(":")
    return ["start", "run", "stop", ""].index(phase), rest


def replaced(text, table):
    """A page with another table between its two marks.

    Raises:
        ValueError: It has not both marks, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs one {BEGIN} and one {END} behind it")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
