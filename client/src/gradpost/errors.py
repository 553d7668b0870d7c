"""What can go wrong, as one tree.

```
GradpostError            retryable: whether the same call is worth making again
│                        summary: of a push that was applied though the call failed afterwards
├── ClosedError          the session was closed
├── NotPulled            a gradient was pushed before any parameters were pulled
├── CertificateError     the server's TLS certificate is not trusted
├── TransportError       no (whole) answer came
├── DeadlineExceeded     retries used up the time; `kept` names the push that is kept
└── RefusedError         the server answered with a problem; one subclass per problem type
    └── MovedOn          of those: the model moved on without this gradient; pull, compute again
```
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from gradpost.protocol import PROBLEM_PREFIX, PROBLEMS
from gradpost.summary import Summary


class GradpostError(Exception):
    """Every failure of this package.

    Attributes:
        retryable: Whether the same call is worth making again.
        summary: Of a `push_pull` whose gradient was applied, when only the parameters after it did
            not come: pull, and do not push it again.
    """

    retryable: bool = False
    summary: Summary | None = None

    def of_applied(self, summary: Summary) -> None:
        """Notes that the call's gradient was applied before this failure."""
        self.summary = summary
        self.retryable = False
        self.add_note(f"The gradient was applied as step {summary.step}; only pull again.")


class ClosedError(GradpostError):
    """The session object was closed; attach again."""


class NotPulled(GradpostError):
    """A push has to say which parameters its gradient was computed from, and none were pulled."""


class CertificateError(GradpostError):
    """The server's TLS certificate is not trusted; no retry mends that."""


class TransportError(GradpostError):
    """The server could not be reached, or its answer broke off."""

    retryable = True


class DeadlineExceeded(GradpostError):
    """The retries used up their time; what they did is not known.

    A push that ends so is kept by its session and is not `retryable`: the same call would be
    another push of the same gradient. Other calls may be made again.

    Args:
        message: What was tried.
        last: The last failure.

    Attributes:
        kept: Sequence of the push that is kept until `Session.settle` or the session's next push
            learns what became of it; None for every other call.
    """

    retryable = True

    def __init__(self, message: str, last: GradpostError | None = None) -> None:
        super().__init__(message, last)
        self.last = last
        self.kept: int | None = None

    def keep(self, sequence: int) -> None:
        """Notes that the push of this sequence is kept."""
        self.kept = sequence
        self.retryable = False

    def __str__(self) -> str:
        text = str(self.args[0])
        if self.kept is None:
            return text
        return (
            f"{text} Push {self.kept} may have been applied, and its bytes are kept: settle() "
            "sends them again and tells; the next push does that first. Do not push this gradient "
            "again."
        )


_BEFORE_THE_SESSION = ("key-missing", "key-required", "key-wrong", "origin-refused")


class RefusedError(GradpostError):
    """The server refused: this attempt changed nothing (a 5xx apart).

    After an attempt whose answer was lost see `settles`.

    Args:
        status: HTTP status.
        problem: The problem document, RFC 9457.
        retry_after_s: What Retry-After asked for, in seconds.
    """

    slug: ClassVar[str] = ""

    def __init__(
        self, status: int, problem: Mapping[str, Any], retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, dict(problem), retry_after_s)  # the args are what pickle keeps
        self.status = status
        self.problem = dict(problem)
        self.retry_after_s = retry_after_s
        said = problem.get("retryable")
        by_status = status in (408, 429) or (status >= 500 and status != 507)
        self.retryable = said if isinstance(said, bool) else PROBLEMS.get(self.slug, by_status)

    @property
    def detail(self) -> str:
        """The sentence that says what to do."""
        return str(self.problem.get("detail") or self.problem.get("title") or "no detail given")

    @property
    def settles(self) -> bool:
        """Whether it ends a push, earlier attempts with the same bytes included.

        The server looks a push up among the admitted ones before it judges it, so its refusal says
        that no attempt was applied (`too-old` and `worker-retired`: that nobody can tell any more).
        Keys are checked earlier, and a proxy knows nothing: theirs is a word on one attempt only.
        """
        ours = PROBLEM_PREFIX in str(self.problem.get("type", ""))
        return ours and self.status < 500 and self.slug not in _BEFORE_THE_SESSION

    @property
    def step(self) -> int | None:
        """The session's step, where the problem states it."""
        return self._number("step")

    @property
    def epoch(self) -> int | None:
        """The session's epoch, where the problem states it."""
        return self._number("epoch")

    @property
    def version(self) -> int | None:
        """The session's version, where the problem states it."""
        return self._number("version")

    @property
    def round(self) -> int | None:
        """The number of a round, where the problem states one."""
        return self._number("round")

    def _number(self, name: str) -> int | None:
        value = self.problem.get(name)
        return value if isinstance(value, int) else None

    def _text(self, name: str) -> str | None:
        value = self.problem.get(name)
        return value if isinstance(value, str) else None

    def _float(self, name: str) -> float | None:
        value = self.problem.get(name)
        return float(value) if isinstance(value, int | float) else None

    def __str__(self) -> str:
        return f"{self.status} {self.slug or 'refused'}: {self.detail}"


