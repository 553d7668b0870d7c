"""Stretches of layout neighbours that have been updated alike: one kernel run each."""

from collections.abc import Sequence
from typing import NamedTuple

from service.sessions.layout import Entry, Span


class Run(NamedTuple):
    """The entries first to last (exclusive), elements lo to hi of the flat vector.

    All of them have had `updates` updates, and have the same `scalars` of their rule.
    """

    first: int
    last: int
    lo: int
    hi: int
    updates: int = 0
    scalars: tuple[float, ...] = ()


def whole(span: Span) -> tuple[Run, ...]:
    """The one run of a group that was never updated; none if it has no tensors."""
    return (Run(*span),) if span.last > span.first else ()


def cut(
    runs: Sequence[Run], present: Sequence[bool], entries: Sequence[Entry]
) -> list[tuple[Run, bool]]:
    """The runs, cut wherever tensors that came and tensors that did not are neighbours.

    Args:
        runs: Of one group.
        present: For each entry of the layout, whether its gradient came.
        entries: Of the layout.

    Returns:
        Each piece, and whether its gradients came.
    """
    pieces = []
    for run in runs:
        first = run.first
        for at in range(run.first + 1, run.last + 1):
            if at == run.last or present[at] != present[first]:
                pieces.append((_part(run, first, at, entries), present[first]))
                first = at
    return pieces


def without(runs: Sequence[Run], taken: Sequence[Run], entries: Sequence[Entry]) -> list[Run]:
    """What is left of runs, in order, where others were taken out of them.

    Args:
        runs: Of one group.
        taken: In order; each lies inside one of the runs.
        entries: Of the layout.
    """
    if len(runs) == len(taken):  # nearly always: each was taken whole
        if all(run[:2] == one[:2] for run, one in zip(runs, taken, strict=True)):
            return []
    rest = []
    queue = list(reversed(taken))
    for run in runs:
        first = run.first
        while queue and queue[-1].first < run.last:
            one = queue.pop()
            if one.first > first:
                rest.append(_part(run, first, one.first, entries))
            first = one.last
        if first < run.last:
            rest.append(_part(run, first, run.last, entries))
    return rest


def singles(run: Run, entries: Sequence[Entry]) -> list[Run]:
    """Each tensor of a run as a run of its own."""
    return [_part(run, at, at + 1, entries) for at in range(run.first, run.last)]


def _part(run: Run, first: int, last: int, entries: Sequence[Entry]) -> Run:
    end = entries[last - 1]
    return run._replace(first=first, last=last, lo=entries[first].offset, hi=end.offset + end.size)


def joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs, those joined that are neighbours and have been updated alike."""
    if len(runs) == 1:
        return (runs[0],)
    found: list[Run] = []
    for run in runs:
        if found and found[-1].last == run.first and found[-1][4:] == run[4:]:
            found[-1] = found[-1]._replace(last=run.last, hi=run.hi)
        else:
            found.append(run)
    return tuple(found)


def of(
    span: Span,
    entries: Sequence[Entry],
    updates: Sequence[int],
    scalars: Sequence[tuple[float, ...]],
) -> tuple[Run, ...]:
    """The runs of a group whose tensors have these updates and scalars, one of each per entry."""
    return joined(
        [
            one._replace(updates=updates[one.first], scalars=scalars[one.first])
            for one in singles(Run(*span), entries)
        ]
    )
