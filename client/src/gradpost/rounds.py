"""Rounds of a synchronous session, as one of its workers waits for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradpost.answers import Version
from gradpost.calls import Calls, path_of
from gradpost.errors import DeadlineExceeded, RefusedError, refusal
from gradpost.protocol import PROBLEM_PREFIX
from gradpost.protocol.versions import parse_version
from gradpost.retry import Retrier
from gradpost.summary import Summary

_MARGIN_S = 1.0
"""Of a long poll, what is left for its answer to come."""
_OVER_S = 0.05
"""What is too short to ask again."""


@dataclass(frozen=True)
class Contribution:
    """A push that was received, and that counts when its round is closed.

    Attributes:
        round: The round's number; None if the session has none, and so the push was applied.
        contributions: Gradients that the round had then.
        passes: Workers that sent none.
        missing: Of how many workers the round still waited then.
        worker: Who sent it.
        sequence: Its number.
        base_version: That it was computed from.
        summary: What it did, if the round was closed at once.
    """

    round: int | None
    contributions: int
    passes: int
    missing: int
    worker: str
    sequence: int
    base_version: Version
    summary: Summary | None = None

    @classmethod
    def of(
        cls, document: Mapping[str, Any], worker: str, sequence: int, base: Version
    ) -> "Contribution":
        """Reads the document of a 202."""
        return cls(
            int(document["round"]),
            int(document["contributions"]),
            int(document.get("passes", 0)),
            int(document["missing"]),
            worker,
            sequence,
            base,
        )

    def closed(self, summary: Summary) -> "Contribution":
        """The same, of a push that was answered by what it did."""
        return Contribution(
            summary.round,
            summary.contributions or 0,
            self.passes,
            0,
            self.worker,
            self.sequence,
            self.base_version,
            summary,
        )


def patience_s(timeout_s: float) -> float:
    """How long the server may wait in an attempt that has this timeout: its answer has to come."""
    return max(timeout_s - min(_MARGIN_S, timeout_s / 4), 0.0)


def preferring(wait_s: float) -> dict[str, str]:
    """The header that asks for it."""
    return {"Prefer": f"wait={wait_s:.3f}"}


class Rounds:
    """The rounds of one session.

    Args:
        id: Of the session.
        calls: To its server.
        retrier: The times.
        run: Runs attempts while the session object is open: `run(attempt, end=…)`.
    """

    def __init__(
        self, id: str, calls: Calls, retrier: Retrier, run: Callable[..., dict[str, Any]]
    ) -> None:
        self._id = id
        self._calls = calls
        self._retrier = retrier
        self._run = run

    def look(self, number: int, end: float, *, wait: bool = False) -> dict[str, Any]:
        """What the server says of a round, if asked so once it is closed or time is short.

        Raises:
            RoundUnknown: It has not begun, or it was closed too long ago.
        """
        path = path_of(self._id, "rounds", str(number))

        def attempt(timeout_s: float) -> dict[str, Any]:
            headers = preferring(patience_s(timeout_s)) if wait else {}
            needs = ("status", "members")
            return self._calls.document("GET", path, timeout_s, needs=needs, headers=headers)

        return self._run(attempt, end=end)

    def wait(self, mine: Contribution, end: float) -> Summary:
        """Waits until a round is closed.

        Args:
            mine: What was sent to it.
            end: When the time is used up.

        Raises:
            RoundAbandoned: It was, and the contribution with it.
            RoundUnknown: The server can't tell what became of it.
            DeadlineExceeded: It is still open.
        """
        if mine.summary is not None:
            return mine.summary
        assert mine.round is not None
        pauses = 0
        while True:
            asked = self._retrier.policy.clock()
            found = self.look(mine.round, end, wait=True)
            if found["status"] != "open":
                return _fate(found, mine)
            if self._retrier.policy.clock() - asked < _MARGIN_S:  # the server would not wait
                self._retrier.pause(pauses, end)
                pauses += 1
            if self._retrier.left_s(end) <= _OVER_S:
                raise DeadlineExceeded(
                    f"Round {mine.round} is still open; {found.get('missing')} workers are missing."
                )


def _fate(found: Mapping[str, Any], mine: Contribution) -> Summary:
    """What became of a contribution to a closed round."""
    ours = {"worker": mine.worker, "sequence": mine.sequence}
    members = found["members"]  # forgotten over a restart, which only what came in order survives
    same = _is(found.get("base_version"), mine.base_version) and (
        members is None or any(ours.items() <= one.items() for one in members)
    )
    summary = found.get("summary")
    where = {name: found.get(name) for name in ("epoch", "version", "step")}
    if same and found["status"] == "abandoned":
        reason = found.get("reason")
        raise _problem(
            409,
            "round-abandoned",
            f"Round {mine.round} was abandoned ({reason}), and push {mine.sequence} with it; "
            "pull and compute again.",
            {**where, **ours, "round": mine.round, "reason": reason},
        )
    if same and summary is not None:
        return Summary.of(summary)
    # A session that came back from a snapshot, or was made anew, numbers other rounds alike.
    raise _problem(
        404,
        "round-unknown",
        f"What became of push {mine.sequence} in round {mine.round} can't be told: the session "
        "has another round of this number now, or has forgotten it.",
        {**where, "round": mine.round},
    )


def _is(text: Any, version: Version) -> bool:
    try:
        return parse_version(text) == version
    except ValueError:
        return False


def _problem(status: int, slug: str, detail: str, members: Mapping[str, Any]) -> RefusedError:
    """A refusal that the document of a round amounts to."""
    document = {"type": PROBLEM_PREFIX + slug, "title": slug, "status": status, "detail": detail}
    return refusal(status, {**document, "retryable": False, **members})
