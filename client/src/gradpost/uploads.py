"""Uploads that are taken once, though their answers may be lost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gradpost.answers import Version
from gradpost.calls import Calls, members, path_of
from gradpost.errors import PreconditionFailed
from gradpost.pending import Tries
from gradpost.protocol import SAFETENSORS
from gradpost.protocol.versions import epoch_tag
from gradpost.standing import Standing
from gradpost.transport import Answer, Part


class Base(NamedTuple):
    """The version that an upload found, and what it makes of it."""

    epoch: int
    version: int

    @property
    def condition(self) -> Mapping[str, str]:
        """Holds as long as nobody has uploaded since.

        It names the epoch only. Every upload raises that, while steps leave it alone: a condition
        on the version would fail for each step of another worker, and an upload that takes longer
        than a step would never come through.
        """
        if self.version == 0:
            return {"If-None-Match": "*"}
        return {"If-Match": epoch_tag(self.epoch)}

    @property
    def result(self) -> Version:
        """What an upload onto it results in: a first one does not begin an epoch."""
        return self.epoch + (self.version > 0), 1


class Upload:
    """The attempts of one upload, for `Retrier.run`: whatever is there is replaced, once.

    Each attempt carries the condition of what was found first, so at most one of them is taken. If
    that is refused before any answer was lost, another upload was faster: look again, go on. If it
    is refused after one was lost, either the lost attempt was taken or another upload: the epoch
    tells. Where exactly one upload was taken it counts as ours (another one, in the moment between
    the look and the lost attempt, can't be told from it).

    Args:
        look: Asks where the session is; one attempt.
        put: Uploads under a condition, returns the version that results; one attempt.
    """

    def __init__(
        self,
        look: Callable[[float], Base],
        put: Callable[[Mapping[str, str], float], Version],
    ) -> None:
        self._look = look
        self._put = put
        self._base: Base | None = None
        self._refused: PreconditionFailed | None = None
        self._tries = Tries(self._send)

    def __call__(self, timeout_s: float) -> Version:
        """One attempt; returns the version that the upload resulted in.

        Raises:
            PreconditionFailed: An answer was lost and others uploaded since; or, retryable, another
                upload came first.
        """
        if self._base is None:
            self._base = self._look(timeout_s)
        if self._refused is None:
            try:
                return self._tries(timeout_s)
            except PreconditionFailed as error:
                if not self._tries.open:
                    self._base = None
                    error.retryable = True
                    raise
                self._refused = error
        if self._look(timeout_s).epoch != self._base.result[0]:
            self._refused.add_note(
                "The answer to an earlier attempt was lost. There were more uploads since, so that "
                "it can't be told whether this one was among them; pull to see what is there."
            )
            raise self._refused
        return self._base.result

    def _send(self, timeout_s: float) -> Version:
        assert self._base is not None
        return self._put(self._base.condition, timeout_s)


class Uploads:
    """The uploads of one session object.

    Args:
        id: Of the session.
        standing: Where the trainer stands.
        calls: To the server.
        run: Runs attempts while the session object is open.
    """

    def __init__(self, id: str, standing: Standing, calls: Calls, run: Callable[..., Any]) -> None:
        self._id = id
        self._standing = standing
        self._calls = calls
        self._run = run

    def replace(
        self,
        what: str,
        body: Sequence[Part],
        *,
        first_only: bool = False,
        method: str = "PUT",
        kind: str = SAFETENSORS,
        query: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Uploads parameters or state, once, and takes the version that results."""
        seen: list[str | None] = [None]

        def read(answer: Answer) -> Version:
            found = members(answer, ("epoch", "version"))
            seen.append(found.get("incarnation"))
            return int(found["epoch"]), int(found["version"])

        def look(timeout: float) -> Base:
            return Base(*self._calls.send("GET", path_of(self._id), read, timeout))

        def put(condition: Mapping[str, str], timeout: float) -> Version:
            headers = {"Content-Type": kind, **condition}
            path = path_of(self._id, what, query=query)
            return self._calls.send(method, path, read, timeout, headers=headers, body=body)

        if first_only:
            version: Version = self._run(lambda timeout: put({"If-None-Match": "*"}, timeout))
        else:
            version = self._run(Upload(look, put))
        self._standing.uploaded(version, seen[-1])
