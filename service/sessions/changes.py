"""Which tensors the last updates of a session changed: what a pull with `since` leaves out."""

from collections.abc import Iterable
from typing import NamedTuple

KEPT = 64
"""Versions that are remembered."""


class Change(NamedTuple):
    """What one version changed; `spans` are layout entries, from the first to before the last."""

    epoch: int
    version: int
    spans: tuple[tuple[int, int], ...]


class Changes:
    """The last `KEPT` versions of an epoch, without a gap.

    `note` is called by whoever publishes a version, in the lane; anyone may ask at any time. Where
    a version was published without a note, or in another epoch, history begins anew: then a pull
    gets everything, which is never wrong.
    """

    def __init__(self) -> None:
        self._last: tuple[Change, ...] = ()  # replaced whole, so that no reader sees half of it

    def note(self, epoch: int, version: int, spans: Iterable[tuple[int, int]]) -> None:
        """Remembers what a version changed.

        Args:
            epoch: Of the version.
            version: Its number.
            spans: Layout entries [first, last), ascending. (Of a tensor that is taken lazily only
                some rows have changed; an answer could hold those alone. So far it holds all.)
        """
        last = self._last
        if last and (last[-1].epoch, last[-1].version + 1) != (epoch, version):
            last = ()
        self._last = (*last[1 - KEPT :], Change(epoch, version, _merged(spans)))

    def since(self, base: tuple[int, int], now: tuple[int, int]) -> frozenset[int] | None:
        """The layout entries that differ between two versions (epoch, version).

        Returns:
            None: that can't be told any more, or not from here.
        """
        if base == now:
            return frozenset()
        if base[0] != now[0] or base > now:
            return None
        between = [change for change in self._last if base < (change.epoch, change.version) <= now]
        if len(between) != now[1] - base[1]:  # they have no gap: so many are all of them
            return None
        return frozenset(
            entry
            for change in between
            for first, last in change.spans
            for entry in range(first, last)
        )


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for first, last in spans:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return tuple(found)
