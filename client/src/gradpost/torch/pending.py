"""A step under way."""

from concurrent.futures import Future
from typing import Any

from gradpost.answers import Params
from gradpost.summary import Summary


class Pending:
    """What `step(blocking=False)` returns.

    The parameters change only when `synchronize` or the next step writes them.

    Attributes:
        loss: What the closure returned; None without one.
    """

    def __init__(self, future: "Future[tuple[Summary, Params]] | None", loss: Any) -> None:
        self.future = future
        self.loss = loss

    def done(self) -> bool:
        """Whether the server has answered, or nothing was sent."""
        return self.future is None or self.future.done()

    def result(self, timeout: float | None = None) -> Summary | None:
        """What the push did; None if there was nothing to push.

        Args:
            timeout: Seconds to wait; None: as long as the session's deadline lasts.

        Raises:
            TimeoutError: No answer in that time.
            GradpostError: As `Session.push`.
        """
        return None if self.future is None else self.future.result(timeout)[0]
