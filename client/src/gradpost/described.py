"""What a session says of itself, and what a word changes."""

from typing import Any

from gradpost.answers import Version
from gradpost.calls import path_of
from gradpost.connected import Connected
from gradpost.errors import SessionGone
from gradpost.retry import RetryPolicy
from gradpost.standing import Standing
from gradpost.transport import Transport


class Described(Connected):
    """The documents of a session.

    Attributes:
        id: The session's id on the server.
    """

    def __init__(
        self,
        transport: Transport,
        id: str,
        worker: str,
        api_key: str | None,
        policy: RetryPolicy | None,
        seed: int | None,
        *,
        close_transport: bool,
    ) -> None:
        super().__init__(
            transport, id, worker, api_key, policy, seed, close_transport=close_transport
        )
        self.id = id
        self._standing = Standing(worker)

    @property
    def worker(self) -> str:
        """This trainer's id, new for each incarnation."""
        return self._standing.worker

    @worker.setter
    def worker(self, worker: str) -> None:
        self._standing.worker = worker

    @property
    def mode(self) -> str:
        """The update mode: async, sync or bounded."""
        return self._standing.mode

    @property
    def takes(self) -> str:
        """What a push carries: a "gradient", or the "delta" of a trainer's local steps."""
        return self._standing.takes

    @property
    def dtype(self) -> str:
        """Of parameters and state on the server, F32 or F64."""
        return self._standing.master

    @property
    def incarnation(self) -> str | None:
        """Of the session that the parameters are of: another one began anew under its id."""
        return self._standing.incarnation

    def count_from(self, version: Version, incarnation: str | None) -> None:
        """Gradients count as computed from these parameters, which an earlier process pulled."""
        self._standing.uploaded(version, incarnation)

    def info(self) -> dict[str, Any]:
        """Everything the server says of the session."""
        found = self._document("GET", path_of(self.id), needs=("dtype",))
        self._standing.describe(found)
        return found

    def patch(self, **changes: Any) -> dict[str, Any]:
        """Changes hyperparameters from the next update on: `patch(optimizer={"lr": 1e-4})`."""
        return self._document("PATCH", path_of(self.id), changes)

    def history(self, *, limit: int = 1000, after_step: int = 0) -> list[dict[str, Any]]:
        """The last steps, the oldest first."""
        query = [("limit", str(limit)), ("after_step", str(after_step))]
        path = path_of(self.id, "history", query=query)
        return list(self._document("GET", path, needs=("steps",))["steps"])

    def schedule(self, steps: int = 100) -> dict[str, list[float]]:
        """The learning rates of the next updates, by group, as the server's schedule has them."""
        path = path_of(self.id, "schedule", query=[("steps", str(steps))])
        found = self._document("GET", path, needs=("lr",))["lr"]
        return {str(name): [float(rate) for rate in rates] for name, rates in found.items()}

    def round(self, number: int) -> dict[str, Any]:
        """What became of a round of a synchronous session, or how far it is.

        Raises:
            RoundUnknown: It has not begun, or it was closed too long ago.
        """
        return self._document("GET", path_of(self.id, "rounds", str(number)), needs=("status",))

    def workers(self) -> list[dict[str, Any]]:
        """The session's workers: who is live, and how far behind each of them is."""
        path = path_of(self.id, "workers")
        return list(self._document("GET", path, needs=("workers",))["workers"])

    def delete(self) -> None:
        """Ends the session on the server, for every worker."""
        try:
            self._document("DELETE", path_of(self.id))
        except SessionGone:  # the answer to an earlier attempt was lost, or another worker's delete
            return
