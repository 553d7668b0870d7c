"""A promise that was not kept."""

from typing import NamedTuple

LOST, DOUBLED, BITS = "lost", "doubled", "wrong bits"


class Violation(NamedTuple):
    """What was found, by which check, and when it was seen."""

    column: str
    check: str
    session: str
    at: float
    text: str

    def __str__(self):
        return f"{self.check}: session {self.session}: {self.text}"
