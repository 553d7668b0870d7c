"""Where a trainer stands in its session."""

import threading
from collections.abc import Mapping
from typing import Any

from gradpost.answers import Version
from gradpost.protocol import EPOCH, INCARNATION, VERSION

WAITING = ("sync", "bounded")
"""Modes in which the answer to a push waits for other workers."""


class Standing:
    """What a session object knows of its session; for several threads.

    Attributes:
        version: (epoch, version) that gradients count as computed from; None before the first.
        incarnation: Of the session that these parameters are of.
        master: The session's dtype, F32 or F64.
        mode: Its update mode.
        takes: What a push carries: "gradient" or "delta".
        worker: The trainer's id.
        lock: Of version, incarnation and the sequence numbers.

    Args:
        worker: As above.
    """

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.version: Version | None = None
        self.incarnation: str | None = None
        self.master = "F32"
        self.mode = "async"
        self.takes = "gradient"
        self.lock = threading.Lock()
        self._sequence = 0

    @property
    def waits(self) -> bool:
        """Whether the answer to a push waits for other workers."""
        return self.mode in WAITING

    def describe(self, found: Mapping[str, Any]) -> None:
        """Takes a description of the session."""
        self.master = str(found["dtype"])
        update = found.get("update")
        self.mode = str(update.get("mode", "async")) if isinstance(update, dict) else "async"
        self.takes = str(found.get("push", "gradient"))
        if self.incarnation is None:  # later only with parameters: a gradient is of those
            self.incarnation = found.get("incarnation")

    def pulled(self, said: Mapping[str, str]) -> None:
        """Takes the headers that came with parameters."""
        with self.lock:
            self.version = (int(said[EPOCH]), int(said[VERSION]))
            self.incarnation = said.get(INCARNATION, self.incarnation)

    def uploaded(self, version: Version, incarnation: str | None) -> None:
        """Takes the version that an upload resulted in."""
        with self.lock:
            self.version = version
            self.incarnation = incarnation or self.incarnation

    def following(self, base: Version | None) -> tuple[int, Version | None]:
        """A sequence number that was not used, and the base; none is used without a base."""
        with self.lock:
            base = base or self.version
            if base is not None:
                self._sequence += 1
            return self._sequence, base