class MovedOn(RefusedError):
    """The gradient was not applied and never will be, for the model has moved on: pull again.

    `epoch`, `version` and `step` say where it is, as far as the problem states them.
    """


class BadRequest(RefusedError):
    """Malformed request."""

    slug = "bad-request"


class InvalidJson(RefusedError):
    """Not valid JSON."""

    slug = "invalid-json"


class KeyMissing(RefusedError):
    """API key missing."""

    slug = "key-missing"


class KeyRequired(RefusedError):
    """The server has no API key and you are not on its machine."""

    slug = "key-required"


class KeyWrong(RefusedError):
    """API key not accepted."""

    slug = "key-wrong"


class OriginRefused(RefusedError):
    """Origin not allowed."""

    slug = "origin-refused"


class SessionUnknown(RefusedError):
    """No such session."""

    slug = "session-unknown"


class WorkerUnknown(RefusedError):
    """No such worker."""

    slug = "worker-unknown"


class CheckpointUnknown(RefusedError):
    """No such checkpoint."""

    slug = "checkpoint-unknown"


class NotFound(RefusedError):
    """No such resource."""

    slug = "not-found"


class MethodNotAllowed(RefusedError):
    """Method not allowed."""

    slug = "method-not-allowed"


class NotAcceptable(RefusedError):
    """Not available in the asked-for form."""

    slug = "not-acceptable"


class RequestTimeout(RefusedError):
    """The body arrived too slowly."""

    slug = "request-timeout"


class SpecDiffers(RefusedError):
    """The session exists with another specification."""

    slug = "spec-differs"


class Structural(RefusedError):
    """Can not be changed after creation."""

    slug = "structural"


class InFlight(RefusedError):
    """The same push is being committed."""

    slug = "in-flight"


class TooOld(RefusedError):
    """Sequence below the worker's window."""

    slug = "too-old"


class WorkerRetired(RefusedError):
    """Worker retired."""

    slug = "worker-retired"


class EpochChanged(MovedOn):
    """The session's history was cut."""

    slug = "epoch-changed"


class VersionUnknown(MovedOn):
    """No such version yet."""

    slug = "version-unknown"


class VersionPending(RefusedError):
    """Version not reached in time."""

    slug = "version-pending"


class StaleGradient(MovedOn):
    """Gradient too stale."""

    slug = "stale-gradient"


class ParamsMissing(RefusedError):
    """The session has no parameters yet."""

    slug = "params-missing"


class AverageMissing(RefusedError):
    """The session keeps no average."""

    slug = "average-missing"


class DeviceUnavailable(RefusedError):
    """Device not available."""

    slug = "device-unavailable"


class DataDirMissing(RefusedError):
    """The server has no data folder."""

    slug = "data-dir-missing"


class CheckpointExists(RefusedError):
    """Another checkpoint has this name."""

    slug = "checkpoint-exists"


class BackupRefused(RefusedError):
    """No backup can be made now or there."""

    slug = "backup-refused"


class SessionGone(RefusedError):
    """The session was deleted."""

    slug = "session-gone"


class LengthRequired(RefusedError):
    """Content-Length required."""

    slug = "length-required"


class PreconditionFailed(RefusedError):
    """Precondition failed."""

    slug = "precondition-failed"


class BodyTooLarge(RefusedError):
    """Body too large."""

    slug = "body-too-large"


class UnsupportedMediaType(RefusedError):
    """Unsupported media type."""

    slug = "unsupported-media-type"


class UnsupportedEncoding(RefusedError):
    """Unsupported content encoding."""

    slug = "unsupported-encoding"


class InvalidRequest(RefusedError):
    """Invalid fields."""

    slug = "invalid-request"


class NotSupportedYet(RefusedError):
    """Not supported yet."""

    slug = "not-supported-yet"


class InvalidTensors(RefusedError):
    """Broken tensor container."""

    slug = "invalid-tensors"


class TensorMismatch(RefusedError):
    """Tensors do not fit the session."""

    slug = "tensor-mismatch"


class Nonfinite(RefusedError):
    """Not finite."""

    slug = "nonfinite"


class KeyReused(RefusedError):
    """Worker and sequence were used for another push."""

    slug = "key-reused"


class TooManySessions(RefusedError):
    """Too many sessions."""

    slug = "too-many-sessions"


class TooManyWorkers(RefusedError):
    """Too many workers."""

    slug = "too-many-workers"


class Overloaded(RefusedError):
    """Overloaded."""

    slug = "overloaded"


class LogFull(RefusedError):
    """The log is full until the next snapshot."""

    slug = "log-full"


class Internal(RefusedError):
    """Unexpected failure."""

    slug = "internal"


class ShuttingDown(RefusedError):
    """Shutting down."""

    slug = "shutting-down"


class Recovering(RefusedError):
    """The session is being recovered."""

    slug = "recovering"


class SessionDamaged(RefusedError):
    """The session is damaged on the disk."""

    slug = "session-damaged"


class BackupFailed(RefusedError):
    """The backup could not be written."""

    slug = "backup-failed"


class DiskFull(RefusedError):
    """The disk is full."""

    slug = "disk-full"


class InsufficientMemory(RefusedError):
    """Not enough memory."""

    slug = "insufficient-memory"


class RoundClosed(MovedOn):
    """The round of the gradient's base version is closed; `round` is the open one."""

    slug = "round-closed"


class RoundAbandoned(MovedOn):
    """The round was given up, and the contributions to it with it.

    `reason` says why: timeout, or that parameters, state, groups or the specification were
    changed, or the server was stopped.
    """

    slug = "round-abandoned"

    @property
    def reason(self) -> str | None:
        """Why, in one word."""
        return self._text("reason")

    @property
    def worker(self) -> str | None:
        """Whose contribution it was."""
        return self._text("worker")

    @property
    def sequence(self) -> int | None:
        """Of that contribution; the number stays used."""
        return self._number("sequence")


class AlreadyContributed(RefusedError):
    """The worker has contributed to the open round, with another sequence."""

    slug = "already-contributed"

    @property
    def sequence(self) -> int | None:
        """Of the contribution that counts."""
        return self._number("sequence")


class OverridesDiffer(RefusedError):
    """The overrides are not those of the round's first contribution."""

    slug = "overrides-differ"


class NormExceeded(RefusedError):
    """The norm of the contribution is beyond what the session admits."""

    slug = "norm-exceeded"

    @property
    def norm(self) -> float | None:
        """Of the contribution."""
        return self._float("norm")

    @property
    def max_norm(self) -> float | None:
        """That the session admits."""
        return self._float("max_norm")


class RoundUnknown(RefusedError):
    """No such round: it has not begun, or it was closed too long ago."""

    slug = "round-unknown"


class SparseUnsupported(RefusedError):
    """The rule, or the mode, takes no sparse rows: send the gradient dense."""

    slug = "sparse-unsupported"


def _typed(root: type[RefusedError]) -> dict[str, type[RefusedError]]:
    found = {root.slug: root} if root.slug else {}
    for one in root.__subclasses__():
        found |= _typed(one)
    return found


BY_SLUG: Mapping[str, type[RefusedError]] = _typed(RefusedError)


def refusal(
    status: int, problem: Mapping[str, Any], retry_after_s: float | None = None
) -> RefusedError:
    """The error of a problem document, in its own class where its type is known."""
    slug = str(problem.get("type", "")).rpartition(PROBLEM_PREFIX)[2]
    return BY_SLUG.get(slug, RefusedError)(status, problem, retry_after_s)
